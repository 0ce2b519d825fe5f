"""Database-side augmentation: a candidate becomes the weighted mean of itself and its nearest others.

Turcot and Lowe (2009) and Arandjelović and Zisserman (CVPR 2012) did it to words, Gordo et al. (IJCV 2017) to global
vectors; the formula is that of `expand_descriptors` of naver/deep-image-retrieval, itself excluded from the others:
x' = L2(x + sum over the k nearest j of max(x·x_j, 0)^alpha x_j), and the score is q·x'.

They augment the whole database ahead of time, which is a search for each of its rows and a second index. Here the others
are looked for in the list alone, as SuperGlobal (Shao et al., ICCV 2023) does with its first 400: what joins a candidate
and matters for a query is near the query too. Where the list is the database, both are the same.

With `expand` the query then joins what it finds first among the augmented candidates, and asks these again: query expansion
on an augmented database, whose vectors are not those that a second search would find. Where the list is the database, it is
that, too.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from iir_dist.rerank.expansion import joined
from iir_dist.rerank.method import Method, blend, inner, nearest
from iir_dist.vectors import F32, normalize


class Augmentation(Method):
    """`[dba]`."""

    name: Literal["dba"] = "dba"
    k: int = Field(10, ge=1)
    """Others that join a candidate."""
    alpha: float = Field(3.0, ge=0)
    """Power of their similarity; 0 is the plain mean."""
    expand: int = Field(0, ge=0)
    """Augmented candidates that then join the query; 0: none."""
    expand_alpha: float = Field(3.0, ge=0)
    """Power of their similarity to the query."""

    def scores(self, q: F32, x: F32) -> F32:
        """Inner products of the augmented candidates with the query, or with the expanded one."""
        sims, places = nearest(x, self.k)
        x = normalize(blend(x, np.maximum(sims, 0) ** np.float32(self.alpha), places))
        return inner(x, joined(q, x, self.expand, self.expand_alpha) if self.expand else q)
