"""Listing and reading folders, tars and zips."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.data import sources
from iir_dist.errors import ImageError, InputError

FILES = {"jpg/b_2.jpg": b"two", "jpg/a_1.JPG": b"one", "jpg/sub/c.png": b"three", "readme.txt": b"words"}


def make(kind: str, folder: Path, files: dict[str, bytes]) -> str:
    target = folder / f"photos.{kind}"
    if kind == "folder":
        for name, data in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    elif kind == "tar":
        with tarfile.open(target, "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    return str(target)


def read(listing: sources.Listing) -> list[bytes]:
    with sources.Reader() as reader:
        return [reader.read(member) for member in listing.members]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_all_kinds_give_the_same_members(tmp_path: Path, kind: str) -> None:
    listing = sources.list_sources([make(kind, tmp_path, FILES)])
    assert listing.names == ("a_1", "b_2", "sub/c")
    assert read(listing) == [b"one", b"two", b"three"]
    assert listing.ignored == 1


def test_a_folder_of_archives_stands_for_them(tmp_path: Path) -> None:
    make("tar", tmp_path, {"rome/1.jpg": b"r"})
    make("zip", tmp_path, {"pisa/1.jpg": b"p"})
    (tmp_path / "loose.jpg").write_bytes(b"l")
    listing = sources.list_sources([str(tmp_path)])
    assert listing.names == ("loose", "pisa/1", "rome/1")


def test_labels_are_the_folders_below_the_shared_one() -> None:
    names = sources.image_names(["data/jpg/pisa/1.jpg", "data/jpg/rome/1.jpg", "./data/jpg/rome/2.v2.jpg"])
    assert names == ["pisa/1", "rome/1", "rome/2.v2"]
    assert [sources.label_of(n) for n in names] == ["pisa", "rome", "rome"]
    assert sources.image_names(["one/folder/1.jpg"]) == ["1"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
def test_names_are_distinct_wherever_paths_are(paths: list[list[str]]) -> None:
    names = sources.image_names(["/".join(p) + ".jpg" for p in paths])
    assert len(set(names)) == len(paths)


def test_members_that_climb_out_are_marked_and_change_no_other_name(tmp_path: Path) -> None:
    files = {"jpg/a.jpg": b"1", "../../etc/b.jpg": b"2", "/abs/c.jpg": b"3", "C:\\d.jpg": b"4", "jpg/e..f.jpg": b"5"}
    listing = sources.list_sources([make("tar", tmp_path, files)])
    problems = {m.key: m.problem for m in listing.members}
    assert problems == {
        "jpg/a.jpg": "", "../../etc/b.jpg": "unsafe_path", "/abs/c.jpg": "unsafe_path", "C:\\d.jpg": "unsafe_path",
        "jpg/e..f.jpg": "",
    }  # fmt: skip
    assert {"a", "e..f"} < set(listing.names)


def test_links_and_devices_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("jpg/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("jpg/zero.jpg"))
    assert [m.problem for m in sources.list_sources([str(path)]).members] == ["not_a_file", ""]


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
        ("photos.tar.gz", b"x", "repack it as .tar or .zip"),
        ("photos.tar", b"not a tar at all", "damaged"),
        ("photos.zip", b"not a zip at all", "damaged"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, part: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=part) as error:
        sources.list_sources([str(tmp_path / name)])
    assert name in str(error.value)


def test_a_source_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no image \(0 other files\)"):
        sources.list_sources([str(tmp_path / "empty")])
    with pytest.raises(InputError, match=r"holds no image \(1 other files\)"):
        sources.list_sources([make("tar", tmp_path, {"readme.txt": b"x"})])


def test_a_tar_that_was_cut_is_refused_with_the_place(tmp_path: Path) -> None:
    whole = Path(make("tar", tmp_path, {f"jpg/{i}.jpg": os.urandom(3000) for i in range(5)}))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"cut\.tar is damaged after [23] members"):
        sources.list_sources([str(cut)])


def test_a_member_that_breaks_later_is_an_image_error(tmp_path: Path) -> None:
    uri = make("zip", tmp_path, {"jpg/a.jpg": os.urandom(5000)})
    listing = sources.list_sources([uri])
    data = bytearray(Path(uri).read_bytes())
    data[100] ^= 0xFF
    Path(uri).write_bytes(data)
    with pytest.raises(ImageError) as error:
        read(listing)
    assert error.value.reason == "corrupt"
    folder = make("folder", tmp_path, {"a.jpg": b"1"})
    listing = sources.list_sources([folder])
    (Path(folder) / "a.jpg").unlink()
    with pytest.raises(ImageError) as error:
        read(listing)
    assert error.value.reason == "unreadable"


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        path = Path(make("tar", tmp_path / name, FILES))
        os.utime(path, (1, 1))
    a = sources.list_sources([str(tmp_path / "a" / "photos.tar")]).fingerprint
    assert a == sources.list_sources([str(tmp_path / "b" / "photos.tar")]).fingerprint
    os.utime(tmp_path / "b" / "photos.tar", (2, 2))
    assert a != sources.list_sources([str(tmp_path / "b" / "photos.tar")]).fingerprint


@pytest.mark.s3
def test_s3_gives_the_same_members(s3: str, tmp_path: Path) -> None:
    from iir_dist.storage import open_folder

    folder = open_folder(f"{s3}/{tmp_path.name}")
    folder.write("photos.tar", Path(make("tar", tmp_path, FILES)).read_bytes())
    folder.write("photos.zip", Path(make("zip", tmp_path, FILES)).read_bytes())
    for name, data in FILES.items():
        folder.write(f"loose/{name}", data)
    for uri in (folder.address("photos.tar"), folder.address("photos.zip"), folder.address("loose")):
        listing = sources.list_sources([uri])
        assert listing.names == ("a_1", "b_2", "sub/c")
        assert read(listing) == [b"one", b"two", b"three"]
    with pytest.raises(InputError, match="holds no image"):
        sources.list_sources([folder.address("nothing-here")])
