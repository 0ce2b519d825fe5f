"""The cache of image shards: the rows of the Parquet files without a copy, within its bound, whoever fills or dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact
from iir_dist.config import StageConfig
from iir_dist.data import cache
from iir_dist.data.cache import Photos
from iir_dist.errors import ConfigError, CorruptError, StorageError
from iir_dist.storage import open_folder

ROWS, ROW_BYTES, GROUP = 30, 2000, 8
"""Of a shard: rows, bytes of an image at most, rows of a row group."""
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.string(), nullable=False),
        pa.field("label", pa.string()), pa.field("split", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False), pa.field("bytes", pa.binary(), nullable=False),
    ]
)  # fmt: skip
"""The columns of an images artifact that matter here, and two that do not."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, whose bound is the default one, for each test."""
    monkeypatch.setenv("IIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IIR_CACHE_GB", raising=False)
    return tmp_path / "cache"


def make(out: str | Path, shards: int = 1, rows: int = ROWS, row_bytes: int = ROW_BYTES, query: int = 7) -> str:
    """An images artifact of random bytes; its name decides them. A third has no label, one row in `query` is a query."""
    rng = np.random.default_rng(list(Path(out).name.encode()))
    with artifact.begin(out, "ingest", StageConfig(), {}) as work:
        for shard in range(shards):
            columns = {
                "id": range(shard * rows, (shard + 1) * rows),
                "name": [f"{Path(out).name}/{shard}/{row}" for row in range(rows)],
                "label": [(None, "arch", "brücke")[row % 3] for row in range(rows)],
                "split": ["query" if row % query == query - 1 else "train" for row in range(rows)],
                "sha256": ["0" * 64] * rows,
                "bytes": [rng.bytes(row_bytes - int(rng.integers(row_bytes // 2))) for _ in range(rows)],
            }
            name = artifact.shard_name(shard)
            with work.folder.publish(name) as file:
                pq.write_table(
                    pa.table(columns, schema=SCHEMA), file.path, row_group_size=GROUP, compression="none",
                    use_dictionary=["label", "split"], write_statistics=["id", "name"],
                )  # fmt: skip
            artifact.commit(work.folder, shard, {name: artifact.entry_of(file)}, {"rows": rows})
        work.publish({"rows": shards * rows}, shards=shards)
    return str(out)


def photos(*uris: str) -> Photos:
    return Photos([artifact.require(uri, "ingest") for uri in uris])


def copies(uri: str) -> list[Path]:
    """Where the copies of an artifact's shards lie, if they are there."""
    _, manifest = artifact.require(uri, "ingest")
    return [cache.cache_folder() / f"{manifest.files[name].sha256}.arrow" for name in manifest.shards()]


def expected(*uris: str) -> list[tuple[str, str | None, bytes]]:
    """Rows that are no queries, read from the Parquet files themselves."""
    tables = [pq.read_table(path) for uri in uris for path in sorted(Path(uri).glob("shard-*.parquet"))]
    return [(r["name"], r["label"], r["bytes"]) for t in tables for r in t.to_pylist() if r["split"] != "query"]


def rows(photos: Photos) -> list[tuple[str, str | None, bytes]]:
    return [(photo.name, photo.label, bytes(photo.data)) for photo in photos]


def bound(monkeypatch: pytest.MonkeyPatch, size: float) -> int:
    monkeypatch.setenv("IIR_CACHE_GB", repr(size / 2**30))
    return int(size)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ reading


def test_rows_in_any_order_are_those_of_the_parquet_shards(tmp_path: Path) -> None:
    uris = make(tmp_path / "one", shards=3), make(tmp_path / "two", rows=1), make(tmp_path / "three", shards=2)
    assert pq.ParquetFile(Path(uris[0]) / "shard-00001.parquet").num_row_groups == 4
    got, want = photos(*uris), expected(*uris)
    assert len(got) == len(want) == 131
    for number in np.random.default_rng(0).permutation(len(want)):
        photo = got[number]
        assert (photo.name, photo.label, bytes(photo.data)) == want[number]
    assert rows(got) == want
    assert rows(photos(*uris)) == want  # from the copies
    with pytest.raises(IndexError):
        got[len(want)]
    assert got.labels == [label for _, label, _ in want]
    # One object a word: a million labels are a million pointers.
    assert len({id(label) for label in got.labels}) == 3


def test_an_artifact_of_queries_has_no_photos(tmp_path: Path) -> None:
    got = photos(make(tmp_path / "one", query=1))
    assert len(got) == 0
    assert got.labels == photos().labels == []
    with pytest.raises(IndexError):
        got[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the kernel's list of maps")
def test_bytes_of_a_row_are_a_view_of_the_map(tmp_path: Path) -> None:
    uri = make(tmp_path / "one", shards=2)
    got = photos(uri)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(tuple(path.name for path in copies(uri))):
            ranges.append([int(x, 16) for x in line.split()[0].split("-")])
            assert line.split()[1][:2] == "r-"  # nobody can write into a copy
    assert len(ranges) == 2
    before = pa.total_allocated_bytes()
    kept = [got[number] for number in range(len(got))]
    assert pa.total_allocated_bytes() == before
    for photo in kept:
        assert any(start <= photo.data.address <= end - photo.data.size for start, end in ranges)
    want = expected(uri)
    del got
    assert [bytes(photo.data) for photo in kept] == [data for _, _, data in want]  # a view keeps its map


def test_conversion_holds_one_row_group(tmp_path: Path) -> None:
    uri = make(tmp_path / "one", rows=120, row_bytes=200_000)
    parquet = pq.ParquetFile(Path(uri) / "shard-00000.parquet").metadata
    sizes = [parquet.row_group(number).total_byte_size for number in range(parquet.num_row_groups)]
    assert len(sizes) == 15
    script = (
        "import sys, pyarrow; from iir_dist import artifact; from iir_dist.data.cache import Photos\n"
        "Photos([artifact.require(sys.argv[1], 'ingest')]); print(pyarrow.default_memory_pool().max_memory())"
    )
    peak = int(subprocess.run([sys.executable, "-c", script, uri], capture_output=True, check=True).stdout)
    assert 0.9 * max(sizes) < peak < 1.1 * max(sizes)
    assert rows(photos(uri)) == expected(uri)


def test_pickled_photos_open_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, other = make(tmp_path / "one", shards=2), make(tmp_path / "other", shards=2)
    got = photos(uri)
    assert len(got.labels) == len(got)
    state = pickle.dumps(got)
    assert len(state) < 1000  # paths, whatever was read meanwhile
    script = (
        "import sys, pickle; photos = pickle.load(sys.stdin.buffer)\n"
        "print([(p.name, p.label, bytes(p.data)) for p in photos], flush=True); sys.stdin.read()"
    )
    size = sum(path.stat().st_size for path in copies(uri))
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(state)
        child.stdin.flush()
        assert child.stdout.readline().decode() == f"{expected(uri)}\n"
        del got
        # The other process has them open now, and only it.
        bound(monkeypatch, 1.5 * size)
        with pytest.raises(StorageError, match=f"{size:,} of them are in use"):
            photos(other)
        assert all(path.exists() for path in copies(uri))
    assert len(photos(other)) == 52
    with pytest.raises(StorageError, match="was evicted before this process opened it"):
        pickle.loads(state)  # noqa: S301


def test_a_broken_copy_is_named(tmp_path: Path) -> None:
    uri = make(tmp_path / "one")
    photos(uri)
    (path,) = copies(uri)
    for broken in (path.read_bytes()[:-100], b""):
        path.write_bytes(broken)
        with pytest.raises(CorruptError, match=f"{path.name} is no copy of a shard .*; delete it"):
            photos(uri)
    path.unlink()
    assert rows(photos(uri)) == expected(uri)


def test_a_copy_that_is_evicted_while_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make(tmp_path / "one")
    photos(uri)
    (path,) = copies(uri)
    flock, evicted = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if how == fcntl.LOCK_SH and not evicted:
            path.unlink()
            evicted.append(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    got = photos(uri)
    assert evicted == [path]
    assert rows(got) == expected(uri)
    assert path.exists()


# ------------------------------------------------------------------------------------------------ the bound


def test_the_least_recently_opened_copy_makes_room(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [make(tmp_path / name) for name in ("first", "second", "third", "new")]
    for age, uri in enumerate(uris[:3]):
        photos(uri)
        os.utime(copies(uri)[0], (1000 + age, 1000 + age))
    stranger = home / "mine.arrow"
    stranger.write_bytes(bytes(10**6))  # counts for nothing, and stays
    os.utime(stranger, (1, 1))
    photos(uris[0])  # the oldest is the youngest now
    allowed = bound(monkeypatch, 3.5 * copies(uris[0])[0].stat().st_size)
    assert rows(photos(uris[3])) == expected(uris[3])
    assert [copies(uri)[0].exists() for uri in uris] == [True, False, True, True]
    assert sum(copies(uri)[0].stat().st_size for uri in uris if copies(uri)[0].exists()) <= allowed
    assert stranger.exists()


def test_a_copy_in_use_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, idle, new = (make(tmp_path / name) for name in ("used", "idle", "new"))
    got = photos(used)
    photos(idle)
    os.utime(copies(used)[0], (1000, 1000))  # its turn would come first
    size = copies(used)[0].stat().st_size
    bound(monkeypatch, 2.5 * size)
    photos(new)
    assert [copies(uri)[0].exists() for uri in (used, idle, new)] == [True, False, True]
    bound(monkeypatch, 1.5 * size)
    photo = got[0]
    del got  # one view of a row is enough to hold its copy
    with pytest.raises(StorageError, match=rf"{size:,} of them are in use.* raise IIR_CACHE_GB to 1 or more"):
        photos(idle)
    assert bytes(photo.data) == expected(used)[0][2]
    del photo
    assert rows(photos(idle)) == expected(idle)
    assert not copies(used)[0].exists()


def test_what_is_there_is_kept_for_the_set_that_it_belongs_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, other = make(tmp_path / "one", shards=3), make(tmp_path / "other")
    photos(uri, other)
    for age, path in enumerate(copies(uri)):
        os.utime(path, (1000 + age, 1000 + age))  # older than the other one
    copies(uri)[0].unlink()
    bound(monkeypatch, 3.5 * copies(other)[0].stat().st_size)
    converted = []
    convert = cache._convert
    monkeypatch.setattr(cache, "_convert", lambda *paths: (converted.append(paths), convert(*paths)))
    assert rows(photos(uri)) == expected(uri)
    assert len(converted) == 1
    assert not copies(other)[0].exists()


def test_a_copy_larger_than_its_shard_stays_within_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, other = make(tmp_path / "one"), make(tmp_path / "other")
    photos(other)
    shard = (Path(uri) / "shard-00000.parquet").stat().st_size
    convert = cache._convert

    def padded(source: Path, target: Path) -> None:
        convert(source, target)
        with open(target, "r+b") as file:
            file.write(b"ARROW1".ljust(8, b"\0"))
            file.truncate(shard + 1)

    monkeypatch.setattr(cache, "_convert", padded)
    bound(monkeypatch, shard)
    with pytest.raises(StorageError, match=f"{shard + 1:,} bytes"):
        photos(uri)
    assert not copies(uri)[0].exists()


def test_a_set_beyond_the_bound_is_refused_before_anything_is_copied(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, uri = make(tmp_path / "kept"), make(tmp_path / "one", shards=3)
    photos(kept)
    size = sum(path.stat().st_size for path in Path(uri).glob("shard-*.parquet"))
    allowed = bound(monkeypatch, size - 1)
    with pytest.raises(
        StorageError,
        match=rf"{home} would have to hold {size:,} bytes and may hold {allowed:,}; "
        r"raise IIR_CACHE_GB to 1 or more, or point IIR_CACHE at a larger disk",
    ):
        photos(uri)
    assert files(home) == {".lock", copies(kept)[0].name}
    bound(monkeypatch, size)
    assert rows(photos(uri, uri)) == expected(uri, uri)  # twice the same costs once
    bound(monkeypatch, 1)
    assert rows(photos(uri)) == expected(uri)  # what is there is read, whatever the bound is now
    for wrong in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("IIR_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=f"IIR_CACHE_GB is '{wrong}'; expected a number"):
            photos(kept)


def test_without_a_bound_half_of_the_free_space_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, other = make(tmp_path / "one"), make(tmp_path / "other")
    photos(uri)
    size = copies(uri)[0].stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * size))
    assert cache.allowed_bytes(cache.cache_folder()) == 1.5 * size  # what the cache holds is as good as free
    photos(other)
    assert [copies(u)[0].exists() for u in (uri, other)] == [False, True]


# ------------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
def test_a_shard_that_is_not_as_it_was_written_leaves_nothing(tmp_path: Path, home: Path, harm: str) -> None:
    uri = make(tmp_path / "one", shards=2)
    path = Path(uri) / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flipped" else data[:-1])
    with pytest.raises(
        CorruptError, match=rf"shard-00001\.parquet {'is missing' if harm == 'missing' else 'has (other|[0-9]+ bytes)'}"
    ):
        photos(uri)
    assert files(home) == {".lock", copies(uri)[0].name}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to the device that is always full")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make(tmp_path / "one")

    def full(path: Any, mode: str) -> Any:
        if mode == "wb":
            open(path, mode).close()
            return open("/dev/full", mode)
        return open(path, mode)

    monkeypatch.setattr(cache, "open", full, raising=False)
    with pytest.raises(StorageError, match=f"no space left on the disk that holds {home}") as caught:
        photos(uri)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert files(home) == {".lock"}


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make(tmp_path / "one")
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("synced", os.fstat(descriptor).st_size))

    def renamed(source: Path, target: Path) -> None:
        events.append(("renamed", source.stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    photos(uri)
    size = copies(uri)[0].stat().st_size
    assert events == [("synced", size), ("renamed", size)]


FILLER = """
import fcntl, sys
import pyarrow.parquet as pq
from iir_dist import artifact
from iir_dist.data.cache import Photos

flock, read = fcntl.flock, pq.ParquetFile.read_row_group

def announced(file, how):
    if how == fcntl.LOCK_EX:
        print("lock", flush=True)
    flock(file, how)

def halting(self, group, *arguments, **options):
    if group == 2:
        print("half", flush=True)
        sys.stdin.readline()
    return read(self, group, *arguments, **options)

fcntl.flock, pq.ParquetFile.read_row_group = announced, halting
print([(p.name, p.label, bytes(p.data)) for p in Photos([artifact.require(sys.argv[1], "ingest")])], flush=True)
"""
"""Opens an artifact; says when it asks for the lock, and stops in the middle of a conversion until it gets a line."""


@contextlib.contextmanager
def filler(uri: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FILLER, uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_two_processes_one_fills_and_the_other_waits(tmp_path: Path, home: Path) -> None:
    uri = make(tmp_path / "one")
    with filler(uri) as first:
        assert [heard(first), heard(first)] == ["lock", "half"]
        with filler(uri) as second:
            assert heard(second) == "lock"
            assert first.stdin is not None
            first.stdin.write("\n")
            first.stdin.flush()
            assert heard(first) == str(expected(uri))
            assert heard(second) == str(expected(uri))  # without a half
            assert (first.wait(), second.wait()) == (0, 0)
    assert files(home) == {".lock", copies(uri)[0].name}


def test_a_fill_that_was_killed_is_done_again(tmp_path: Path, home: Path) -> None:
    uri = make(tmp_path / "one")
    with filler(uri) as process:
        assert [heard(process), heard(process)] == ["lock", "half"]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    temporary = home / f".{copies(uri)[0].name}.tmp"
    assert files(home) == {".lock", temporary.name}
    assert 0 < temporary.stat().st_size < ROWS * ROW_BYTES / 2
    other = make(tmp_path / "other")
    photos(other)  # any fill removes it
    assert files(home) == {".lock", copies(other)[0].name}
    assert rows(photos(uri)) == expected(uri)


@pytest.mark.s3
def test_a_remote_shard_is_downloaded_once(s3: str, tmp_path: Path, home: Path) -> None:
    from iir_dist.storage import s3_client

    local, uri = make(tmp_path / "one", shards=2), make(f"{s3}/{tmp_path.name}/one", shards=2)
    assert open_folder(uri).read("shard-00000.parquet") == (Path(local) / "shard-00000.parquet").read_bytes()
    asked: list[str] = []

    def count(request: Any, **_: Any) -> None:
        if request.method == "GET" and ".parquet" in request.url:
            asked.append(request.url.rpartition("/")[2])

    events = s3_client().meta.events
    events.register("before-send.s3", count)
    try:
        got = photos(uri)
        assert sorted(asked) == ["shard-00000.parquet", "shard-00001.parquet"]
        assert rows(got) == expected(local)
        assert len(photos(uri)) == len(got)
        assert len(asked) == 2
        path = copies(uri)[0]
        assert hashlib.sha256(path.read_bytes()).hexdigest() != path.stem  # the name is that of the source
    finally:
        events.unregister("before-send.s3", count)
