"""Files of an index that are not what they were: refused before they are used, and named."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from indexed import make_index, random_unit, search, write_vectors

from iir_dist import artifact
from iir_dist.data import cache
from iir_dist.data.embeddings import open_embeddings
from iir_dist.errors import CorruptError, MismatchError, NotFoundError, StorageError
from iir_dist.index import living
from iir_dist.index.engine import open_index
from iir_dist.index.export import export

XQ = random_unit(4, 8, seed=2)
FILES = (
    "shard-00001.faiss", "vectors-00002.f16", "trained.faiss", "names.parquet", "names-00001.parquet",
    "tombstones-00002.i64", "ids-00004.i64", "shard-00004.faiss", "vectors-00004.f16",
)  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that has lived: three shards built, one added, rows deleted, the first shard compacted."""
    root = tmp_path_factory.mktemp("integrity")
    emb = write_vectors(root / "emb", random_unit(90, 8, seed=1))
    make_index(root / "index", [emb], "IVF8,PQ4np", cuts=[30, 60])
    living.add([str(write_vectors(root / "more", random_unit(30, 8, seed=3), "more"))], str(root / "index"))
    living.delete(str(root / "index"), ids=[*range(20), 40])
    living.compact(str(root / "index"), above=0.5)
    artifact.verify(root / "index")
    return root / "index"


@pytest.fixture
def copy(index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index, tmp_path / "index"))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data if how == "flip" else data[:-1])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused_and_named(copy: Path, file: str, how: str) -> None:
    """By --verify at opening, by the first search that needs it, and by whatever else reads it."""
    damage(copy / file, how)
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        open_index(copy, verify=True, threads=1)
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        with open_index(copy, threads=2) as opened:
            opened.search(XQ, 10)
            assert opened.names is not None
    if file.endswith(".faiss"):
        with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
            export(str(copy), str(copy.parent / "plain.faiss"))
        assert not (copy.parent / "plain.faiss").exists()
    if file.startswith("names"):
        with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
            living.delete(str(copy), names=["db_00050"])


def test_what_is_not_needed_is_not_read(copy: Path) -> None:
    """Files are verified when they are first used: codes alone answer without the vectors, one shard without the others."""
    (copy / "vectors-00001.f16").unlink()
    (copy / "shard-00002.faiss").unlink()
    with open_index(copy, threads=1) as opened:
        assert (opened.search(XQ, 5, nprobe=8, refine=0, allowed=np.arange(30, 60))[1] >= 30).all()
        with pytest.raises(CorruptError, match=r"vectors-00001\.f16 is missing"):
            opened.search(XQ, 2, nprobe=8, refine=1, allowed=np.arange(30, 60))
        with pytest.raises(CorruptError, match=r"shard-00002\.faiss is missing"):
            opened.search(XQ, 5, refine=0)


@pytest.mark.parametrize(
    ("a", "b"), [("shard-00001.faiss", "shard-00002.faiss"), ("vectors-00001.f16", "vectors-00002.f16")]
)
def test_swapped_shards(copy: Path, a: str, b: str) -> None:
    (copy / a).rename(copy / "x")
    (copy / b).rename(copy / a)
    (copy / "x").rename(copy / b)
    with pytest.raises(CorruptError, match=rf"{a.replace('.', chr(92) + '.')} has"):
        search(copy, XQ, 5)


def test_a_shard_of_another_index(copy: Path, tmp_path: Path) -> None:
    """Of the same size, from another template: other bytes, so another SHA-256."""
    emb = write_vectors(tmp_path / "emb", random_unit(90, 8, seed=7))
    make_index(tmp_path / "other", [emb], "IVF8,PQ4np", cuts=[30, 60])
    shutil.copy(tmp_path / "other" / "shard-00001.faiss", copy / "shard-00001.faiss")
    with pytest.raises(CorruptError, match=r"shard-00001\.faiss has"):
        search(copy, XQ, 5)


def edited(copy: Path, **changes: object) -> None:
    value = json.loads((copy / "manifest.json").read_text())
    for path, new in changes.items():
        at = value
        *parents, last = path.split("__")
        for key in parents:
            at = at[int(key) if key.isdigit() else key]
        at[last] = new
    (copy / "manifest.json").write_text(json.dumps(value))


def test_a_foreign_template(copy: Path) -> None:
    number = json.loads((copy / "manifest.json").read_text())["info"]["shards"][1]["number"]
    edited(copy, info__shards__1__template="f" * 64)
    for use in (
        lambda: open_index(copy),
        lambda: export(str(copy), "x.faiss"),
        lambda: living.delete(str(copy), ids=[1]),
    ):
        with pytest.raises(MismatchError, match=rf"shard-{number:05d}\.faiss was filled from template ffffffffffff"):
            use()


def test_an_edited_manifest(copy: Path) -> None:
    edited(copy, files__names={"size": 1, "sha256": "0" * 64})
    with pytest.raises(CorruptError, match="was edited: its fingerprint does not follow from its files"):
        open_index(copy)


