"""The re-rankers' formulas written out, one number at a time, in float64; slow.

Each gives the new scores of one query's candidates; candidates are in the order of their rows, and of equal numbers the
first counts as the larger. The papers and programs are named where the fast ones are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> list[float]:
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a] if norm else list(a)


def plus(a: Vector, weight: float, b: Vector) -> list[float]:
    return [float(x) + weight * float(y) for x, y in zip(a, b, strict=True)]


def largest(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def others(x: Sequence[Vector], i: int, k: int) -> list[int]:
    """The k nearest of x[i], itself excluded."""
    sims = [dot(x[i], other) if j != i else -math.inf for j, other in enumerate(x)]
    return [j for j in largest(sims, k) if j != i]


def expanded(q: Vector, x: Sequence[Vector], k: int, alpha: float) -> list[float]:
    """Mean of [q; x_j sim_j^alpha for the top k j], at unit norm."""
    sims = [dot(q, candidate) for candidate in x]
    new = [float(v) for v in q]
    for j in largest(sims, k):
        new = plus(new, max(sims[j], 0.0) ** alpha, x[j])
    return unit([v / (min(k, len(x)) + 1) for v in new])


def query_expansion(q: Vector, x: Sequence[Vector], k: int, alpha: float) -> list[float]:
    new = expanded(q, x, k, alpha)
    return [dot(new, candidate) for candidate in x]


def augmentation(
    q: Vector, x: Sequence[Vector], k: int, alpha: float, expand: int = 0, expand_alpha: float = 0
) -> list[float]:
    """The candidates expanded as queries are, by the k nearest others; then the query by the new candidates."""
    augmented = []
    for i, candidate in enumerate(x):
        near = others(x, i, k)
        new = [float(v) for v in candidate]
        for j in near:
            new = plus(new, max(dot(candidate, x[j]), 0.0) ** alpha, x[j])
        augmented.append(unit([v / (len(near) + 1) for v in new]))
    asked = expanded(q, augmented, expand, expand_alpha) if expand else q
    return [dot(asked, candidate) for candidate in augmented]


def affinity(x: Sequence[Vector], k: int, gamma: float) -> npt.NDArray[np.float64]:
    """The mutual graph; k counts the vector itself, and the diagonal is 0."""
    near = [{i, *others(x, i, k - 1)} for i in range(len(x))]
    a = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j and i in near[j] and j in near[i]:
                a[i, j] = max(dot(x[i], x[j]), 0.0) ** gamma
    return a


def system(
    q: Vector, x: Sequence[Vector], k: int, kq: int, alpha: float, gamma: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """I - alpha S, and y."""
    a = affinity(x, k, gamma)
    degree = [math.fsum(row) for row in a]
    laplacian = np.eye(len(x))
    for i in range(len(x)):
        for j in range(len(x)):
            if a[i, j]:
                laplacian[i, j] -= alpha * a[i, j] / math.sqrt(degree[i]) / math.sqrt(degree[j])
    sims = [dot(q, candidate) for candidate in x]
    y = np.zeros(len(x))
    for j in largest(sims, kq):
        y[j] = max(sims[j], 0.0) ** gamma
    return laplacian, y


def conjugate_gradient(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], iterations: int, tolerance: float
) -> npt.NDArray[np.float64]:
    """Hestenes and Stiefel, from 0, until the residual is `tolerance` of b."""
    x, r = np.zeros(len(b)), b.copy()
    p, squared = r.copy(), float(r @ r)
    for _ in range(iterations):
        if math.sqrt(squared) <= tolerance * math.sqrt(float(b @ b)):
            break
        step = squared / float(p @ a @ p)
        x, r = x + step * p, r - step * (a @ p)
        before, squared = squared, float(r @ r)
        p = r + squared / before * p
    return x


def diffusion(
    q: Vector, x: Sequence[Vector], k: int, kq: int, alpha: float, gamma: float, iterations: int, tolerance: float
) -> list[float]:
    """-inf where nothing arrives."""
    f = conjugate_gradient(*system(q, x, k, kq, alpha, gamma), iterations, tolerance)
    return [float(v) if v > 0 else -math.inf for v in f]


def superglobal(q: Vector, x: Sequence[Vector], k: int, beta: float) -> list[float]:
    """`MDescAug`, then `RerankwMDA`; a negative similarity weighs nothing."""
    refined = []
    for i, candidate in enumerate(x):
        total, new = 1.0, [float(v) for v in candidate]
        for j in others(x, i, k):
            weight = beta * max(dot(candidate, x[j]), 0.0)
            new, total = plus(new, weight, x[j]), total + weight
        refined.append([v / total for v in new])
    first = [dot(q, candidate) for candidate in refined]
    chosen = [refined[i] for i in largest(first, k + 1)]
    most = [max(values) for values in zip(*chosen, strict=True)]
    return [(s + dot(most, candidate)) / 2 for s, candidate in zip(first, refined, strict=True)]
