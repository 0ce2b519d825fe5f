"""Re-ranking by SuperGlobal (Shao et al., ICCV 2023), as in ShihaoShao-GH/SuperGlobal; global vectors are all it needs.

Each candidate is refined by its K nearest others, x' = (x + sum of beta s_j x_j) / (1 + sum of beta s_j) with s_j = x·x_j, and
not normalized after that. The query is expanded to the element-wise maximum of the K + 1 refined candidates that are
nearest to it, itself left out. The score is the mean of both inner products with x'.

One difference: a negative s_j counts as 0. There it is subtracted, and the sum of the weights can become 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from iir_dist.rerank.method import Method, best, blend, inner, nearest
from iir_dist.vectors import F32


class SuperGlobal(Method):
    """`[superglobal]`."""

    name: Literal["superglobal"] = "superglobal"
    n: int = Field(400, ge=1)
    """Candidates that are re-ranked; M in the paper."""
    k: int = Field(9, ge=1)
    """Others that refine a candidate; with the best one, also the number that expand the query."""
    beta: float = Field(0.15, ge=0)
    """Weight of the others."""

    def scores(self, q: F32, x: F32) -> F32:
        """(q·x' + q'·x') / 2."""
        sims, places = nearest(x, self.k)
        weights = np.float32(self.beta) * np.maximum(sims, 0)
        refined = blend(x, weights, places) / (1 + weights.sum(axis=1, keepdims=True))
        direct = inner(refined, q)
        expanded = refined[best(direct, self.k + 1)].max(axis=0)
        return np.asarray((direct + inner(refined, expanded)) / 2, np.float32)
