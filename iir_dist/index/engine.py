"""An opened index. In one process it needs no Ray; `fanout` puts actors behind the same search.

The coarse assignment is made once for each query; shards scan their codes; the best refine * k of all shards together
are rescored from float16 vectors. Candidates are cut after the merge and not in each shard, and equal scores are
ordered by row, so N shards give what one would.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, Manifest, read_manifest
from iir_dist.errors import (
    ConfigError,
    CorruptError,
    IirError,
    InputError,
    MismatchError,
    NotFoundError,
    StorageError,
)
from iir_dist.index.merge import Lists, gather
from iir_dist.index.rows import read_names, read_tombstones
from iir_dist.index.shard import TEMPLATE, Bits, Coarse, Shard, ShardInfo, Visit, shards_of, thread_pool
from iir_dist.storage import Folder
from iir_dist.vectors import F32, I64, top_k

log = logging.getLogger(__name__)

CANDIDATES = 2**20
"""Candidates that a thread holds at a time for each shard; bounds the memory of deep lists."""
QUERIES = 1024
"""That a thread searches for at a time: queries that visit a list together scan it faster."""
GONE = (CorruptError, NotFoundError)
"""Errors of a file that a change of the index may have removed."""
R = TypeVar("R")
Live = Mapping[int, int]
"""Numbers of the shards to search, and how many of their rows are allowed."""


class Lost(IirError):
    """Some shards cannot be searched, and why; what a backend raises, and what `Index` acts on."""

    def __init__(self, numbers: Iterable[int], error: IirError) -> None:
        super().__init__(str(error))
        self.numbers, self.error = frozenset(numbers), error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.numbers, self.error)


class Backend(Protocol):
    """Where shards are searched; every method raises `Lost`."""

    threads: int
    """Calls that it can serve at a time."""

    def open(self, numbers: Iterable[int], vectors: bool) -> None:
        """Verify and open shards before their first use."""

    def scan(self, visit: Visit, k: int, live: Live, allowed: Bits, alone: bool) -> Lists:
        """The best k by code of all live shards, (nq, at most k). `alone`: no other call is under way."""

    def rescore(self, xq: F32, rows: I64, numbers: Iterable[int]) -> F32:
        """Exact scores of candidates (nq, m); -inf where the row is -1 or lies in none of these shards."""

    def close(self) -> None:
        """Let go of threads and processes."""


class Shards:
    """Shards in this process: the backend of an index that is searched here, and what a searching actor is."""

    def __init__(
        self, folder: Folder, infos: Iterable[ShardInfo], dim: int, files: Mapping[str, FileEntry], threads: int
    ) -> None:
        self.shards = {info.number: Shard(folder, info, dim, files) for info in infos}
        self.threads = threads
        self._pool = thread_pool(threads)

    def open(self, numbers: Iterable[int], vectors: bool) -> None:
        """Verify and map the codes, and the vectors where they are wanted."""

        def one(shard: Shard) -> None:
            shard.open_codes()
            if vectors:
                shard.open_vectors()

        self._run([self.shards[n] for n in numbers], one, alone=True)

    def scan(self, visit: Visit, k: int, live: Live, allowed: Bits | None, alone: bool) -> Lists:
        """The best k by code of the live shards; all their rows are allowed where `allowed` is None."""

        def ask(queries: slice | I64, depths: Mapping[int, int]) -> list[Lists]:
            part = visit.of(queries)

            def one(shard: Shard) -> Lists:
                number = shard.info.number
                return shard.scan(part, depths[number], allowed if live[number] < shard.info.count else None)

            return self._run([self.shards[n] for n in depths], one, alone)

        return gather(ask, live, k)

    def rescore(self, xq: F32, rows: I64, numbers: Iterable[int]) -> F32:
        """Exact scores of the candidates in these shards, -inf elsewhere."""
        out = np.full(rows.shape, -np.inf, np.float32)
        self._run([self.shards[n] for n in numbers], lambda s: s.rescore(xq, rows, out), alone=False)
        return out

    def close(self) -> None:
        """Stop the threads; files close when nothing refers to them any more."""
        if self._pool is not None:
            self._pool.shutdown()

    def _run(self, shards: list[Shard], work: Callable[[Shard], R], alone: bool) -> list[R]:
        def one(shard: Shard) -> R:
            try:
                return work(shard)
            except (CorruptError, StorageError) as error:
                raise Lost([shard.info.number], error) from error

        several = alone and self._pool is not None and len(shards) > 1
        return list(self._pool.map(one, shards) if several and self._pool else map(one, shards))


class Index:
    """An index, opened for search. Shards are verified and mapped before their first use.

    Args:
        backend: where its shards are searched.
        verify: check every file now, and not each before its first use.
        allow_partial: answer without shards that are lost, and say so, instead of raising.

    Raises:
        CorruptError: the template or the tombstones or, with `verify`, any file is missing or not the one that was
            written (of a shard: unless `allow_partial`).
        MismatchError: a shard comes from another template, or the index was changed meanwhile.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        backend: Backend,
        *,
        verify: bool = False,
        allow_partial: bool = False,
    ) -> None:
        info = manifest.info
        self.folder, self.manifest, self.backend, self.allow_partial = folder, manifest, backend, allow_partial
        self.shards = shards_of(folder, manifest)
        self.dim, self.num_rows, self.nlist = int(info["dim"]), manifest.counts["rows"], int(info["nlist"])
        self.lost: set[int] = set()
        self._opened: dict[bool, set[int]] = {False: set(), True: set()}
        self._pool = thread_pool(backend.threads)
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            with self._reading():
                self._coarse = Coarse(folder, manifest.files[TEMPLATE])
                alive = np.ones(self.num_rows, bool)
                alive[read_tombstones(folder, manifest)] = False
            self._alive = np.packbits(alive, bitorder="little")
            self._everything = self._live(self._alive)
            if verify:
                self._verify()
            failed.pop_all()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop its threads and actors; files close when nothing refers to them any more."""
        if self._pool is not None:
            self._pool.shutdown()
        self.backend.close()

    @functools.cached_property
    def names(self) -> pa.Table:
        """Id, name, split and source of every database row, deleted ones too; read at its first use."""
        with self._reading():
            return read_names(self.folder, self.manifest)

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """(rows,) whether each row was not deleted."""
        return np.unpackbits(self._alive, count=self.num_rows, bitorder="little").view(bool)

    @property
    def missing(self) -> list[list[int]]:
        """[start, stop) of the database rows of lost shards; empty unless `allow_partial`."""
        return [[s.start, s.stop] for s in self.shards if s.number in self.lost]

    def _verify(self) -> None:
        of_shards = {name for shard in self.shards for name in shard.files}
        with self._reading():
            for name, entry in self.manifest.files.items():
                if name not in of_shards:
                    artifact.check_file(self.folder, name, entry)
        while todo := {shard.number: False for shard in self.shards if shard.number not in self.lost}:
            try:
                self._open(todo, vectors=True)
                break
            except Lost as lost:
                self._lose(lost)

    def search(
        self,
        xq: F32,
        k: int,
        nprobe: int | None = None,
        refine: int | None = None,
        allowed: npt.NDArray[Any] | None = None,
    ) -> tuple[F32, I64]:
        """The k best rows for each query; inner product, larger is better.

        Args:
            xq: (nq, d) float32 queries.
            nprobe: lists visited; the index's own where None.
            refine: the best refine * k by code are rescored from float16 vectors, 0 keeps the codes' scores; the
                index's own where None.
            allowed: the only rows that may be returned: row numbers, or (rows of the index,) bool. Not more of them
                than refine * k are rescored all, whichever lists they lie in. Deleted rows are never returned.

        Returns:
            scores (nq, k) float32 and database rows (nq, k) int64, best first, equal scores by row; row -1 and score
            -inf where there are fewer.

        Raises:
            ConfigError: nprobe or k is out of range.
            InputError: the queries have another dimension, or `allowed` names no row of the index.
            CorruptError, StorageError, IirError: a shard is lost, and not `allow_partial`.
        """
        info = self.manifest.info
        nprobe = int(info["nprobe"]) if nprobe is None else nprobe
        refine = int(info["refine"]) if refine is None else refine
        if not 1 <= nprobe <= self.nlist:
            raise ConfigError(f"search.nprobe = {nprobe}: the index has {self.nlist} lists; expected 1 to {self.nlist}")
        if k < 1 or refine < 0:
            raise ConfigError(f"search.k = {k}, search.refine = {refine}: expected at least 1 and 0")
        xq = np.ascontiguousarray(xq, np.float32)
        if xq.ndim != 2 or xq.shape[1] != self.dim:
            raise InputError(f"queries of shape {xq.shape}; the index holds vectors of dimension {self.dim}")
        bits, rows = (self._alive, None) if allowed is None else self._bits(allowed)
        live = self._everything if allowed is None else self._live(bits)
        if rows is not None and not (refine and len(rows) <= refine * k):
            rows = None
        while True:
            left = {n: count for n, count in live.items() if n not in self.lost}
            try:
                return self._search(xq, k, nprobe, refine, left, bits, rows)
            except Lost as lost:
                self._lose(lost)

    def _search(
        self, xq: F32, k: int, nprobe: int, refine: int, live: Live, bits: Bits, candidates: I64 | None
    ) -> tuple[F32, I64]:
        depth = min(k * max(1, refine), self.num_rows)
        self._open(live, refine > 0)
        if not live or not len(xq):
            return np.full((len(xq), k), -np.inf, np.float32), np.full((len(xq), k), -1)
        visit = self._coarse.assign(xq, nprobe) if candidates is None else None
        parts = self._slices(len(xq), depth)
        scores, rows = np.empty((len(xq), k), np.float32), np.empty((len(xq), k), np.int64)

        def answer(part: slice) -> None:
            if candidates is None:
                assert visit is not None
                best, found = self.backend.scan(visit.of(part), depth, live, bits, alone=len(parts) == 1)
            else:
                found = np.broadcast_to(candidates, (part.stop - part.start, len(candidates)))
            if refine:
                exact = self.backend.rescore(xq[part], found, live)
                found = np.where(np.isneginf(exact), -1, found)  # of a lost shard
                best, found = top_k(exact, found, k, larger_is_better=True)
            m = found.shape[1]
            scores[part, :m], rows[part, :m] = best, found
            scores[part, m:], rows[part, m:] = -np.inf, -1

        if len(parts) > 1 and self._pool is not None:
            list(self._pool.map(answer, parts))
        else:
            for part in parts:
                answer(part)
        return scores, rows

    def _slices(self, nq: int, depth: int) -> list[slice]:
        size = max(1, min(-(-nq // self.backend.threads), QUERIES, CANDIDATES // depth))
        return [slice(start, min(start + size, nq)) for start in range(0, nq, size)]

    def _open(self, live: Live, vectors: bool) -> None:
        todo = set(live) - self._opened[vectors]
        if todo:
            self.backend.open(sorted(todo), vectors)
            self._opened[vectors] |= todo

    def _lose(self, lost: Lost) -> None:
        """Go on without shards, or raise what is wrong with them."""
        if isinstance(lost.error, GONE):
            self._check_unchanged(lost.error)
        if not self.allow_partial:
            raise lost.error
        self.lost |= lost.numbers
        gone = ", ".join(f"{s.start} to {s.stop - 1}" for s in self.shards if s.number in lost.numbers)
        log.warning("search: answers lack the database rows %s: %s", gone, lost.error)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell files that are gone because the index was changed from files that are damaged."""
        try:
            yield
        except GONE as error:
            self._check_unchanged(error)
            raise

    def _check_unchanged(self, error: IirError) -> None:
        now = read_manifest(self.folder)
        if now is None or now.fingerprint != self.manifest.fingerprint:
            raise MismatchError(
                f"{self.folder.uri} was changed since it was opened, and files of that time are gone; open it again"
            ) from error

    def _bits(self, allowed: npt.NDArray[Any]) -> tuple[Bits, I64]:
        """The allowed rows that are alive, as bits and as numbers."""
        allowed = np.asarray(allowed)
        mask = np.zeros(self.num_rows, bool)
        if allowed.dtype == bool and allowed.shape == mask.shape:
            mask = allowed
        elif allowed.dtype.kind in "iu" and allowed.ndim == 1:
            if len(allowed) and not 0 <= allowed.min() <= allowed.max() < self.num_rows:
                raise InputError(
                    f"allowed rows from {allowed.min()} to {allowed.max()}; the index has rows 0 to {self.num_rows - 1}"
                )
            mask[allowed] = True
        else:
            raise InputError(
                f"allowed rows of type {allowed.dtype} and shape {allowed.shape}; expected row numbers, or "
                f"({self.num_rows},) bool"
            )
        bits = np.packbits(mask, bitorder="little") & self._alive
        return bits, np.flatnonzero(np.unpackbits(bits, count=self.num_rows, bitorder="little"))

    def _live(self, bits: Bits) -> dict[int, int]:
        """The shards that hold some of these rows, and how many."""
        counts = {}
        for shard in self.shards:
            around = np.unpackbits(bits[shard.start // 8 : -(-shard.stop // 8)], bitorder="little")
            counts[shard.number] = int(around[shard.start % 8 :][: shard.stop - shard.start].sum(dtype=np.int64))
        return {number: count for number, count in counts.items() if count}


def open_index(
    uri: str | Path, *, verify: bool = False, allow_partial: bool = False, threads: int | None = None
) -> Index:
    """Open an index for search in this process.

    Args:
        verify, allow_partial: as of `Index`.
        threads: all cores that this process may use where None.

    Raises:
        InputError: there is no finished index.
        CorruptError, MismatchError: as of `Index`.
    """
    folder, manifest = artifact.require(uri, "index")
    return opened(folder, manifest, verify=verify, allow_partial=allow_partial, threads=threads)


def opened(
    folder: Folder,
    manifest: Manifest,
    *,
    verify: bool = False,
    allow_partial: bool = False,
    threads: int | None = None,
) -> Index:
    """As `open_index`, of this manifest."""
    infos = shards_of(folder, manifest)
    backend = Shards(folder, infos, int(manifest.info["dim"]), manifest.files, threads or session.cpu_count())
    return Index(folder, manifest, backend, verify=verify, allow_partial=allow_partial)
