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
        (scores, ids), each (nq, min(k, n)).

    >>> top_k(np.float32([[.1, .9, .9]]), np.int64([7, 5, 3]), 2, larger_is_better=True)[1]
    array([[3, 5]])
    """
    nq, n = scores.shape
    ids = np.broadcast_to(ids, (nq, n))
    k = min(k, n)
    key = np.where(ids < 0, np.inf, -scores if larger_is_better else scores).astype(np.float32)
    if 4 * k < n:
        # Keep all that tie with the k-th key, so that the cut is decided by id and not by chance.
        kth = np.partition(key, k - 1, axis=1)[:, k - 1 : k] if k else key[:, :0]
        width = int((key <= kth).sum(axis=1).max()) if k else 0
        keep = np.argpartition(key, max(width - 1, 0), axis=1)[:, :width]
        key = np.take_along_axis(key, keep, axis=1)
        ids, scores = np.take_along_axis(ids, keep, axis=1), np.take_along_axis(scores, keep, axis=1)
    order = np.lexsort((ids, key), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


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
