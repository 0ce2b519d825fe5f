"""Synthetic distractors: vectors of a mixture that is fitted to real ones.

A real set of distractors is small where no more can be had. The mixture has a component for every 20 real vectors
(spherical k-means): the mean of its members, around it the pooled covariance of all members about their means, scaled by
the component's own spread. One factor on all of it is set so that the median similarity of a vector to its nearest
neighbour is that of as many real vectors. How the distributions compare is measured and kept. They are vectors, not
photos: nothing of the network's behaviour on new photos is in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iir_dist.errors import InputError
from iir_dist.index.train import kmeans, nearest
from iir_dist.vectors import F32, normalize

PER_COMPONENT = 20
PRIOR = 5
"""Members of average spread that a component's own spread is shrunk by."""
LEAST = 200
"""Real vectors that a mixture can be fitted to."""
MOST = 20_000
"""Real vectors that it is fitted to; more would cost time and say nothing new of a covariance."""
BISECTIONS = 12
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 24


@dataclass(frozen=True, slots=True)
class Mixture:
    """`weights` (c,), `means` (c, d), `spreads` (c,); `root` (d, d) of the pooled covariance; `scale` of it."""

    weights: np.ndarray[Any, Any]
    means: F32
    spreads: F32
    root: F32
    scale: float = 1.0

    def sample(self, n: int, seed: tuple[int, ...]) -> F32:
        """n unit vectors (n, d); the same for the same seed."""
        rng = np.random.default_rng(seed)
        component = rng.choice(len(self.weights), size=n, p=self.weights)
        noise = rng.standard_normal((n, self.root.shape[1]), dtype=np.float32) @ self.root.T
        noise *= (self.scale * self.spreads[component])[:, None]
        return normalize(self.means[component] + noise)


def fit(x: F32, seed: int) -> Mixture:
    """Fit a mixture to real unit vectors (n, d).

    Raises:
        InputError: they are too few.
    """
    if len(x) < LEAST:
        raise InputError(
            f"{len(x)} real distractors are too few to fit a mixture to; expected at least {LEAST}, or steps that need "
            "no synthetic ones"
        )
    if len(x) > MOST:
        x = x[np.sort(np.random.default_rng(seed).choice(len(x), MOST, replace=False))]
    members = nearest(x, kmeans(x, len(x) // PER_COMPONENT, seed))
    _, members, counts = np.unique(members, return_inverse=True, return_counts=True)
    means = np.zeros((len(counts), x.shape[1]), np.float64)
    np.add.at(means, members, x)
    means /= counts[:, None]
    residuals = x - means[members]
    covariance = residuals.T @ residuals / (len(x) - len(counts))  # a mean costs its members one degree of freedom
    values, vectors = np.linalg.eigh(covariance)
    spread = np.bincount(members, (residuals**2).sum(axis=1)) + PRIOR * values.sum()
    spreads = np.sqrt(spread / ((np.maximum(counts - 1, 0) + PRIOR) * values.sum()))
    root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    found = Mixture(counts / counts.sum(), means.astype(np.float32), spreads.astype(np.float32), root)
    return _calibrated(found, x[:2000], seed)


def _calibrated(mixture: Mixture, x: F32, seed: int) -> Mixture:
    target, low, high = float(np.median(nearest_similarity(x))), 0.0, 3.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = replace(mixture, scale=middle).sample(len(x), (seed, 1))
        low, high = (middle, high) if np.median(nearest_similarity(found)) > target else (low, middle)
    return replace(mixture, scale=(low + high) / 2)


def nearest_similarity(x: F32, to: F32 | None = None) -> F32:
    """Inner product of each row of `x` with its nearest in `to`, or with its nearest other row."""
    scores = x @ (x if to is None else to).T
    if to is None:
        np.fill_diagonal(scores, -np.inf)
    return np.asarray(scores.max(axis=1))


def comparison(mixture: Mixture, x: F32, xq: F32, seed: int) -> dict[str, Any]:
    """Nearest neighbours of real and of as many synthetic vectors, and of queries among them.

    Returns:
        `percentiles`, `vectors`, and in `similarity` for each kind of pair: `distance_edges`, and for `real` and `synthetic`
        the similarities at the percentiles and the `share` of the vectors in each bin of Euclidean distance.
    """
    x = x[:5000]
    made = mixture.sample(len(x), (seed, 2))
    pairs = {
        "to the nearest neighbour": (nearest_similarity(x), nearest_similarity(made)),
        "of a query to its nearest distractor": (nearest_similarity(xq, x), nearest_similarity(xq, made)),
        "to the nearest real one": (nearest_similarity(x), nearest_similarity(made, x)),
    }
    return {
        "percentiles": list(PERCENTILES),
        "vectors": len(x),
        "similarity": {name: _compared(*pair) for name, pair in pairs.items()},
    }


def _compared(real: F32, synthetic: F32) -> dict[str, Any]:
    distances = [np.sqrt(np.maximum(0, 2 - 2 * s.astype(np.float64))) for s in (real, synthetic)]
    edges = np.linspace(min(d.min() for d in distances), max(d.max() for d in distances) + 1e-9, BINS + 1)
    found: dict[str, Any] = {"distance_edges": edges.round(5).tolist()}
    for name, similarity, distance in zip(("real", "synthetic"), (real, synthetic), distances, strict=True):
        share = np.histogram(distance, edges)[0] / len(distance)
        found[name] = {
            "percentiles": np.percentile(similarity, PERCENTILES).round(4).tolist(), "share": share.round(5).tolist()
        }  # fmt: skip
    return found
