"""Diffusion on the graph of the candidates, truncated to them.

Iscen et al. (CVPR 2017), as in ahmetius/diffusion-retrieval for global descriptors: A_ij = max(x_i·x_j, 0)^gamma where i
and j are each among the k nearest of the other, S = D^-1/2 A D^-1/2, y = max(q·x, 0)^gamma for the kq nearest of the query,
and f solves (I - alpha S) f = y by a few steps of the conjugate gradient method.

There the neighbours are those in the whole database, found ahead of time, and the graph is cut to the candidates; here
they are those among the candidates, so that nothing has to be prepared and a database may change.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy.sparse import csr_array, diags_array, eye_array
from scipy.sparse.linalg import cg

from iir_dist.rerank.method import Method, best, inner, nearest
from iir_dist.vectors import F32


class Diffusion(Method):
    """`[diffusion]`."""

    name: Literal["diffusion"] = "diffusion"
    k: int = Field(50, ge=1)
    """Neighbours of a candidate in the graph, itself counted."""
    kq: int = Field(10, ge=1)
    """Neighbours of the query, from which it spreads."""
    alpha: float = Field(0.99, gt=0, lt=1)
    """Share that goes on along the edges at each step."""
    gamma: float = Field(3.0, gt=0)
    """Power of similarities."""
    iterations: int = Field(20, ge=1)
    """Steps of the conjugate gradient method, at most."""
    tolerance: float = Field(1e-6, gt=0, lt=1)
    """It stops where the residual is this fraction of y."""

    def graph(self, x: F32) -> Any:
        """A, (n, n) sparse, symmetric, float64."""
        sims, places = nearest(x, self.k - 1)
        n, k = places.shape
        weights = np.maximum(sims, 0).astype(np.float64) ** self.gamma
        directed = csr_array((weights.ravel(), places.ravel(), np.arange(n + 1) * k), shape=(n, n))
        return directed.minimum(directed.T)  # nothing where one of the two is not there: neighbours are mutual

    def scores(self, q: F32, x: F32) -> F32:
        """f; -inf where it is not positive, which is where nothing arrived."""
        sims = inner(x, q)
        near = best(sims, self.kq)
        y = np.zeros(len(x))
        y[near] = np.maximum(sims[near], 0).astype(np.float64) ** self.gamma
        affinity = self.graph(x)
        degree = np.asarray(affinity.sum(axis=1))
        scale = diags_array(
            np.maximum(degree, np.finfo(np.float64).tiny) ** -0.5
        )  # one without neighbours has no entry to scale
        laplacian = (eye_array(len(x)) - self.alpha * (scale @ affinity @ scale)).tocsr()
        f, _ = cg(laplacian, y, rtol=self.tolerance, maxiter=self.iterations)
        # The exact solution is not negative anywhere; one of a few steps can be, by what they leave to do.
        return np.where(f > 0, f, -np.inf).astype(np.float32)
