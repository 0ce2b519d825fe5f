"""Listing and reading folders, archives and lists."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from photos import tar_of

from iir_dist.data import sources
from iir_dist.data.listing import Listing, list_sources, to_members
from iir_dist.data.sources import Member
from iir_dist.data.sources.reader import Reader
from iir_dist.errors import ImageError, InputError

FILES = {"jpg/b_2.jpg": b"two", "jpg/a_1.JPG": b"one", "jpg/sub/c.png": b"three", "readme.txt": b"words"}
KINDS = ("folder", "tar", "zip", "tar.gz", "tgz", "tar.zst", "tar.bz2", "tar.xz")


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


PACK = {
    "tar": bytes, "tar.gz": gzip.compress, "tgz": gzip.compress, "tar.zst": zstd, "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}  # fmt: skip


def make(kind: str, folder: Path, files: dict[str, bytes]) -> str:
    target = folder / f"photos.{kind}"
    if kind == "folder":
        for name, data in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        target.write_bytes(PACK[kind](tar_of(files)))
    return str(target)


def members(listing: Listing) -> list[Member]:
    return to_members(listing.take(np.arange(len(listing))))


def answers(listing: Listing) -> list[bytes | ImageError]:
    reader = Reader()
    try:
        return [data for _, data in reader.read(members(listing))]
    finally:
        reader.close()


def reasons(listing: Listing) -> list[str]:
    return [data.reason if isinstance(data, ImageError) else "" for data in answers(listing)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_give_the_same_members(tmp_path: Path, kind: str) -> None:
    # Sorted as well, since a compressed tar keeps its order.
    files = FILES if kind in ("folder", "tar", "zip") else dict(sorted(FILES.items()))
    listing = list_sources([make(kind, tmp_path, files)], tmp_path)
    assert listing.names.to_pylist() == ["a_1", "b_2", "sub/c"]
    assert answers(listing) == [b"one", b"two", b"three"]
    assert listing.ignored == 1


def test_a_folder_of_archives_stands_for_them(tmp_path: Path) -> None:
    make("tar", tmp_path, {"rome/1.jpg": b"r"})
    make("zip", tmp_path, {"pisa/1.jpg": b"p"})
    make("tgz", tmp_path, {"oslo/2.jpg": b"o", "oslo/1.jpg": b"q"})
    (tmp_path / "loose.jpg").write_bytes(b"l")
    (tmp_path / "scratch").mkdir()
    listing = list_sources([str(tmp_path)], tmp_path / "scratch")
    assert listing.names.to_pylist() == ["loose", "pisa/1", "rome/1", "oslo/2", "oslo/1"]
    assert answers(listing) == [b"l", b"p", b"r", b"o", b"q"]


def test_several_sources_in_one_call(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first, second = make("tar", tmp_path, {"x/z.jpg": b"1"}), make("folder", tmp_path / "b", {"y/a.jpg": b"2"})
    listing = list_sources([first, second], tmp_path)
    assert listing.names.to_pylist() == ["z", "a"]
    assert listing.fingerprint != list_sources([second, first], tmp_path).fingerprint


def test_labels_are_the_folders_below_the_shared_one() -> None:
    names = sources.image_names(["data/jpg/pisa/1.jpg", "data/jpg/rome/1.jpg", "./data/jpg/rome/2.v2.jpg"])
    assert names == ["pisa/1", "rome/1", "rome/2.v2"]
    assert sources.image_names(["one/folder/1.jpg"]) == ["1"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
def test_names_are_distinct_wherever_paths_are(paths: list[list[str]]) -> None:
    names = sources.image_names(["/".join(p) + ".jpg" for p in paths])
    assert len(set(names)) == len(paths)


def test_members_that_climb_out_are_marked_and_change_no_other_name(tmp_path: Path) -> None:
    files = {"jpg/a.jpg": b"1", "../../etc/b.jpg": b"2", "/abs/c.jpg": b"3", "C:\\d.jpg": b"4", "jpg/e..f.jpg": b"5"}
    listing = list_sources([make("tar", tmp_path, files)], tmp_path)
    problems = {m.key: m.problem for m in members(listing)}
    assert problems == {
        "jpg/a.jpg": "", "../../etc/b.jpg": "unsafe_path", "/abs/c.jpg": "unsafe_path", "C:\\d.jpg": "unsafe_path",
        "jpg/e..f.jpg": "",
    }  # fmt: skip
    assert {"a", "e..f"} < set(listing.names.to_pylist())


def test_links_and_devices_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("jpg/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("jpg/zero.jpg"))
    assert [m.problem for m in members(list_sources([str(path)], tmp_path))] == ["not_a_file", ""]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"latin")
    listing = list_sources([str(folder)], tmp_path)
    assert listing.names.to_pylist() == ["caf\\xe9"]
    assert answers(listing) == [b"latin"]


def test_a_link_to_the_folder_that_it_lies_in_ends(tmp_path: Path) -> None:
    folder = Path(make("folder", tmp_path, {"a/1.jpg": b"1"}))
    (folder / "a" / "loop").symlink_to(folder)
    assert list_sources([str(folder)], tmp_path).names.to_pylist() == ["1"]


def test_webdataset_classes_are_labels(tmp_path: Path) -> None:
    files = {
        "0001.jpg": b"1",
        "0001.cls": b"rome",
        "0001.json": b"{}",
        "0002.cls": b"7\n",
        "0002.jpg": b"2",
        "0003.jpg": b"3",
    }
    for kind in ("tar", "tgz"):
        listing = list_sources([make(kind, tmp_path, files)], tmp_path)
        assert [(m.name, m.label) for m in members(listing)] == [("0001", "rome"), ("0002", "7"), ("0003", None)]
        assert listing.ignored == 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_of_addresses(tmp_path: Path, kind: str) -> None:
    folder = Path(make("folder", tmp_path, {"x/a.jpg": b"1", "y/b.jpg": b"2", "y/c.jpg": b"3"}))
    table = pa.table(
        {
            "uri": ["photos.folder/x/a.jpg", str(folder / "y/b.jpg"), f"file://{folder}/y/c.jpg", "nowhere.jpg"],
            "name": ["first", None, None, "gone"],
            "label": ["rome", None, "pisa", None],
            "split": [None, "query", "train", None],
        }
    )
    path = tmp_path / f"list.{kind}"
    pa.csv.write_csv(table, path) if kind == "csv" else pq.write_table(table, path)
    listing = list_sources([str(path)], tmp_path)
    found = {m.name: (m.label, m.split) for m in members(listing)}
    assert found.pop("first") == ("rome", None)
    assert found.pop("gone") == (None, None)
    assert sorted(found.values(), key=str) == [("pisa", "train"), (None, "query")]
    by_name = dict(zip(listing.names.to_pylist(), answers(listing), strict=True))
    assert by_name["first"] == b"1"
    assert isinstance(by_name["gone"], ImageError)
    assert by_name["gone"].reason == "unreadable"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("name,label\na,b\n", "has the columns name, label; expected uri"),
        ("uri,split\na.jpg,test\n", "row 0 has split 'test'; expected one of db, query"),
        ("uri,name\n,a\n", "row 0 has no uri"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(InputError, match=part):
        list_sources([str(tmp_path / "list.csv")], tmp_path)


def test_hidden_files_are_not_images() -> None:
    assert not sources.is_image("__MACOSX/jpg/a.jpg")
    assert not sources.is_image("jpg/._a.jpg")
    assert sources.is_image("./jpg/a.JPEG")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("missing", None, "does not exist"),
        ("missing.tar", None, "does not exist"),
        ("photo.jpg", b"x", "is a file; expected a folder"),
        ("photos.7z", b"x", "repack it as .tar"),
        ("photos.tar.gz", b"x", "damaged after 0 members"),
        ("photos.tar.zst", b"x", "damaged after 0 members"),
        ("photos.tar.bz2", b"x", "damaged after 0 members"),
        ("photos.tar.xz", b"x", "damaged after 0 members"),
        ("photos.parquet", b"x", "is not a Parquet file"),
        ("photos.tar", b"not a tar at all", "damaged"),
        ("photos.zip", b"not a zip at all", "damaged"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, part: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=part) as error:
        list_sources([str(tmp_path / name)], tmp_path)
    assert name in str(error.value)


def test_a_source_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no image \(0 other files\)"):
        list_sources([str(tmp_path / "empty")], tmp_path)
    with pytest.raises(InputError, match=r"holds no image \(1 other files\)"):
        list_sources([make("tar", tmp_path, {"readme.txt": b"x"})], tmp_path)


def test_a_tar_that_was_cut_is_refused_with_the_place(tmp_path: Path) -> None:
    whole = Path(make("tar", tmp_path, {f"jpg/{i}.jpg": os.urandom(3000) for i in range(5)}))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"cut\.tar is damaged after [23] members"):
        list_sources([str(cut)], tmp_path)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst", "tar.bz2", "tar.xz"])
def test_a_compressed_tar_that_was_cut_is_refused(tmp_path: Path, kind: str) -> None:
    whole = Path(make(kind, tmp_path, {f"jpg/{i}.jpg": os.urandom(30000) for i in range(5)}))
    whole.write_bytes(whole.read_bytes()[:70000])
    with pytest.raises(InputError, match=r"is damaged after \d members"):
        list_sources([str(whole)], tmp_path)


def test_members_that_break_later_are_image_errors(tmp_path: Path) -> None:
    uri = make("zip", tmp_path, {"jpg/a.jpg": os.urandom(5000), "jpg/b.jpg": os.urandom(5000)})
    listing = list_sources([uri], tmp_path)
    stat, data = os.stat(uri), bytearray(Path(uri).read_bytes())
    data[100] ^= 0xFF
    Path(uri).write_bytes(data)
    os.utime(uri, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert reasons(listing) == ["corrupt", ""]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "tar.gz"])
def test_what_changes_after_the_listing_is_recorded(tmp_path: Path, kind: str) -> None:
    uri = make(kind, tmp_path, {"a.jpg": b"1", "b.jpg": b"2"})
    listing = list_sources([uri], tmp_path)
    path = Path(uri) / "a.jpg" if kind == "folder" else Path(uri)
    path.write_bytes(path.read_bytes() + b"more")
    assert reasons(listing) == (["changed", ""] if kind == "folder" else ["changed", "changed"])
    path.unlink()
    assert reasons(listing)[0] == "unreadable"


def test_zip_methods_and_encryption(tmp_path: Path) -> None:
    uri = tmp_path / "x.zip"
    data = os.urandom(2000) + bytes(2000)
    with zipfile.ZipFile(uri, "w") as archive:
        for name, method in (("a", 0), ("b", zipfile.ZIP_DEFLATED), ("c", zipfile.ZIP_BZIP2), ("d", zipfile.ZIP_LZMA)):
            archive.writestr(f"{name}.jpg", data, method)
        long = zipfile.ZipInfo("e.jpg")
        long.extra = b"\xfe\xca\x00\x08" + bytes(2048)  # a local header longer than is allowed for
        archive.writestr(long, data)
    listing = list_sources([str(uri)], tmp_path)
    found = answers(listing)
    assert found[:3] == [data] * 3
    assert found[4] == data
    assert isinstance(found[3], ImageError)
    assert "compression method 14 is not known here" in found[3].detail
    raw = bytearray(uri.read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1  # the directory says that a.jpg is encrypted
    uri.write_bytes(raw)
    found = answers(list_sources([str(uri)], tmp_path))
    assert isinstance(found[0], ImageError)
    assert "encrypted" in found[0].detail


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    uri = tmp_path / "x.zip"
    with zipfile.ZipFile(uri, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(64 * 2**20))
    raw = bytearray(uri.read_bytes())
    directory = raw.index(b"PK\1\2")
    raw[directory + 24 : directory + 28] = (100).to_bytes(4, "little")  # it claims to hold 100 bytes
    uri.write_bytes(raw)
    before = pa.total_allocated_bytes()
    (found,) = answers(list_sources([str(uri)], tmp_path))
    assert isinstance(found, ImageError)
    assert found.reason == "corrupt"
    assert "101 bytes" in found.detail
    assert pa.total_allocated_bytes() - before < 2**20


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_many_members_in_any_order(tmp_path: Path, kind: str) -> None:
    """Neighbours are read at once, a stream goes back where it must: the answers are those of reading one by one."""
    rng = np.random.default_rng(0)
    files = {f"jpg/{i:03d}.jpg": rng.bytes(int(n)) for i, n in enumerate(rng.integers(0, 200_000, 60))}
    listing = list_sources([make(kind, tmp_path, files)], tmp_path)
    found = members(listing)
    order = rng.permutation(len(found))
    reader = Reader()
    for places in (np.arange(len(found)), order):
        chosen = [found[i] for i in places]
        assert [data for _, data in reader.read(chosen)] == [files[m.key] for m in chosen]
        joined = [len(request.members) for request in reader.requests(chosen)]
        assert sum(joined) == len(chosen)
        assert kind != "tar" or places is order or max(joined) > 10
    reader.close()


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        path = Path(make("tar", tmp_path / name, FILES))
        os.utime(path, (1, 1))
    a = list_sources([str(tmp_path / "a" / "photos.tar")], tmp_path).fingerprint
    assert a == list_sources([str(tmp_path / "b" / "photos.tar")], tmp_path).fingerprint
    os.utime(tmp_path / "b" / "photos.tar", (2, 2))
    assert a != list_sources([str(tmp_path / "b" / "photos.tar")], tmp_path).fingerprint


def test_compressed_tars_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each from front to back, over several calls: no stream is begun twice."""
    from iir_dist.data.sources.archives import StreamSource

    folder = tmp_path / "photos"
    for kind in ("tar.gz", "tar.zst", "tgz"):
        (folder / kind).mkdir(parents=True)
        make(kind, folder / kind, {f"{kind}/{n}.jpg": bytes([n]) for n in range(5)})
    listing = list_sources([str(folder)], tmp_path)
    begun: list[str] = []
    unpacked = StreamSource._unpacked
    monkeypatch.setattr(StreamSource, "_unpacked", lambda self, file: (begun.append(self.uri), unpacked(self, file))[1])
    reader, found = Reader(), members(listing)
    for start in range(0, 15, 4):
        chosen = found[start : start + 4]
        assert [data for _, data in reader.read(chosen)] == [bytes([int(m.key[-5])]) for m in chosen]
    reader.close()
    assert len(begun) == len(set(begun)) == 3


