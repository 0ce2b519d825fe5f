"""One shard of an index, opened when it is first used: scan of its codes, and exact scores from its float16 vectors.

Every file is checked against its SHA-256 and then mapped into memory, codes too: opening costs the checksum and no copy.
What lies in an object store is fetched to the node's cache first.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Manifest, shard_name
from iir_dist.data.cache import allowed_bytes, cache_folder, filling, make_room
from iir_dist.errors import CorruptError, MismatchError
from iir_dist.index.train import transforms
from iir_dist.storage import Folder, LocalFolder
from iir_dist.storage.local import local_errors
from iir_dist.vectors import F32, I64, top_k

TEMPLATE, NAMES_FILE = "trained.faiss", "names.parquet"
VECTORS, VECTORS_SUFFIX = "vectors", ".f16"
IDS, IDS_SUFFIX = "ids", ".i64"
Bits = npt.NDArray[np.uint8]
"""A set of database rows: bit r % 8 of byte r // 8, lowest first."""
TIES = 2**20
"""Candidates that are held at a time for queries whose cut goes through equal scores."""
PAIRS = 4096
"""Vectors that are widened to float32 at a time when candidates are rescored."""


class Visit(NamedTuple):
    """Queries and the lists to visit for them, which are chosen once for all shards.

    xt: (nq, d') float32 queries after the index's transform. lists: (nq, nprobe) int64, -1 for none. coarse: (nq, nprobe)
    float32 scores of the queries with these lists' centroids.
    """

    xt: F32
    lists: I64
    coarse: F32

    def of(self, queries: slice | I64) -> Visit:
        """Of these queries only."""
        return Visit(self.xt[queries], self.lists[queries], self.coarse[queries])


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the manifest says of a shard.

    It holds `count` of the database rows [start, stop): all of them, or, where deleted ones were compacted away, those
    that the file `ids` lists (ascending little-endian int64, one for each row of the float16 vectors).
    """

    number: int
    start: int
    stop: int
    count: int
    template: str
    ids: str | None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files: codes, vectors, and the ids where there are some."""
        names = (shard_name(self.number, ".faiss"), shard_name(self.number, VECTORS_SUFFIX, VECTORS))
        return (*names, self.ids) if self.ids else names

    def entry(self) -> dict[str, Any]:
        """As one of `shards` in the manifest."""
        entry = {"number": self.number, "template": self.template, "rows": [self.start, self.stop]}
        return {**entry, "count": self.count, "ids": self.ids} if self.ids else entry


def shards_of(folder: Folder, manifest: Manifest) -> tuple[ShardInfo, ...]:
    """The shards of an index, by row.

    Raises:
        MismatchError: one comes from another template.
        CorruptError: the manifest was edited, or lists no file of a shard.
    """
    if artifact.content_fingerprint(manifest.stage, manifest.files) != manifest.fingerprint:
        raise CorruptError(
            f"{folder.address(artifact.MANIFEST)} was edited: its fingerprint does not follow from its files; "
            "build the index again with --force"
        )
    found = []
    for position, entry in enumerate(manifest.info["shards"]):
        start, stop = entry["rows"]
        shard = ShardInfo(
            entry.get("number", position), start, stop, entry.get("count", stop - start), entry["template"],
            entry.get("ids"),
        )  # fmt: skip
        if shard.template != manifest.info["template"]:
            raise MismatchError(
                f"{folder.address(shard.files[0])} was filled from template {shard.template[:12]}, the index's is "
                f"{manifest.info['template'][:12]}; scores of the two cannot be compared: build the index again"
            )
        missing = [name for name in shard.files if name not in manifest.files]
        if missing:
            raise CorruptError(f"{folder.address(artifact.MANIFEST)} does not list {missing[0]}; build the index again")
        found.append(shard)
    return tuple(sorted(found, key=lambda s: s.start))


# ------------------------------------------------------------------------------------------------ files


class Mapped(NamedTuple):
    """A local file and its bytes; a copy in the cache is in use for as long as anybody holds these."""

    path: str
    data: mmap.mmap


def fetch(folder: Folder, name: str, entry: FileEntry) -> Mapped:
    """A verified file of an index, mapped.

    A remote file is fetched once a node, to `IIR_CACHE`, under its SHA-256; a kernel lock that goes with the map keeps
    it from being evicted.

    Raises:
        CorruptError: it is missing or not the one that was written.
        StorageError: the cache may not hold it, beside what is in use.
    """
    if isinstance(folder, LocalFolder):
        artifact.check_file(folder, name, entry)
        with local_errors(folder.address(name)):
            return _map(folder.path / name, in_cache=False)
    cache = cache_folder()
    path = cache / (entry.sha256 + Path(name).suffix)
    with local_errors(str(cache)):
        cache.mkdir(parents=True, exist_ok=True)
        with filling(cache):
            with contextlib.suppress(CorruptError):  # gone, or the cache's disk lost a bit: it is fetched again
                artifact.check_file(LocalFolder(cache), path.name, entry)
                os.utime(path)
                return _map(path, in_cache=True)
            make_room(cache, entry.size, allowed_bytes(cache))
            temporary = path.with_name(f".{path.name}.tmp")
            with artifact.verified(folder, name, entry) as source:
                shutil.move(source, temporary)
            os.replace(temporary, path)
            return _map(path, in_cache=True)


