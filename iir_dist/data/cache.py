"""A node's own copies of what lies in a store, memory-mapped; above all of images, for random access to their rows.

Parquet is read from front to back; training reads rows in any order. Each shard is converted once, a row group at a
time, to uncompressed Arrow IPC in a file named by the shard's SHA-256, so a copy can never belong to other data. The
bytes of a row are a view of the map; the first copy is the decoder's. Files of an index are copied as they are.

The cache lies in `IIR_CACHE` and holds `IIR_CACHE_GB` at most: what was opened least recently makes room. Kernel
locks, which go with their process however it ends, keep the processes of a node apart:

* `.lock`, exclusive: one process at a time fills and evicts; the others wait, and find what it made.
* each copy, shared: held by whoever has it open. Only what nobody has open is evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import mmap
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Manifest
from iir_dist.errors import ConfigError, CorruptError, MismatchError, StorageError
from iir_dist.storage import Folder
from iir_dist.storage.local import local_errors

SCHEMA = pa.schema([("name", pa.string()), ("label", pa.string()), ("split", pa.string()), ("bytes", pa.binary())])
GB = 2**30
_COPY = re.compile(r"[0-9a-f]{64}\.[a-z0-9]+")
"""Other files in the folder are not ours to evict."""


def cache_folder() -> Path:
    """`$IIR_CACHE`, else the user's cache directory."""
    base = os.environ.get("IIR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "iir_dist"
    return Path(base).expanduser().absolute()


def allowed_bytes(cache: Path) -> float:
    """What all copies may take: `$IIR_CACHE_GB` times 2**30, else half of the disk's free space at the time of a fill.

    What the cache holds already counts as free here; else its bound would shrink as it fills.
    """
    text = os.environ.get("IIR_CACHE_GB", "")
    if not text:
        return (shutil.disk_usage(cache).free + sum(size for _, size, _ in _copies(cache))) / 2
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise ConfigError(f"IIR_CACHE_GB is {text!r}; expected a number of GB above 0, such as 200")
    return number * GB


@contextlib.contextmanager
def filling(cache: Path) -> Iterator[None]:
    """Hold the cache's lock: one process of a node fills and evicts at a time, the others wait."""
    with open(cache / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(".*.tmp"):  # we hold the lock, so whoever wrote it was killed
            left.unlink()
        yield


def fill(folder: Folder, shard: str, entry: FileEntry, path: Path, allowed: float) -> list[Any]:
    """Copy one shard to `path` and open the copy; where another process is doing so, wait for it."""
    with filling(path.parent):
        batches = _open(path)
        if batches is not None:  # made by another process while we waited
            return batches
        make_room(path.parent, entry.size, allowed)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with artifact.verified(folder, shard, entry) as source:
                _convert(source, temporary)
            make_room(path.parent, temporary.stat().st_size, allowed)  # the copy may be larger than the shard
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return _open(path) or []  # inside the block, so that nobody evicts it first


def _convert(source: Path, target: Path) -> None:
    # Mapped and without pre-buffering, reading holds the one row group that was asked for. Its batches are written as
    # they come: where bytes exceed what 32-bit offsets can address, reading has already cut them.
    with pq.ParquetFile(source, memory_map=True, pre_buffer=False) as parquet, open(target, "wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for group in range(parquet.num_row_groups):
                writer.write_table(parquet.read_row_group(group, SCHEMA.names, use_threads=False).cast(SCHEMA))
        file.flush()
        os.fsync(file.fileno())  # before the rename, so that a power cut leaves no half copy under the final name


def _copies(cache: Path) -> list[tuple[int, int, Path]]:
    """(time of the last opening, bytes, path) of every copy, least recently used first."""
    found = [(path.stat(), path) for path in cache.iterdir() if _COPY.fullmatch(path.name)]
    return sorted((stat.st_mtime_ns, stat.st_size, path) for stat, path in found)


def make_room(cache: Path, size: int, allowed: float) -> None:
    """Evict until `size` more bytes fit; the caller holds the cache's lock (`filling`).

    Raises:
        StorageError: what is in use leaves too little.
    """
    copies = _copies(cache)
    used = sum(length for _, length, _ in copies)
    for _, length, path in copies:
        if used + size <= allowed:
            break
        with open(path, "rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            used -= length
    if used + size > allowed:
        raise _too_small(cache, used + size, allowed, f" ({used:,} of them are in use)")


def _too_small(cache: Path, needed: int, allowed: float, detail: str = "") -> StorageError:
    return StorageError(
        f"the cache {cache} would have to hold {needed:,} bytes{detail} and may hold {allowed:,.0f}; "
        f"raise IIR_CACHE_GB to {math.ceil(needed / GB)} or more, or point IIR_CACHE at a larger disk"
    )


def _open(path: Path) -> list[Any] | None:
    """The record batches of a copy, views of its map; None where there is none.

    The map's duplicate of the descriptor keeps the lock: the copy is in use for as long as anybody holds a view.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if not os.fstat(file.fileno()).st_nlink:  # evicted between our open and our lock
                return None
            with contextlib.suppress(OSError):  # another user's, or on a read-only mount: it only seems older
                os.utime(file.fileno())  # many mounts keep no time of reads
            reader = pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except FileNotFoundError:
        return None
    except ValueError as error:  # of mmap (empty) and of Arrow
        raise CorruptError(f"{path} is no copy of a shard ({error}); delete it, it will be made again") from error


@dataclass(frozen=True, slots=True)
class Photo:
    """One stored photo; `data` is a view (`pyarrow.Buffer`) of its bytes in the map, good for as long as it is held."""

    name: str
    label: str | None
    data: pa.Buffer


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """A shard that is not opened here, and how many photos are numbered in it."""

    address: str
    count: int


class Photos:
    """Rows of one or more images artifacts, by number; queries are left out. Pickled as paths, opened in each process.

    Args:
        counts, only: photos of every shard (`data.parts.photo_counts`), and the numbers of the shards to open, both over
            all sources. Only these are copied; photos keep the numbers that they have among all. None: all are opened.

    Raises:
        CorruptError: a shard is not what its manifest says.
        MismatchError: `counts` are of other artifacts.
        StorageError: the disk is full, or the shards and what other processes have open exceed `allowed_bytes`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Folder, Manifest]],
        counts: Sequence[int] | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        cache = cache_folder()
        every = [(folder, name, manifest.files[name]) for folder, manifest in sources for name in manifest.shards()]
        shards: list[Path | _Elsewhere] = [cache / f"{entry.sha256}.arrow" for _, _, entry in every]
        if only is not None:
            if counts is None or len(counts) != len(every):
                given = "no counts" if counts is None else f"counts of {len(counts)} shards"
                raise MismatchError(f"{given} for images in {len(every)} shards; they changed meanwhile, run it again")
            for number in set(range(len(every))).difference(only):
                folder, name, _ = every[number]
                shards[number] = _Elsewhere(folder.address(name), counts[number])
        todo = {path: shard for path, shard in zip(shards, every, strict=True) if isinstance(path, Path)}
        with local_errors(str(cache)):
            cache.mkdir(parents=True, exist_ok=True)
            # First what is there: once open, it is not evicted to make room for what is not.
            opened = {path: _open(path) for path in todo}
            missing = [path for path, batches in opened.items() if batches is None]
            allowed = allowed_bytes(cache)  # once, because downloads and temporaries take of the free space
            needed = sum(entry.size for _, _, entry in todo.values())
            if missing and needed > allowed:
                raise _too_small(cache, needed, allowed)
            for path in missing:
                opened[path] = fill(*todo[path], path, allowed)
        self._index(shards, opened)

    def _index(self, shards: list[Path | _Elsewhere], opened: dict[Path, list[Any] | None]) -> None:
        self._shards = shards
        self._batches: list[Any] = []
        numbered, first = [np.zeros(0, np.int64)], 0  # of each shard; -1 for a photo that is not here
        for shard in shards:
            if isinstance(shard, _Elsewhere):
                numbered.append(np.full(shard.count, -1))
                continue
            batches = opened[shard] or []
            split = pa.chunked_array([batch.column("split") for batch in batches], pa.string())
            numbered.append(first + np.flatnonzero(pc.not_equal(split, "query").to_numpy()))
            self._batches += batches
            first += len(split)
        self.counts: list[int] = [len(rows) for rows in numbered[1:]]
        """Photos of every shard, opened or not."""
        self._rows = np.concatenate(numbered)
        self._starts = np.cumsum([0, *map(len, self._batches)]).tolist()  # a list: bisect is faster there

    def _column(self, name: str) -> Any:
        return pa.chunked_array([batch.column(name) for batch in self._batches], pa.string())

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self._shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {shard: _open(shard) for shard in state["shards"] if isinstance(shard, Path)}
        gone = [path for path, batches in opened.items() if batches is None]
        if gone:
            raise StorageError(f"{gone[0]} was evicted before this process opened it; run the same command again")
        self._index(state["shards"], opened)

    @functools.cached_property
    def labels(self) -> list[str | None]:
        """Of all photos; equal labels are one object, so that a million photos cost a million pointers.

        Raises:
            StorageError: not all shards are opened.
        """
        if (self._rows < 0).any():
            raise StorageError(f"the label of {self.name(int(self._rows.argmin()))} is not here; open all shards")
        encoded = self._column("label").dictionary_encode(null_encoding="encode").combine_chunks()
        words = encoded.dictionary.to_numpy(zero_copy_only=False)
        found: list[str | None] = words[encoded.indices.to_numpy()[self._rows]].tolist()
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, number: int) -> str:
        """The photo's name; where its shard is not opened, its place."""
        number = range(len(self))[number]
        if self._rows[number] >= 0:
            return self[number].name
        starts = np.cumsum([0, *self.counts]).tolist()
        at = bisect_right(starts, number) - 1
        shard = self._shards[at]
        assert isinstance(shard, _Elsewhere)
        return f"photo {number} (number {number - starts[at]} of {shard.address})"

    def __getitem__(self, number: int) -> Photo:
        """Raises `StorageError` where the photo's shard is not opened."""
        row = int(self._rows[number])
        if row < 0:
            raise StorageError(f"{self.name(number)} is not here; open that shard too")
        at = bisect_right(self._starts, row) - 1
        batch, row = self._batches[at], row - self._starts[at]
        # Not batch.column("bytes")[row]: a scalar of Arrow is a copy.
        _, offsets, data = batch.column("bytes").buffers()
        start, stop = np.frombuffer(offsets, np.int32, 2, 4 * row).tolist()
        return Photo(
            batch.column("name")[row].as_py(), batch.column("label")[row].as_py(), data.slice(start, stop - start)
        )
