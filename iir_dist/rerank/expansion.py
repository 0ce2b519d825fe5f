"""Query expansion: the query becomes the weighted mean of itself and what it found first, and asks again.

Average query expansion is of Chum et al. (ICCV 2007), weights by a power of the similarity of Radenović et al. (TPAMI
2019); as in `expand_descriptors` of naver/deep-image-retrieval the query itself has weight 1:
q' = L2(q + sum over the k nearest j of max(q·x_j, 0)^alpha x_j).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from iir_dist.rerank.method import Method, best, inner
from iir_dist.vectors import F32, normalize


def joined(q: F32, x: F32, k: int, alpha: float) -> F32:
    """The query and the `k` nearest of the candidates (n, d), by a power of their similarity; (d,), of unit norm."""
    sims = inner(x, q)
    near = best(sims, k)
    weights = np.maximum(sims[near], 0) ** np.float32(alpha)  # 0^0 is 1: all count the same
    sums = np.asarray(q + np.einsum("k,kd->d", weights, x[near]), np.float32)
    return np.asarray(normalize(sums[None])[0])


class QueryExpansion(Method):
    """`[qe]`."""

    name: Literal["qe"] = "qe"
    k: int = Field(10, ge=1)
    """Candidates that join the query."""
    alpha: float = Field(3.0, ge=0)
    """Power of their similarity; 0 is average query expansion."""
    again: Literal["search", "list"] = "search"
    """What the expanded query is asked of: the whole database, or the first `n` of the list."""

    @property
    def taken(self) -> int:
        """`k` for a second search, which needs no other vectors."""
        return self.k if self.again == "search" else self.n

    def expanded(self, q: F32, x: F32) -> F32:
        """The new query (d,), of unit norm.

        Args:
            q: (d,) the query.
            x: (n, d) candidates, of which the `k` nearest join it.
        """
        return joined(q, x, self.k, self.alpha)

    def scores(self, q: F32, x: F32) -> F32:
        """Inner products with the expanded query."""
        return inner(x, self.expanded(q, x))
