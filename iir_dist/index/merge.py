"""Best-first lists of several parts of an index as one: of its shards, or of actors that hold some of them.

A part that holds a share of the rows has about this share of the best. It is asked for so many and some more, and again
for all where it turns out to have more among the best: the answer is that of parts which give all at once, and of deep
lists only about as much is selected, sent and merged as is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from iir_dist.vectors import F32, I64, merge_top_k

P = TypeVar("P", bound=Hashable)
Lists = tuple[F32, I64]
"""Scores and rows (nq, m), best first, equal scores by row; row -1 and score -inf where there are fewer."""


def gather(ask: Callable[[slice | I64, Mapping[P, int]], Sequence[Lists]], rows: Mapping[P, int], k: int) -> Lists:
    """The best k of all parts, (nq, at most k).

    Args:
        ask: gives, for some of the queries, the lists of some parts in their order, each of the depth that it is called
            with, or of fewer columns where the part has no more.
        rows: how many rows are searched in each part.
    """
    total = sum(rows.values())
    depths = {part: _depth(k, n / total) for part, n in rows.items()}
    found = ask(slice(None), depths)
    if len(found) == 1:
        return found[0]
    best = merge_top_k(found, k, larger_is_better=True)
    open_ = {
        part: _open(lists, best) for part, lists in zip(depths, found, strict=True) if _width(lists) == depths[part] < k
    }
    again = np.flatnonzero(np.any(list(open_.values()), axis=0)) if open_ else np.empty(0, np.int64)
    if len(again):
        deep = [part for part, queries in open_.items() if queries.any()]
        deeper = dict(zip(deep, ask(again, dict.fromkeys(deep, k)), strict=True))
        whole = [deeper.get(part, (s[again], r[again])) for part, (s, r) in zip(depths, found, strict=True)]
        best[0][again], best[1][again] = merge_top_k(whole, _width(best), larger_is_better=True)
    return best


def _depth(k: int, share: float) -> int:
    """How many of the best k to ask for where they are spread by chance, four standard deviations and a quarter more."""
    return min(k, math.ceil(1.25 * k * share + 4 * math.sqrt(k * share)) + 4)


def _width(lists: Lists) -> int:
    return int(lists[1].shape[1])


def _open(lists: Lists, best: Lists) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(nq,) whether the last of a part is among the best of all, so that more of it may be."""
    (scores, rows), (of, at) = ((s[:, -1], r[:, -1]) for s, r in (lists, best))
    return np.asarray((rows >= 0) & ((scores > of) | ((scores == of) & (rows <= at))))