def read_faiss(folder: Folder, name: str, entry: FileEntry, flags: int = 0) -> tuple[Any, Mapped]:
    """A verified faiss index, and its file, which has to be held for as long as `flags` keep the index mapped.

    Raises:
        CorruptError: as `fetch`, or faiss cannot read it.
    """
    import faiss

    file = fetch(folder, name, entry)
    try:
        return faiss.read_index(file.path, flags), file
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CorruptError(
            f"{folder.address(name)} cannot be read by faiss {faiss.__version__} ({reason}); update faiss, or build the "
            "index again"
        ) from error


def write_faiss(index: Any, path: Path) -> None:
    """Write a faiss index. faiss itself, given a path, does not notice that the disk is full."""
    import faiss

    with open(path, "wb") as file:
        writer: Any = faiss.PyCallbackIOWriter  # type: ignore[attr-defined]
        faiss.write_index(index, writer(file.write))


def _map(path: Path, *, in_cache: bool) -> Mapped:
    with open(path, "rb") as file:
        if in_cache:
            fcntl.flock(file, fcntl.LOCK_SH)  # the map's duplicate of the descriptor keeps it
        return Mapped(str(path), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# ------------------------------------------------------------------------------------------------ shard


class Shard:
    """A shard of an index; safe to use from several threads.

    Its methods raise `CorruptError` where a file is missing or not the one that was written.
    """

    def __init__(self, folder: Folder, info: ShardInfo, dim: int, files: Mapping[str, FileEntry]) -> None:
        self.folder, self.info, self.dim = folder, info, dim
        self.entries = {name: files[name] for name in info.files}
        self._index: Any = None
        self._ivf: Any = None
        self._vectors: npt.NDArray[np.float16] | None = None
        self._ids: I64 | None = None
        self._codes: Mapped | None = None
        self._lock = threading.Lock()

    def open_codes(self) -> Any:
        """The faiss index, verified and mapped."""
        with self._lock:
            if self._index is None:
                import faiss

                name = self.info.files[0]
                # A flipped byte in a faiss file loads without complaint and answers wrongly.
                index, codes = read_faiss(self.folder, name, self.entries[name], faiss.IO_FLAG_MMAP_IFC)
                if index.ntotal != self.info.count:
                    raise CorruptError(
                        f"{self.folder.address(name)} holds {index.ntotal} vectors, its manifest says {self.info.count}"
                    )
                self._codes, self._index, self._ivf = codes, index, faiss.extract_index_ivf(index)
        return self._index

    def open_vectors(self) -> npt.NDArray[np.float16]:
        """The float16 vectors (count, d), verified and mapped."""
        with self._lock:
            if self._vectors is None:
                _, name, *ids = self.info.files
                if ids:
                    self._ids = self._map(ids[0], "<i8", (self.info.count,))
                self._vectors = self._map(name, "<f2", (self.info.count, self.dim))
        return self._vectors

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        data = fetch(self.folder, name, self.entries[name]).data
        expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if len(data) != expected:
            raise CorruptError(
                f"{self.folder.address(name)} has {len(data)} bytes, expected {expected} for {shape} of {dtype}"
            )
        return np.frombuffer(data, dtype).reshape(shape)

    def rows(self) -> I64:
        """The database rows that it holds, ascending."""
        self.open_vectors()
        return np.arange(self.info.start, self.info.stop) if self._ids is None else np.array(self._ids)

    def scan(self, visit: Visit, k: int, allowed: Bits | None) -> tuple[F32, I64]:
        """The best k by code.

        Args:
            visit: queries and lists to visit, chosen once for all shards.
            allowed: the only rows that may be returned; None for all.

        Returns:
            scores and database rows, (nq, k), or fewer columns where the shard has fewer rows; best first, equal scores
            by row; row -1 and score -inf where there are fewer.
        """
        if self._ivf is None:
            self.open_codes()
        # Which of equal scores faiss returns at its cut depends on where they lie, so it is asked for more, until the
        # score of the last is below that of the k-th. Exact duplicates and coarse codes make such ties.
        asked = min(k + 8 + k // 32, self.info.count)
        scores, rows = self._scan(visit, asked, allowed)
        tied = np.flatnonzero(_tied(scores, rows, k)) if asked < self.info.count else np.empty(0, np.int64)
        while len(tied):
            asked = min(2 * asked, self.info.count)
            left = [tied[:0]]
            for part in np.array_split(tied, min(len(tied), -(-len(tied) * asked // TIES))):
                more, of = self._scan(visit.of(part), asked, allowed)
                open_ = _tied(more, of, k) & (asked < self.info.count)
                left.append(part[open_])
                done = part[~open_]
                scores[done], rows[done] = -np.inf, -1
                scores[done, :k], rows[done, :k] = top_k(more[~open_], of[~open_], k, larger_is_better=True)
            tied = np.concatenate(left)
        return top_k(scores, rows, k, larger_is_better=True)

    def _scan(self, visit: Visit, k: int, allowed: Bits | None) -> tuple[F32, I64]:
        """The best k as faiss finds them; arrays must be contiguous."""
        import faiss

        xt, lists, coarse = visit
        params: Any = faiss.SearchParametersIVF()
        params.nprobe = lists.shape[1]
        if allowed is not None:
            selector = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(allowed))  # lives until the call is over
            params.sel = selector
        scores, rows = np.empty((len(xt), k), np.float32), np.empty((len(xt), k), np.int64)
        # Not faiss's Python method, which takes no parameters; and without them two threads would share nprobe.
        self._ivf.search_preassigned_c(
            len(xt), faiss.swig_ptr(xt), k, faiss.swig_ptr(lists), faiss.swig_ptr(coarse), faiss.swig_ptr(scores),
            faiss.swig_ptr(rows), False, params,
        )  # fmt: skip
        return scores, rows

    def rescore(self, xq: F32, rows: I64, out: F32) -> None:
        """Write inner products with the float16 vectors to `out` where the candidate lies in this shard.

        Args:
            xq: (nq, d) queries as embedded.
            rows: (nq, m) database rows, of any shard; -1 for none.
            out: (nq, m) float32.
        """
        query, place = np.nonzero((rows >= self.info.start) & (rows < self.info.stop))
        if not len(query):
            return
        vectors = self.open_vectors() if self._vectors is None else self._vectors
        wanted = rows[query, place]
        at = wanted - self.info.start if self._ids is None else np.searchsorted(self._ids, wanted)
        for first in range(0, len(query), PAIRS):
            part = slice(first, first + PAIRS)
            x = vectors[at[part]].astype(np.float32)
            # einsum sums each pair in the same order whatever is beside it; a matrix product does not.
            out[query[part], place[part]] = np.einsum("pd,pd->p", x, xq[query[part]])


def _tied(scores: F32, rows: I64, k: int) -> npt.NDArray[np.bool_]:
    """(nq,) whether the last of the scores that were asked for equals the k-th, so that there may be more of them."""
    return np.asarray((scores[:, -1] == scores[:, k - 1]) & (rows[:, -1] >= 0))


def stored_vectors(shards: Iterable[Shard], rows: I64, dim: int) -> tuple[F32, int]:
    """The float16 vectors (m, d) of distinct database rows, ascending, widened; and how many of the rows have none.

    Raises:
        CorruptError: a file is missing or not the one that was written.
    """
    out, left = np.empty((len(rows), dim), np.float32), len(rows)
    for shard in shards:
        low, high = np.searchsorted(rows, [shard.info.start, shard.info.stop])
        if low == high:
            continue
        vectors, mine = shard.open_vectors(), rows[low:high]
        at = mine - shard.info.start
        if shard.info.ids is not None:
            there = shard.rows()
            at = np.minimum(np.searchsorted(there, mine), len(there) - 1)
            mine = mine[there[at] == mine]
        left -= len(mine)
        out[low:high] = vectors[at]
    return out, left


def write_kept(shard: Shard, dead: I64, path: Path) -> None:
    """Write the faiss index of a shard without the rows `dead`; it is read into memory."""
    name = shard.info.files[0]
    index, _ = read_faiss(shard.folder, name, shard.entries[name])
    index.remove_ids(dead)
    write_faiss(index, path)


def thread_pool(threads: int) -> ThreadPoolExecutor | None:
    """Threads that search; None where one is enough."""
    import faiss

    # They are the parallelism: faiss's own threads inside each of them would only compete.
    return ThreadPoolExecutor(threads, "iir-search", faiss.omp_set_num_threads, (1,)) if threads > 1 else None


class Coarse:
    """The template: transforms queries and assigns them to lists, once for all shards."""

    def __init__(self, folder: Folder, entry: FileEntry) -> None:
        import faiss

        self.index = read_faiss(folder, TEMPLATE, entry)[0]
        self._transforms = transforms(self.index)
        self._quantizer: Any = faiss.downcast_index(faiss.extract_index_ivf(self.index).quantizer)

    def assign(self, xq: F32, nprobe: int) -> Visit:
        """What to visit for queries (nq, d): the nprobe nearest lists."""
        xt = xq
        for transform in self._transforms:
            xt = transform.apply(xt)
        coarse, lists = self._quantizer.search(xt, nprobe)
        return Visit(xt, lists, coarse)
