"""Retrieval metrics on ranks; pure NumPy.

A rank counts from 0 and is counted after the ignored (junk) images were taken out of the list. Every function takes
the ranks of one query's positives and how many positives there are; positives that were not retrieved at all are
simply absent from the ranks and count as never found, so that a list cut at depth k gives a lower bound.

Sources: the Oxford5k annotation's `compute_ap` (Philbin et al., CVPR 2007) and the revisited protocol
(Radenovic et al., CVPR 2018, arXiv:1803.11285). Both integrate precision over recall by trapezoids; they differ in
which images are positive, ignored and in the database. Average precision without interpolation (the usual "sum of
precisions at the positives", also that of scikit-learn) is another number and is not theirs; cut at k it is that of
Google Landmarks (Weyand et al., CVPR 2020, arXiv:2004.01804, k = 100) and ILIAS (Kordopatis-Zilos et al., CVPR 2025,
arXiv:2502.11748, k = 1,000). Micro average precision is that of one list of all pairs (Perronnin et al., CVPR 2009).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KS = (1, 5, 10)
DRAWN_AT_A_TIME = 2**22
"""Values of a bootstrap that are held at a time (32 MB)."""


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


def ranks_at(positive_at: Ints, ignored_at: Ints) -> Ints:
    """The same from the places of the positives and of the ignored images in the list, both ascending and disjoint.

    >>> ranks_at(np.array([2, 3]), np.array([1]))
    array([1, 2])
    """
    return positive_at - np.searchsorted(ignored_at, positive_at)


def average_precision(ranks: Ints, num_positive: int) -> float:
    """Area under the precision-recall curve by trapezoids, the benchmarks' AP.

    At the j-th positive (from 0) with rank r, precision steps from j/r (1 at r = 0) to (j+1)/(r+1), and recall by
    1/num_positive. Equal to the loop of the original `compute_ap`, whose precision starts at 1.

    >>> average_precision(np.array([0, 2]), 2)      # ((1 + 1) / 2 + (1/2 + 2/3) / 2) / 2
    0.7916666666666666
    """
    _check(num_positive)
    found = np.arange(len(ranks), dtype=np.float64)
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * num_positive))


def exact_average_precision(ranks: Ints, num_positive: int) -> float:
    """Mean of the precisions at the positives, without interpolation: what AP losses approach.

    >>> exact_average_precision(np.array([0, 2]), 2)      # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    _check(num_positive)
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).sum() / num_positive)


def average_precision_at(ranks: Ints, num_positive: int, k: int) -> float:
    """AP@k: the precisions at the positives among the first k, summed, over min(num_positive, k).

    A query whose first k are all right has 1, however many more positives there are.

    >>> average_precision_at(np.array([0, 2, 9]), 5, 3)      # (1/1 + 2/3) / 3
    0.5555555555555555
    """
    return exact_average_precision(ranks[ranks < k], min(num_positive, k))


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


def recall_at(ranks: Ints, num_positive: int, k: int) -> float:
    """Share of the positives that are among the first k.

    >>> recall_at(np.array([0, 2, 9]), 4, 3)
    0.5
    """
    _check(num_positive)
    return float((ranks < k).sum() / num_positive)


def micro_average_precision(scores: npt.NDArray[Any], right: npt.NDArray[np.bool_], num_positive: int) -> float:
    """AP without interpolation of one list of all (query, image) pairs in order of their scores.

    Pairs of equal score count together, with the precision behind the last of them, so that their order does not matter.

    Args:
        scores: (n,) of the pairs, in any order; larger is better.
        right: (n,) whether the image is a positive of the query.
        num_positive: positive pairs there are, those that were not retrieved included.

    >>> micro_average_precision(np.array([0.9, 0.5, 0.5]), np.array([True, False, True]), 4)      # (1 + 2/3) / 4
    0.41666666666666663
    """
    _check(num_positive)
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(right[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1) if len(scores) else np.zeros(0, np.int64)
    gained = np.diff(found[last], prepend=0)
    return float((gained * found[last] / (last + 1)).sum() / num_positive)


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


def _check(num_positive: int) -> None:
    if num_positive < 1:
        raise ValueError("average precision of a query without positives is not defined; skip the query")


# ------------------------------------------------------------------------------------------------ queries and sets


@dataclass(frozen=True, slots=True)
class QueryScore:
    """AP and other figures of one query by name; `num_positive` 0 means that it is skipped (all are NaN)."""

    ap: float
    figures: Mapping[str, float]
    num_positive: int
    num_found: int


def score_query(ranks: Ints, num_positive: int, ks: Sequence[int] = KS) -> QueryScore:
    """AP by trapezoids and precision at each of `ks`, as the original and the revisited protocol have it."""
    if not num_positive:
        return QueryScore(float("nan"), {f"p@{k}": float("nan") for k in ks}, 0, 0)
    precision = {f"p@{k}": precision_at(ranks, k) for k in ks}
    return QueryScore(average_precision(ranks, num_positive), precision, num_positive, len(ranks))


def score_query_at(ranks: Ints, num_positive: int, k: int, ks: Sequence[int] = KS) -> QueryScore:
    """AP@k, and recall at each of `ks` and at k."""
    ks = sorted({*ks, k})
    if not num_positive:
        return QueryScore(float("nan"), {f"recall@{k}": float("nan") for k in ks}, 0, 0)
    recall = {f"recall@{k}": recall_at(ranks, num_positive, k) for k in ks}
    return QueryScore(average_precision_at(ranks, num_positive, k), recall, num_positive, len(ranks))


def bootstrap_interval(
    values: Floats, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over queries, drawn with replacement.

    Says how far the mean would move with other queries of the same kind; it knows nothing of training seeds. Of fewer
    than two values it is NaN.
    """
    if len(values) < 2:
        return (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    step = max(1, DRAWN_AT_A_TIME // len(values))
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (min(step, draws - start), len(values)))].mean(axis=1)
            for start in range(0, draws, step)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(scores: Sequence[QueryScore], *, seed: int = 0) -> dict[str, Any]:
    """mAP with its bootstrap interval, the means of the other figures (`mp@1` of `p@1`) and the number of queries.

    All are fractions. Queries without positives are skipped (ROxford Easy counts 68 of 70).
    """
    counted = [s for s in scores if s.num_positive]
    if not counted:
        return {"map": None, "num_queries": 0}
    ap = np.array([s.ap for s in counted])
    low, high = bootstrap_interval(ap, seed=seed)
    means = {name: float(np.mean([s.figures[name] for s in counted])) for name in counted[0].figures}
    return {
        "map": float(ap.mean()),
        "map_interval": None if np.isnan(low) else [low, high],
        **{f"m{name}" if name.startswith("p@") else name: value for name, value in means.items()},
        "num_queries": len(counted),
        "num_positive": int(sum(s.num_positive for s in counted)),
        "num_found": int(sum(s.num_found for s in counted)),
    }
