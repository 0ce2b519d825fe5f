"""Retrieval metrics on ranks; pure NumPy.

A rank counts from 0 and is counted after the ignored (junk) images were taken out of the list. Every function takes
the ranks of one query's positives and how many positives there are; positives that were not retrieved at all are
simply absent from the ranks and count as never found, so that a list cut at depth k gives a lower bound.

Sources: the Oxford5k annotation's `compute_ap` (Philbin et al., CVPR 2007) and the revisited protocol
(Radenovic et al., CVPR 2018, arXiv:1803.11285). Both integrate precision over recall by trapezoids; they differ in
which images are positive, ignored and in the database. Average precision without interpolation (the usual "sum of
precisions at the positives", also that of scikit-learn) is another number and is not a benchmark's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def positive_ranks(ranked: Ints, positive: Ints, ignored: Ints) -> Ints:
    """Ranks of the positives in a list, the ignored images not counted.

    Args:
        ranked: (n,) image numbers, best first, each at most once.
        positive: numbers of the positives; duplicates count once.
        ignored: numbers of the images to take out. An image that is both is ignored.

    Returns:
        Ascending ranks from 0, (number of positives found,) int64.

    >>> positive_ranks(np.array([4, 9, 7, 2]), np.array([7, 2]), np.array([9]))
    array([1, 2])
    """
    kept = ranked[~np.isin(ranked, ignored)] if len(ignored) else ranked
    return np.flatnonzero(np.isin(kept, positive)).astype(np.int64)


def average_precision(ranks: Ints, num_positive: int) -> float:
    """Area under the precision-recall curve by trapezoids, the benchmarks' AP.

    At the j-th positive (from 0) with rank r, precision steps from j/r (1 at r = 0) to (j+1)/(r+1), and recall by
    1/num_positive. Equal to the loop of the original `compute_ap`, whose precision starts at 1.

    >>> average_precision(np.array([0, 2]), 2)      # ((1 + 1) / 2 + (1/2 + 2/3) / 2) / 2
    0.7916666666666666
    """
    if num_positive < 1:
        raise ValueError("average precision of a query without positives is not defined; skip the query")
    found = np.arange(len(ranks), dtype=np.float64)
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * num_positive))


def exact_average_precision(ranks: Ints, num_positive: int) -> float:
    """Mean of the precisions at the positives, without interpolation: what AP losses approach.

    >>> exact_average_precision(np.array([0, 2]), 2)      # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    if num_positive < 1:
        raise ValueError("average precision of a query without positives is not defined; skip the query")
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).sum() / num_positive)


def precision_at(ranks: Ints, k: int) -> float:
    """mP@k's precision of one query: over the first min(k, 1 + last positive's rank) images, as the revisited code does.

    A query whose positives all lie in front is not punished for having fewer than k of them.

    >>> precision_at(np.array([0, 1, 3]), 10), precision_at(np.array([0, 1, 3]), 2)
    (0.75, 1.0)
    """
    if not len(ranks):
        return 0.0
    depth = min(int(ranks.max()) + 1, k)
    return float((ranks < depth).sum() / depth)


def precision_at_recall(ranks: Ints, num_positive: int, points: int = 21) -> Floats:
    """Interpolated precision at recall 0, ..., 1: the best precision at that recall or beyond; for plots.

    >>> precision_at_recall(np.array([0, 2]), 2, points=3)
    array([1.        , 1.        , 0.66666667])
    """
    found = np.arange(1, len(ranks) + 1)
    precision = np.maximum.accumulate((found / (ranks + 1))[::-1])[::-1]
    needed = np.ceil(np.linspace(0, 1, points) * num_positive - 1e-9).astype(np.int64)
    index = np.maximum(needed, 1) - 1
    return np.where(index < len(ranks), np.append(precision, 0.0)[np.minimum(index, len(ranks))], 0.0)


@dataclass(frozen=True, slots=True)
class QueryScore:
    """AP and P@k of one query; `num_positive` 0 means that the query is skipped (ap is NaN)."""

    ap: float
    precision: tuple[float, ...]
    num_positive: int
    num_found: int


def score_query(ranked: Ints, positive: Ints, ignored: Ints, ks: Sequence[int] = (1, 5, 10)) -> QueryScore:
    """Score one ranked list; see `positive_ranks` for the arguments."""
    positive = np.setdiff1d(positive, ignored)
    if not len(positive):
        return QueryScore(float("nan"), (float("nan"),) * len(ks), 0, 0)
    ranks = positive_ranks(ranked, positive, ignored)
    precision = tuple(precision_at(ranks, k) for k in ks)
    return QueryScore(average_precision(ranks, len(positive)), precision, len(positive), len(ranks))


def bootstrap_interval(
    values: Floats, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over queries, drawn with replacement.

    Says how far the mean would move with other queries of the same kind; it knows nothing of training seeds.
    """
    if len(values) < 2:
        return (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(scores: Sequence[QueryScore], ks: Sequence[int] = (1, 5, 10), *, seed: int = 0) -> dict[str, Any]:
    """mAP with its bootstrap interval, mP@k and the number of queries counted; all fractions.

    Queries without positives are skipped (ROxford Easy counts 68 of 70).
    """
    counted = [s for s in scores if s.num_positive]
    if not counted:
        return {"map": None, "num_queries": 0}
    ap = np.array([s.ap for s in counted])
    low, high = bootstrap_interval(ap, seed=seed)
    precision = np.array([s.precision for s in counted]).mean(axis=0)
    return {
        "map": float(ap.mean()),
        "map_interval": None if np.isnan(low) else [low, high],
        **{f"mp@{k}": float(p) for k, p in zip(ks, precision, strict=True)},
        "num_queries": len(counted),
        "num_positive": int(sum(s.num_positive for s in counted)),
        "num_found": int(sum(s.num_found for s in counted)),
    }
