"""What re-rankers share: the config that each is, neighbours inside a list, and weighted sums of them.

n: candidates of a query, d: dimension. Candidates come in the order of their rows, so that a stable sort breaks ties by
row, and nothing depends on the order of the list that they come from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.sparse import csr_array

from iir_dist.config import StageConfig
from iir_dist.vectors import F32, I64, top_k

BLOCK = 2**22
"""Similarities that are held at a time (16 MB, and some times that while they are sorted)."""


class Method(StageConfig):
    """A re-ranker and its parameters; frozen, and whole in the protocol. Subclasses have a distinct `name`."""

    n: int = Field(1000, ge=1)
    """Candidates that are re-ranked; what is behind them keeps its order behind them."""

    @property
    def taken(self) -> int:
        """Candidates of each list whose vectors are needed."""
        return self.n

    @abstractmethod
    def scores(self, q: F32, x: F32) -> F32:
        """New scores of one query's candidates, larger is better.

        Args:
            q: (d,) the query.
            x: (n, d) the candidates by row, 1 <= n <= `taken`.

        Returns:
            (n,) float32; -inf for candidates that the method says nothing of, which keep their order behind the others.
        """


def inner(x: F32, q: F32) -> F32:
    """Inner products (n,) of rows of `x` (n, d) with `q` (d,); those of equal rows are equal to the bit."""
    # einsum sums each row in the same order whatever is beside it; a matrix product does not.
    return np.asarray(np.einsum("nd,d->n", x, q), np.float32)


def best(scores: F32, k: int) -> I64:
    """Places of the k largest of `scores` (n,), best first, the first of equal ones first."""
    return np.argsort(-scores, kind="stable")[:k]


def nearest(x: F32, k: int) -> tuple[F32, I64]:
    """The k nearest other candidates of each by inner product; equal ones in order.

    Args:
        x: (n, d).

    Returns:
        similarities and places, (n, min(k, n - 1)), best first. Never more than `BLOCK` similarities, or n, are held.
    """
    n = len(x)
    k = min(k, n - 1)
    if k < 1:
        return np.empty((n, 0), np.float32), np.empty((n, 0), np.int64)
    sims, places = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    numbers = np.arange(n)
    for members, block in _similarities(x):
        block[np.arange(len(members)), members] = -np.inf
        sims[members], places[members] = top_k(block, numbers, k, larger_is_better=True)
    return sims, places


def _similarities(x: F32) -> Iterator[tuple[I64, F32]]:
    """(some candidates, their similarities with all n). Equal vectors are as similar to anything, to the bit."""
    step = max(1, BLOCK // len(x))
    keys = np.ascontiguousarray(x).view(np.dtype((np.void, x.itemsize * x.shape[1]))).ravel()
    # Each distinct vector enters the product once: one that is there twice would have two sums that differ a little.
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    distinct = x[first]
    by_group = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[by_group], np.arange(0, len(distinct) + step, step))
    for low, start, stop in zip(range(0, len(distinct), step), bounds, bounds[1:], strict=False):
        products = distinct[low : low + step] @ distinct.T
        for at in range(start, stop, step):
            members = by_group[at : min(at + step, stop)]
            yield members, products[group[members] - low][:, group]


def blend(x: F32, weights: npt.NDArray[np.float32], places: I64) -> F32:
    """Each candidate plus others: x_i + sum over j of weights_ij x[places_ij].

    Args:
        x: (n, d).
        weights, places: (n, k).

    Returns:
        (n, d) float32.
    """
    n, k = places.shape
    matrix = csr_array((weights.ravel(), places.ravel(), np.arange(n + 1) * k), shape=(n, n))
    return np.asarray(x + matrix @ x, np.float32)
