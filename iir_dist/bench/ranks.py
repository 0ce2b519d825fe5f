"""Exact ranks without sorting: of a few labelled rows, among any number of rows, in bounded memory.

The rank of a row is the number of rows in front of it: with a higher score, or with the same and a smaller number. So
the scores of the labelled rows are computed first, and one pass over the database counts what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from iir_dist.data.collection import Collection
from iir_dist.vectors import F32, I64

BLOCK = 2**22
"""Scores that are computed at a time."""


def scores_of(collection: Collection, xq: F32, rows: Sequence[I64]) -> list[F32]:
    """Inner products of each query with rows of its own, as the counting pass computes them."""
    found = [np.full(len(r), -np.inf, np.float32) for r in rows]
    for first, scores in _blocks(collection, xq):
        for q, wanted in enumerate(rows):
            here = (wanted >= first) & (wanted < first + scores.shape[1])
            found[q][here] = scores[q, wanted[here] - first]
    return found


def exact_ranks(collection: Collection, xq: F32, rows: Sequence[I64]) -> list[I64]:
    """Rank from 0 of each query's rows in its full list, equal scores by row.

    Args:
        xq: (nq, d) unit vectors.
        rows: of each query, distinct database rows; they need not be sorted.
    """
    scores = scores_of(collection, xq, rows)
    # Ascending keys of (score descending, row ascending); counts[i] are the rows before key i and not before key i - 1.
    orders = [np.lexsort((r, -s)) for r, s in zip(rows, scores, strict=True)]
    counts = [np.zeros(len(r) + 1, np.int64) for r in rows]
    for first, block in _blocks(collection, xq):
        numbers = np.arange(first, first + block.shape[1])
        for q, order in enumerate(orders):
            if not len(order):
                continue
            keys, labelled = -scores[q][order], rows[q][order]
            at = np.searchsorted(keys, -block[q], side="left")
            tied = np.flatnonzero((at < len(keys)) & (keys[np.minimum(at, len(keys) - 1)] == -block[q]))
            for i in tied:  # few: labelled rows themselves, and exact duplicates
                same = labelled[at[i] : np.searchsorted(keys, -block[q, i], side="right")]
                at[i] += np.searchsorted(same, numbers[i], side="left")
            counts[q] += np.bincount(at, minlength=len(keys) + 1)
    found = []
    for order, count in zip(orders, counts, strict=True):
        ranks = np.empty(len(order), np.int64)
        # A row counts itself at its own place, so what lies before place i are all counted before it.
        ranks[order] = np.cumsum(count)[:-1] - 1
        found.append(ranks)
    return found


def _blocks(collection: Collection, xq: F32) -> Iterator[tuple[int, F32]]:
    step = max(1, BLOCK // max(1, len(xq)))
    for first, x in collection.vectors(0, collection.num_rows):
        for start in range(0, len(x), step):
            yield first + start, np.asarray(xq @ x[start : start + step].T, np.float32)
