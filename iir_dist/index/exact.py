"""Exact search: inner products with every database vector, block by block, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import cast

import numpy as np
import numpy.typing as npt

from iir_dist import session
from iir_dist.data.collection import Collection
from iir_dist.vectors import F32, I64, merge_top_k, top_k

BLOCK = 2**24
"""Scores that are computed at a time (64 MB)."""
ROWS = 2**13
"""Rows of a matrix product. In what order it sums depends on its shape: it is that of a group of queries and of so many
rows, so that a run that goes on with the groups that are left gives the same bits."""
KEPT = 2**27
"""Numbers of 4 bytes that are kept for the queries of one pass over the database (512 MB)."""
Mask = npt.NDArray[np.bool_]


def exact_part(
    collection: Collection, start: int, stop: int, xq: F32, sizes: Sequence[int], k: int | None, allowed: Mask | None
) -> tuple[F32, I64]:
    """Scores of database rows [start, stop).

    Args:
        xq: (nq, d) queries.
        sizes: of the groups that the queries form.
        k: list depth; None gives the scores of all rows, in the order of the rows.
        allowed: (rows of the collection,) the only ones that count; None for all.

    Returns:
        scores (nq, n) and rows (nq, n), best first; or, where k is None, (nq, n) and (n,).
    """
    wanted = np.arange(start, stop) if allowed is None else start + np.flatnonzero(allowed[start:stop])
    everything = np.empty((len(xq), len(wanted)), np.float32) if k is None else None
    groups = [slice(low, high) for low, high in pairwise(np.cumsum([0, *sizes]))]
    best: list[tuple[F32, I64]] = [(np.empty((n, 0), np.float32), np.empty((n, 0), np.int64)) for n in sizes]
    size, at = max(1, BLOCK // max(sizes) // ROWS) * ROWS, 0
    for first, x in collection.vectors(start, stop):
        while at < len(wanted) and wanted[at] < first + len(x):
            rows = wanted[at : at + size]
            rows = rows[rows < first + len(x)]
            xb = x[rows[0] - first : rows[-1] - first + 1] if allowed is None else x[rows - first]
            for number, group in enumerate(groups):
                blocks = (xb[low : low + ROWS] for low in range(0, len(xb), ROWS))
                scores = np.concatenate([xq[group] @ block.T for block in blocks], axis=1)
                if everything is not None:
                    everything[group, at : at + len(rows)] = scores
                else:
                    assert k is not None
                    found = top_k(scores, rows, k, larger_is_better=True)
                    best[number] = merge_top_k([best[number], found], k, larger_is_better=True)
            at += len(rows)
    if everything is not None:
        return everything, wanted
    return np.concatenate([scores for scores, _ in best]), np.concatenate([rows for _, rows in best])


class Exact:
    """Exact search over a collection, in this process or as tasks on Ray."""

    def __init__(self, collection: Collection, *, on_ray: bool) -> None:
        self.collection, self.on_ray = collection, on_ray
        self._pool = ThreadPoolExecutor(session.cpu_count(), "iir-rank")

    def rank(
        self, xq: F32, groups: Mapping[int, slice], depth: int, allowed: Mask | None
    ) -> Iterator[tuple[int, F32, I64]]:
        """Rank the database for groups of queries, as many at a time as `KEPT` allows.

        Args:
            xq: (nq, d) queries.
            groups: a number and consecutive queries each.
            depth: list depth, at most the number of allowed rows.
            allowed: (rows,) the only ones that count; None for all.

        Yields:
            a group's number, and its scores and rows (nq, depth), best first, equal scores by row.
        """
        num_rows = self.collection.num_rows if allowed is None else int(allowed.sum())
        whole = 4 * depth > num_rows  # sorting once is cheaper than merging long lists
        room = max(1, KEPT // (num_rows if whole else 6 * depth))  # scores and rows, and as much while they are merged
        todo = list(groups.items())
        while todo:
            together = [todo.pop(0)]
            while todo and sum(s.stop - s.start for _, s in (*together, todo[0])) <= room:
                together.append(todo.pop(0))
            wanted = np.concatenate([xq[s] for _, s in together])
            sizes = [s.stop - s.start for _, s in together]
            scores, rows = self._parts(wanted, sizes, None if whole else depth, allowed)
            at = 0
            for number, group in together:
                part = slice(at, at + group.stop - group.start)
                at = part.stop
                if whole:
                    yield number, *self._sorted(scores[part], rows, depth)
                else:
                    yield number, scores[part], rows[part]

    def _parts(self, xq: F32, sizes: Sequence[int], k: int | None, allowed: Mask | None) -> tuple[F32, I64]:
        if not self.on_ray:
            return exact_part(self.collection, 0, self.collection.num_rows, xq, sizes, k, allowed)
        ray = session.connect()
        task = ray.remote(exact_part)
        queries, mask = ray.put(xq), ray.put(allowed)
        refs = [
            task.remote(self.collection, s.start, s.start + s.count, queries, sizes, k, mask)
            for s in self.collection.segments
        ]
        if k is None:
            parts = [session.result_of(ref) for ref in refs]
            return np.concatenate([s for s, _ in parts], axis=1), np.concatenate([r for _, r in parts])
        best = session.result_of(refs.pop(0))
        while refs:  # one by one, so that what is held does not grow with the number of shards
            best = merge_top_k([best, session.result_of(refs.pop(0))], k, larger_is_better=True)
        return cast(tuple[F32, I64], best)

    def _sorted(self, scores: F32, rows: I64, depth: int) -> tuple[F32, I64]:
        """Rows are ascending, so that a stable sort orders equal scores by row."""
        found = list(self._pool.map(lambda s: np.argsort(-s, kind="stable")[:depth], scores))
        order = np.stack(found)
        return np.take_along_axis(scores, order, axis=1), rows[order]
