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
SIGN = np.int32(-(2**31))


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
    # the cut among ties is decided by id with no more ado. All in place: passes over new memory took most of the time.
    bits = (sign * scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    bits ^= bits >> 31 | SIGN  # ordered as the scores where it is read without sign
    keys = bits.view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= ids.view(np.uint64)  # a hole is all ones
    if k < n:
        keys.partition(k, axis=1)
    keys = keys[:, :k]
    keys.sort(axis=1)
    found = (keys & np.uint64(HOLE)).view(np.int64)
    keys >>= np.uint64(32)
    bits = keys.astype(np.uint32).view(np.int32)
    bits ^= ~(bits >> 31) | SIGN
    values = bits.view(np.float32)
    values *= sign
    hole = found == HOLE
    if hole.any():
        values[hole], found[hole] = sign * np.float32(np.inf), -1
    return values, found


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
