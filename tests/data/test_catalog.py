"""The catalog: what it says, and that every entry resolves, against a server on loopback that serves tiny sets."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from http_server import Server, serve

from iir_dist.data import catalog, groundtruth
from iir_dist.data.catalog import Archive, Dataset, Truth
from iir_dist.data.downloads import file_name
from iir_dist.errors import CorruptError, GroundTruthError, InputError, NotFoundError

TEXTS = {
    "all_souls_1_query.txt": b"oxc1_all_souls_000013 136.5 34.1 648.5 955.7",
    "all_souls_1_good.txt": b"all_souls_000013\nall_souls_000026\n",
    "all_souls_1_ok.txt": b"oxford_002985\n",
    "all_souls_1_junk.txt": b"",
}
REVISITED = {
    "imlist": ["all_souls_000013", "all_souls_000026"], "qimlist": ["all_souls_000051"],
    "gnd": [{"bbx": [0, 0, 10, 20], "easy": [0], "hard": [1], "junk": []}],
}  # fmt: skip
WITH_ARCHIVES = [dataset for dataset in catalog.DATASETS.values() if dataset.archives]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with serve() as running:
        yield running


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tiny(dataset: Dataset, server: Server) -> Dataset:
    """The same set with the addresses of `server`, at most three archives, and next to nothing in them."""

    def put(url: str, data: bytes) -> str:
        return server.put(urlsplit(url).path, data)

    archives = []
    for number, archive in enumerate(dataset.archives[:3]):
        data = tar({f"jpg/{number}.jpg": b"photo"}, "w:" if archive.url.endswith(".tar") else "w:gz")
        url = archive.checksum_url and put(
            archive.checksum_url, f"{hashlib.md5(data).hexdigest()}  {file_name(archive.url)}\n".encode()
        )
        archives.append(dataclasses.replace(archive, url=put(archive.url, data), checksum_url=url))
    truth = dataset.groundtruth
    if truth:
        data = tar(TEXTS) if truth.protocol == "original" else pickle.dumps(REVISITED, 2)
        truth = dataclasses.replace(truth, url=put(truth.url, data))
    lists = tuple(dataclasses.replace(file, url=put(file.url, b"names")) for file in dataset.lists)
    return dataclasses.replace(dataset, archives=tuple(archives), groundtruth=truth, lists=lists)


# ------------------------------------------------------------------------------------------------ every entry


@pytest.mark.parametrize("dataset", WITH_ARCHIVES, ids=lambda dataset: dataset.name)
def test_every_set_resolves_once(server: Server, tmp_path: Path, dataset: Dataset) -> None:
    local = tiny(dataset, server)
    resolved = catalog.resolve(local, tmp_path)
    assert [p.name for p in resolved.archives] == [file_name(a.url) for a in dataset.archives[:3]]
    for path, archive in zip(resolved.archives, local.archives, strict=True):
        assert path.parent == tmp_path / dataset.place
        assert path.read_bytes() == server.resources[urlsplit(archive.url).path].data
        record = json.loads(path.with_name(path.name + ".json").read_text())
        assert ("md5" in record) == bool(archive.checksum_url)
    assert [path.read_bytes() for path in resolved.lists] == [b"names"] * len(dataset.lists)
    if dataset.groundtruth:
        assert resolved.groundtruth is not None
        truth = groundtruth.read(resolved.groundtruth)
        assert truth.protocol == dataset.groundtruth.protocol
        assert truth.queries[0].image == ("all_souls_000013" if truth.protocol == "original" else "all_souls_000051")
    else:
        assert resolved.groundtruth is None
    made = len(server.requests)
    assert catalog.resolve(local, tmp_path) == resolved
    assert len(server.requests) == made


@pytest.mark.parametrize("dataset", WITH_ARCHIVES, ids=lambda dataset: dataset.name)
def test_every_set_can_be_placed_by_hand_as_the_instructions_say(
    server: Server, tmp_path: Path, dataset: Dataset
) -> None:
    local = tiny(dataset, server)
    pairs = re.findall(r"  (http\S+)\n    to (\S+)", catalog.instructions(local, tmp_path))
    assert len(pairs) == len(local.archives) + len(local.lists) + bool(local.groundtruth)
    for url, path in pairs:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(server.resources[urlsplit(url).path].data)
    resolved = catalog.resolve(local, tmp_path)
    assert not server.requests
    placed = {*resolved.archives, *resolved.lists}
    assert {str(path) for path in placed} <= {path for _, path in pairs}


def test_two_annotations_of_the_same_photos_share_them(server: Server, tmp_path: Path) -> None:
    old = catalog.resolve(tiny(catalog.get("paris6k"), server), tmp_path)
    new = catalog.resolve(tiny(catalog.get("rparis6k"), server), tmp_path)
    assert old.archives == new.archives
    assert len([seen for seen in server.requests if "paris_1-v1" in seen.path]) == 1


def test_a_set_without_archives_says_how_to_get_it(tmp_path: Path) -> None:
    lists = catalog.get("landmarks-clean")
    with pytest.raises(
        InputError, match=r"only as lists of their addresses \(http://download.*CLASS/FILE.*--split train"
    ):
        catalog.resolve(lists, tmp_path)
    assert "CLASS/FILE" in catalog.instructions(lists, tmp_path)


# ------------------------------------------------------------------------------------------------ what it says


def test_names_and_addresses() -> None:
    assert list(catalog.DATASETS) == [
        "oxford5k", "paris6k", "roxford5k", "rparis6k", "revisitop1m", "retrieval-sfm-120k", "landmarks-clean",
        "gldv2-clean",
    ]  # fmt: skip
    assert catalog.get("ROxford5k").name == "roxford5k"
    with pytest.raises(InputError, match=r"no data set is called 'oxford'; known are oxford5k, paris6k, .*gldv2-clean"):
        catalog.get("oxford")
    places: dict[tuple[str, str], str] = {}
    for dataset in catalog.DATASETS.values():
        urls = [a.url for a in dataset.archives + dataset.lists]
        urls += [a.checksum_url for a in dataset.archives if a.checksum_url]
        urls += [dataset.groundtruth.url] if dataset.groundtruth else []
        for url in urls:
            assert urlsplit(url).scheme in ("http", "https")
            assert places.setdefault((dataset.place, file_name(url)), url) == url, "two addresses, one file"
        assert dataset.notes
        assert dataset.licence
    assert len(catalog.get("revisitop1m").archives) == 100
    assert catalog.get("revisitop1m").archives[99].url.endswith("/revisitop1m.100.tar.gz")
    assert [a.url[-14:] for a in catalog.get("gldv2-clean").archives[::499]] == ["images_000.tar", "images_499.tar"]


def test_the_table() -> None:
    rows = {row["name"]: row for row in catalog.table()}
    assert list(rows) == list(catalog.DATASETS)
    assert rows["roxford5k"] == {
        "name": "roxford5k", "images": "5,063", "size": "about 1.94 GB", "split": "db", "protocol": "revisited",
        "checksum": "not published", "licence": "Flickr's terms of use; VGG's terms",
    }  # fmt: skip
    assert rows["gldv2-clean"]["checksum"] == "published"
    assert rows["gldv2-clean"]["images"] == "1,580,470"
    assert (rows["landmarks-clean"]["size"], rows["landmarks-clean"]["images"]) == ("no archive", "not known")
    lines = catalog.format_table().splitlines()
    assert len(lines) == 1 + len(rows)
    assert {line.index("  ") > 0 and line[lines[0].index("split") :].split()[0] for line in lines[1:]} == {
        "db", "train", "distractor",
    }  # fmt: skip


def test_sizes_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dataclasses.replace(
        catalog.get("paris6k"), archives=(Archive("http://h/a", 10**9), Archive("http://h/b", 5 * 10**8))
    )
    monkeypatch.setattr(catalog, "DATASETS", {"known": known, "none": dataclasses.replace(
        known, archives=(Archive("http://h/a"),), approximate_bytes=None)})  # fmt: skip
    assert [row["size"] for row in catalog.table()] == ["1.5 GB", "not known"]


def test_long_instructions_are_cut(tmp_path: Path) -> None:
    text = catalog.instructions(catalog.get("gldv2-clean"), tmp_path)
    assert len(text.splitlines()) == 8
    assert f"to {tmp_path}/gldv2/images_000.tar" in text
    assert "500 files" in text
    assert f"to {tmp_path}/gldv2/images_499.tar" in text


def test_counts_and_corrupt_names_fit_the_published_annotations(shared: Path) -> None:
    folder = shared / "groundtruth"
    paris = catalog.get("paris6k")
    assert len(set(paris.corrupt)) == 20
    assert paris.images is not None
    for name in ("roxford5k", "rparis6k"):
        truth = groundtruth.read(folder / "revisitop" / f"gnd_{name}.pkl")
        dataset = catalog.get(name)
        assert len(truth.images()) == (dataset.images or 0) - len(dataset.corrupt)
        assert f"{len(truth.database or ()):,}" in dataset.notes[0]
        assert f"{len(truth.queries)} queries" in dataset.notes[0]
        assert not truth.images() & set(dataset.corrupt)
    for name in ("oxford5k", "paris6k"):
        truth = groundtruth.read(folder / f"{name}_gt_files")
        assert f"{len(truth.queries)} queries" in catalog.get(name).notes[0]
        assert not truth.images() & set(paris.corrupt)


def test_the_published_texts_survive_packing(server: Server, tmp_path: Path, shared: Path) -> None:
    folder = shared / "groundtruth" / "oxford5k_gt_files"
    data = tar({f"./gt_files/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())})
    local = tiny(catalog.get("oxford5k"), server)
    assert local.groundtruth is not None
    server.resources[urlsplit(local.groundtruth.url).path].data = data
    resolved = catalog.resolve(local, tmp_path)
    assert resolved.groundtruth is not None
    assert groundtruth.read(resolved.groundtruth) == groundtruth.read(folder)


# ------------------------------------------------------------------------------------------------ what can be wrong


def test_the_published_checksum_is_checked(server: Server, tmp_path: Path) -> None:
    local = tiny(catalog.get("gldv2-clean"), server)
    server.resources[urlsplit(local.archives[1].url).path].data = b"cut"
    with pytest.raises(CorruptError, match=f"images_001.tar has md5 {hashlib.md5(b'cut').hexdigest()}, expected"):
        catalog.resolve(local, tmp_path)
    server.put(urlsplit(str(local.archives[0].checksum_url)).path, b"<Error>AccessDenied</Error>")
    with pytest.raises(CorruptError, match="begins with '<Error>AccessDenied</Error>', expected an MD5; delete it"):
        catalog.resolve(local, tmp_path / "other")


def test_a_ground_truth_that_is_gone_shows_before_the_photos(server: Server, tmp_path: Path) -> None:
    local = tiny(catalog.get("roxford5k"), server)
    assert local.groundtruth is not None
    del server.resources[urlsplit(local.groundtruth.url).path]
    with pytest.raises(NotFoundError, match=rf"place it at {tmp_path}/oxford5k/gnd_roxford5k\.pkl, then run the same"):
        catalog.resolve(local, tmp_path, fetch=lambda items, folder: catalog.downloads.fetch_all(items, folder, 1))
    assert server.requests[0].path.endswith("gnd_roxford5k.pkl")


def unpacked(folder: Path, data: bytes) -> Path:
    (folder / "gt.tgz").write_bytes(data)
    dataset = dataclasses.replace(
        catalog.get("oxford5k"), place=".", archives=(Archive("http://h/photos.tgz"),),
        groundtruth=Truth("http://h/gt.tgz", "original"),
    )  # fmt: skip
    (folder / "photos.tgz").write_bytes(b"photos")
    found = catalog.resolve(dataset, folder).groundtruth
    assert found is not None
    return found


def test_only_text_files_are_unpacked_and_without_folders(tmp_path: Path) -> None:
    files = {f"gt_files_170407/{name}": data for name, data in TEXTS.items()}
    files |= {"gt_files_170407/._all_souls_1_query.txt": b"fork", "compute_ap.cpp": b"code", "x/run.sh": b"code"}
    folder = unpacked(tmp_path, tar(files))
    assert sorted(path.name for path in folder.iterdir()) == sorted(TEXTS)
    assert folder.parent == tmp_path
    assert groundtruth.read(folder).queries[0].labels["good"] == ("all_souls_000013", "all_souls_000026")


def test_links_and_devices_are_not_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO(tar(TEXTS, "w:"))
    with tarfile.open(fileobj=buffer, mode="a:") as archive:
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("pipe.txt", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    folder = unpacked(tmp_path, buffer.getvalue())
    assert sorted(path.name for path in folder.iterdir()) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["../evil_query.txt", "/evil_query.txt", "a/../../evil_query.txt", "..\\evil.txt"])
def test_a_tar_that_climbs_is_refused_whole(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises(GroundTruthError, match="climbs out of its folder; delete it"):
        unpacked(inside, tar({**TEXTS, name: b"evil"}))
    assert not list(tmp_path.rglob("*evil*"))
    assert sorted(path.name for path in inside.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no tar at all", "is damaged"),
        (tar({f"{n}_query.txt": random.Random(n).randbytes(9_000) for n in range(20)})[:-5_000], "is damaged"),
        (gzip.compress(tar({"x_query.txt": b"1"}, "w:")[:1024])[:-8] + b"checksum", "is damaged"),
        (tar({"readme.txt": b"words"}), r"holds no \*_query\.txt"),
        (tar({"a/x_query.txt": b"1", "b/x_query.txt": b"2"}), "holds two files 'x_query.txt'"),
        (tar({"x_query.txt": bytes(64 * 2**20), "y.txt": b"1"}), "more than 10000 text files or 67108864 bytes"),
        (tar({f"{n}_query.txt": b"" for n in range(10_001)}), "more than 10000 text files"),
    ],
    ids=["bytes", "cut", "checksum", "no query", "twice", "large", "many"],
)
def test_a_tar_that_is_no_ground_truth(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(GroundTruthError, match=rf"gt\.tgz.*{message}.*run the same command again"):
        unpacked(tmp_path, data)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_replaced_ground_truth_is_unpacked_anew(tmp_path: Path) -> None:
    first = unpacked(tmp_path, tar(TEXTS))
    os.unlink(tmp_path / "gt.tgz.json")
    second = unpacked(tmp_path, tar({**TEXTS, "all_souls_1_ok.txt": b"all_souls_000099"}))
    assert groundtruth.read(first).queries[0].labels["ok"] == ("oxford_002985",)
    assert groundtruth.read(second).queries[0].labels["ok"] == ("all_souls_000099",)