@pytest.mark.s3
def test_s3_gives_the_same_members(s3: str, tmp_path: Path) -> None:
    from iir_dist.storage import open_folder

    folder = open_folder(f"{s3}/{tmp_path.name}")
    for kind in ("tar", "zip", "tar.gz", "tar.zst"):
        files = FILES if kind in ("tar", "zip") else dict(sorted(FILES.items()))
        folder.write(f"photos.{kind}", Path(make(kind, tmp_path, files)).read_bytes())
    for name, data in FILES.items():
        folder.write(f"loose/{name}", data)
    folder.write("list.csv", b"uri\nloose/jpg/a_1.JPG\nloose/jpg/b_2.jpg\nloose/jpg/sub/c.png\n")
    for name in ("photos.tar", "photos.zip", "photos.tar.gz", "photos.tar.zst", "loose", "list.csv"):
        listing = list_sources([folder.address(name)], tmp_path)
        assert listing.names.to_pylist() == ["a_1", "b_2", "sub/c"]
        assert answers(listing) == [b"one", b"two", b"three"]
    listing = list_sources([folder.address("loose")], tmp_path)
    folder.write("loose/jpg/a_1.JPG", b"another")
    folder.delete("loose/jpg/b_2.jpg")
    assert reasons(listing) == ["changed", "unreadable", ""]
    with pytest.raises(InputError, match="holds no image"):
        list_sources([folder.address("nothing-here")], tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_sources([folder.address("nothing.tar")], tmp_path)
