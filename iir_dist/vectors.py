"""NumPy on score and vector matrices; every function says which direction is better.

nq: queries, nb: database rows, d: dimension, k: list depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
HOLE = 2**32 - 1


def normalize(x: npt.NDArray[Any], eps: float = 1e-12) -> F32:
    """Rows of `x` (n, d) at unit L2 norm, float32; a zero row stays zero."""
    x = np.asarray(x, dtype=np.float32)
    norms = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray(x / np.maximum(norms, eps), dtype=np.float32)


def top_k(scores: F32, ids: I64, k: int, *, larger_is_better: bool) -> tuple[F32, I64]:
    """The k best columns of each row, best first, equal scores by ascending id.

    Args:
        scores: (nq, n) float32.
        ids: (n,) or (nq, n) int64; -1 marks a hole, which is never better than a real entry.
        k: list depth; where n < k, all n are returned.
        larger_is_better: direction of `scores`; there is no default on purpose.

    Returns:
        (scores, ids), each (nq, min(k, n)); a hole's score is the worst.

    >>> top_k(np.float32([[.1, .9, .9]]), np.int64([7, 5, 3]), 2, larger_is_better=True)[1]
    array([[3, 5]])
    """
    nq, n = scores.shape
    ids = np.broadcast_to(ids, (nq, n))
    k = min(k, n)
    sign = np.float32(-1 if larger_is_better else 1)
    if ids.max(initial=0) >= HOLE:
        key = np.where(ids < 0, np.inf, sign * scores)
        order = np.lexsort((ids, key), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    # One integer that is ordered as (score, id): NumPy sorts these several times as fast as it sorts by two keys, and
    # the cut among ties is decided by id with no more ado.
    bits = (sign * scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    keys = np.where(ids < 0, np.uint64(2**64 - 1), bits.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64))
    if k < n:
        keys = np.partition(keys, k, axis=1)[:, :k]
    keys = np.sort(keys, axis=1)
    found = (keys & np.uint64(HOLE)).astype(np.int64)
    bits = (keys >> np.uint64(32)).astype(np.uint32)
    values = sign * np.where(bits >> 31, bits & np.uint32(HOLE >> 1), ~bits).view(np.float32)
    hole = found == HOLE
    return np.where(hole, sign * np.float32(np.inf), values), np.where(hole, -1, found)


def merge_top_k(parts: Sequence[tuple[F32, I64]], k: int, *, larger_is_better: bool) -> tuple[F32, I64]:
    """Merge the top-k lists of several shards into one.

    Args:
        parts: one (scores, ids) pair a shard, each (nq, k_shard); ids are global and distinct.
        k: depth of the merged list.
        larger_is_better: direction of the scores (true for inner product and cosine).
    """
    scores = np.concatenate([s for s, _ in parts], axis=1)
    ids = np.concatenate([i for _, i in parts], axis=1)
    return top_k(scores, ids, k, larger_is_better=larger_is_better)