def test_a_lost_shard_is_an_error_or_is_said(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Never a silent partial answer: an error that names the shard, or the rows that are missing."""
    whole = search(copy, XQ, 10)
    (copy / "shard-00002.faiss").unlink()
    with pytest.raises(CorruptError, match=r"shard-00002\.faiss is missing"):
        search(copy, XQ, 10)
    with caplog.at_level("WARNING", "iir_dist"), open_index(copy, allow_partial=True, threads=2) as opened:
        assert opened.missing == []
        scores, rows = opened.search(XQ, 10, nprobe=8)
        assert opened.missing == [[60, 90]]
        again = opened.search(XQ, 10, nprobe=8, allowed=np.array([3, 50, 70]))
    assert "answers lack the database rows 60 to 89: " in caplog.text
    assert "shard-00002.faiss is missing" in caplog.text
    assert not ((rows >= 60) & (rows < 90)).any()
    assert set(again[1].ravel().tolist()) == {50, -1}  # 3 is deleted, 70 is lost
    assert rows.shape == whole[1].shape
    assert (np.diff(scores, axis=1) <= 0).all()


def test_lost_vectors_are_a_lost_shard(copy: Path) -> None:
    damage(copy / "vectors-00001.f16", "flip")
    with open_index(copy, allow_partial=True, threads=2) as opened:
        rows = opened.search(XQ, 20, nprobe=8, refine=4)[1]
        assert opened.missing == [[30, 60]]
    assert not ((rows >= 30) & (rows < 60)).any()


def test_two_changes_later_the_old_files_are_gone(copy: Path) -> None:
    """A reader that has not opened them yet is told to open the index again, also with --allow-partial."""
    early, late = open_index(copy, threads=1), open_index(copy, threads=1, allow_partial=True)
    expected = early.search(XQ, 10)
    living.delete(str(copy), ids=list(range(30, 60)))
    living.compact(str(copy), above=0.0)
    assert np.array_equal(late.search(XQ, 10, refine=0, allowed=np.arange(30, 40))[1] >= 30, np.ones((4, 10), bool))
    living.delete(str(copy), ids=[100])
    assert np.array_equal(early.search(XQ, 10)[1], expected[1])  # it has them open
    with pytest.raises(MismatchError, match="was changed since it was opened, and files of that time are gone"):
        late.search(XQ, 10)
    early.close()
    late.close()


def test_damaged_embeddings_are_named(tmp_path: Path) -> None:
    """Whether their vectors are read or not: by Parquet's own pages and thrift, which Arrow tells in other errors."""
    emb = write_vectors(tmp_path / "emb", random_unit(200, 8, seed=1))
    found, (path,) = open_embeddings(emb), emb.iterdir()
    whole = path.read_bytes()
    for start, stop in ((4, len(whole) // 2), (len(whole) // 2, len(whole) - 8), (len(whole) - 8, len(whole) - 4)):
        path.write_bytes(whole[:start] + b"\xff" * (stop - start) + whole[stop:])
        for vectors in (False, True):
            with pytest.raises(
                CorruptError, match=rf"{path.name} is not a Parquet file, or damaged \(.*; write it again"
            ):
                found.read(path.name, vectors=vectors)
    path.unlink()
    with pytest.raises(NotFoundError):  # what the disk says stays what it is
        found.read(path.name, vectors=False)


def test_copies_of_an_index_count_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bound for all that the cache holds, and the least recently used makes room, whatever it is a copy of."""
    for number, ending in enumerate(("faiss", "f16", "arrow")):
        path = tmp_path / f"{number:064x}.{ending}"
        path.write_bytes(bytes(1000))
        os.utime(path, (number, number))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "set.tar").write_bytes(bytes(5000))  # not a copy: neither counted nor evicted
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    monkeypatch.delenv("IIR_CACHE_GB", raising=False)
    assert cache.allowed_bytes(tmp_path) == (free + 3000) / 2
    with cache.filling(tmp_path):
        cache.make_room(tmp_path, 900, 3000)
        assert [path.suffix for path in sorted(tmp_path.glob("0*"))] == [".f16", ".arrow"]
        held = open(tmp_path / f"{1:064x}.f16", "rb")  # noqa: SIM115
        fcntl.flock(held, fcntl.LOCK_SH)
        with held, pytest.raises(StorageError, match=r"would have to hold 2,600 bytes \(1,000 of them are in use\)"):
            cache.make_room(tmp_path, 1600, 2500)
    assert [path.suffix for path in tmp_path.glob("0*")] == [".f16"]


@pytest.mark.s3
def test_the_cache_of_a_node(s3: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched once; a copy that lost a bit is fetched again; what is not in use makes room; too little room is said."""
    from iir_dist.storage import open_folder

    monkeypatch.setenv("IIR_CACHE", str(tmp_path / "cache"))
    folder = open_folder(f"{s3}/{tmp_path.name}")
    for path in copy.iterdir():
        if path.is_file():
            folder.write(path.name, path.read_bytes())
    expected = search(copy, XQ, 10)
    found = _search_at(folder.uri)
    assert np.array_equal(found[1], expected[1])
    manifest = artifact.read_manifest(folder)
    assert manifest is not None
    for name in manifest.files:
        if name.startswith(("shard", "vectors", "trained")):
            folder.delete(name)
    assert np.array_equal(_search_at(folder.uri)[0], expected[0])  # nothing is fetched a second time
    copies = sorted((tmp_path / "cache").glob("*.faiss"))
    for path in copies:
        damage(path, "flip")
    with pytest.raises(CorruptError, match="is missing"):
        _search_at(folder.uri)
    for path in copy.iterdir():
        if path.is_file():
            folder.write(path.name, path.read_bytes())
    assert np.array_equal(_search_at(folder.uri)[1], expected[1])
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*"))
    monkeypatch.setenv("IIR_CACHE_GB", str((size - 100) / 2**30))
    for path in (tmp_path / "cache").glob("*.i64"):
        path.unlink()
    assert np.array_equal(_search_at(folder.uri)[1], expected[1])
    monkeypatch.setenv("IIR_CACHE_GB", str(1000 / 2**30))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(StorageError, match=r"would have to hold [\d,]+ bytes .*and may hold 1,000; raise IIR_CACHE_GB"):
        _search_at(folder.uri)


def _search_at(uri: str) -> tuple[np.ndarray, np.ndarray]:
    with open_index(uri, threads=2) as opened:
        return opened.search(XQ, 10)
