"""Where re-ranking has vectors from, and where it searches again: an index, or embeddings; never all of it in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from iir_dist.data.collection import Collection
from iir_dist.errors import InputError
from iir_dist.index.engine import Index
from iir_dist.index.exact import Exact, Mask
from iir_dist.index.shard import Shard, stored_vectors
from iir_dist.rerank.interface import FETCHED
from iir_dist.vectors import F32, I64


class IndexSource:
    """An index: its float16 vectors, and its search. Vectors are read by this process, whoever searches.

    Args:
        nprobe, refine, allowed: of `Index.search`.
    """

    def __init__(
        self, index: Index, nprobe: int | None = None, refine: int | None = None, allowed: Mask | None = None
    ) -> None:
        self.index, self.nprobe, self.refine, self.allowed = index, nprobe, refine, allowed
        self.shards = [Shard(index.folder, info, index.dim, index.manifest.files) for info in index.shards]

    @property
    def missing(self) -> list[list[int]]:
        """As `Index.missing`."""
        return self.index.missing

    def fetch(self, rows: I64) -> F32:
        """Vectors (m, d) of distinct rows, ascending.

        Raises:
            InputError: the index has no such row, or it was compacted away.
            CorruptError: the vectors are not those that were written.
        """
        out, left = stored_vectors(self.shards, rows, self.index.dim)
        if left:
            raise InputError(f"{self.index.folder.uri} has no vectors of {left} of {len(rows)} rows; search it again")
        return out

    def search(self, xq: F32, k: int) -> tuple[F32, I64]:
        """As `Index.search`."""
        return self.index.search(xq, k, self.nprobe, self.refine, self.allowed)

    def rank(self, xq: F32, groups: Mapping[int, slice], depth: int) -> Iterator[tuple[int, F32, I64]]:
        """`search` for groups of queries: a group's number, scores and rows (nq, depth)."""
        for number, group in groups.items():
            yield number, *self.search(xq[group], depth)

    def open(self, *, codes: bool) -> None:
        """Verify and map the files now, and not at their first use; so that what is timed is not that."""
        live = [shard.info.number for shard in self.shards if shard.info.number not in self.index.lost]
        for shard in self.shards:
            if shard.info.number in live:
                shard.open_vectors()
        if codes:
            self.index.backend.open(live, vectors=True)


class CollectionSource:
    """Embeddings: their vectors as stored, and exact search. Each call reads the files that it needs, once.

    Args:
        allowed: (rows,) the only ones that are found; None for all.
    """

    def __init__(self, collection: Collection, allowed: Mask | None = None) -> None:
        self.collection, self.allowed = collection, allowed
        self.missing: list[list[int]] = []
        self._kept: tuple[I64, F32] | None = None
        self._exact = Exact(collection, on_ray=False)

    def fetch(self, rows: I64) -> F32:
        """Vectors (m, d) of distinct rows, ascending.

        Raises:
            InputError: there is no such row.
            CorruptError: the vectors are not those that were written.
        """
        if self._kept is not None:
            kept, x = self._kept
            at = np.minimum(np.searchsorted(kept, rows), len(kept) - 1)
            if np.array_equal(kept[at], rows):
                return x[at]
        if len(rows) and not 0 <= rows[0] <= rows[-1] < self.collection.num_rows:
            raise InputError(f"rows {rows[0]} to {rows[-1]}; the database has rows 0 to {self.collection.num_rows - 1}")
        out = np.empty((len(rows), self.collection.dim), np.float32)
        for segment in self.collection.segments:
            low, high = np.searchsorted(rows, [segment.start, segment.start + segment.count])
            if low < high:
                ((first, x),) = self.collection.vectors(int(rows[low]), int(rows[high - 1]) + 1)
                out[low:high] = x[rows[low:high] - first]
        return out

    def search(self, xq: F32, k: int) -> tuple[F32, I64]:
        """The k best of all allowed rows, fewer where there are fewer."""
        ((_, scores, rows),) = self.rank(xq, {0: slice(0, len(xq))}, k)
        return scores, rows

    def rank(self, xq: F32, groups: Mapping[int, slice], depth: int) -> Iterator[tuple[int, F32, I64]]:
        """As `Exact.rank`: in few passes over the files, and a group has the bits that it has alone."""
        there = self.collection.num_rows if self.allowed is None else int(self.allowed.sum())
        return self._exact.rank(xq, groups, min(depth, there), self.allowed)

    def keep(self, rows: I64) -> None:
        """Hold the vectors of these distinct rows, ascending, where they are not more than `FETCHED`.

        Several calls of `fetch` would each read the files that they need.
        """
        if 0 < 4 * len(rows) * self.collection.dim <= FETCHED:
            self._kept = rows, self.fetch(rows)
