"""Ranks and figures of each query at each level of a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from iir_dist import metrics
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth, Query
from iir_dist.errors import GroundTruthError
from iir_dist.evaluate.rankings import I32, I64, Rankings, Scores, matching
from iir_dist.metrics import QueryScore


@dataclass(frozen=True, slots=True)
class Scored:
    """One query at one level: its list, the places of the positives and of the ignored images in it, and the score."""

    list_of: str
    ranked: I32
    positive_at: I64
    ignored_at: I64
    score: QueryScore

    @property
    def ranks(self) -> I64:
        """Ranks of the positives, the ignored images not counted."""
        return metrics.ranks_at(self.positive_at, self.ignored_at)


def score(rankings: Rankings, truth: GroundTruth, numbers: Mapping[str, int], k: int = 100) -> dict[str, list[Scored]]:
    """Score every query at every level of the protocol.

    Args:
        numbers: what `numbers_of` gives.
        k: of AP@k, for the custom protocol.

    Raises:
        GroundTruthError: a query has no list, a list holds what the protocol keeps out of the database, or the ground
            truth is that of another set.
    """
    lists = lists_of(rankings, truth)
    _check_set(rankings, truth, numbers)
    # An image that is in no list gets a number of its own, so that it counts as a positive never found.
    unseen = {name: -1 - i for i, name in enumerate(sorted(truth.images() - numbers.keys()))}
    numbers = {**numbers, **unseen}
    labelled = np.zeros(len(rankings.names), bool)
    found: dict[str, list[Scored]] = {level: [] for level in truth.levels()}
    for query, key in zip(truth.queries, lists, strict=True):
        ranked = rankings.lists[key]
        own = _numbers(query, [*query.labels], numbers, query.image)
        labelled[own[own >= 0]] = True
        at = np.flatnonzero(labelled[ranked])
        images = ranked[at]
        labelled[own[own >= 0]] = False
        for level, (good, junk) in truth.levels().items():
            positive, ignored = (_numbers(query, labels, numbers) for labels in (good, junk))
            if truth.protocol == "custom":  # a query never asks for its own photo, unless it is labelled so
                ignored = np.union1d(ignored, np.setdiff1d([numbers[query.image]], positive))
            positive = np.setdiff1d(positive, ignored)
            good_at, junk_at = at[np.isin(images, positive)], at[np.isin(images, ignored)]
            ranks = metrics.ranks_at(good_at, junk_at)
            if truth.protocol == "custom":
                result = metrics.score_query_at(ranks, len(positive), k)
            else:
                result = metrics.score_query(ranks, len(positive))
            found[level].append(Scored(key, ranked, good_at, junk_at, result))
    return found


def _numbers(query: Query, labels: Sequence[str], numbers: Mapping[str, int], *more: str) -> I64:
    names = [*more, *(name for label in labels for name in query.labels[label])]
    return np.unique(np.array([numbers[name] for name in names], np.int64))


def numbers_of(rankings: Rankings, truth: GroundTruth) -> dict[str, int]:
    """Numbers of the images that the ground truth names, those that are in no list left out.

    Raises:
        GroundTruthError: two images of the rankings have the name of one that is labelled.
    """
    wanted = sorted(truth.images())
    there: dict[str, int] = {}
    twice: set[str] = set()
    for name, number in matching(rankings.names, wanted):
        if name in there:
            twice.add(name)
        there[name] = number
    found = {name: target for name, target in groundtruth.match(wanted, there).items() if target in there}
    ambiguous = sorted(twice & set(found.values()))
    if ambiguous:
        raise GroundTruthError(
            f"{len(ambiguous)} labelled names stand for several images of the rankings (first {ambiguous[0]!r}); "
            "ingest the folders so that their names differ"
        )
    return {name: there[target] for name, target in found.items()}


def _check_set(rankings: Rankings, truth: GroundTruth, numbers: Mapping[str, int]) -> None:
    if truth.protocol == "revisited":
        inside = sorted({q.image for q in truth.queries} & numbers.keys() - set(truth.database or ()))
        if inside:
            raise GroundTruthError(
                f"the rankings list {len(inside)} query images (first {inside[0]!r}), which the revisited protocol keeps "
                "out of the database; ingest with this ground truth (iir ingest --groundtruth), then embed and search again"
            )
    labelled = {name for query in truth.queries for names in query.labels.values() for name in names}
    if labelled and not labelled & numbers.keys():
        examples = ", ".join(rankings.names[:3].to_pylist())
        raise GroundTruthError(
            f"none of the {len(labelled)} images that the ground truth labels is in the rankings, which name {examples}, …; "
            "expected the ground truth of the set that was searched"
        )


def lists_of(rankings: Rankings, truth: GroundTruth) -> list[str]:
    """The list of each query, found by the query's name or by its image's."""
    found = groundtruth.match_queries(truth.queries, rankings.lists)
    missing = [q.name for q, key in zip(truth.queries, found, strict=True) if key is None]
    if missing:
        raise GroundTruthError(
            f"{len(missing)} of {len(truth.queries)} queries of the ground truth have no list (first {missing[0]!r}); "
            f"the rankings are of {', '.join(list(rankings.lists)[:3])}, …"
        )
    return [key for key in found if key is not None]


def micro_ap(scored: Sequence[Scored], scores: Mapping[str, Scores], k: int) -> float | None:
    """Micro AP over the first k of all lists, queries without positives included; None without scores or positives."""
    num_positive = sum(s.score.num_positive for s in scored)
    if not num_positive or not scores:
        return None
    values, right, _ = _pairs(scored, scores, k)
    return metrics.micro_average_precision(values, right, num_positive)


def micro_ap_interval(
    scored: Sequence[Scored],
    scores: Mapping[str, Scores],
    k: int,
    *,
    seed: int = 0,
    draws: int = 1_000,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of micro AP over queries that are drawn with replacement, each with all its pairs.

    A draw counts a pair as often as its query was drawn. None where `micro_ap` is, and of fewer than two queries.
    """
    positives = np.array([s.score.num_positive for s in scored])
    if len(scored) < 2 or not positives.any() or not scores:
        return None
    values, right, query = _pairs(scored, scores, k)
    order = np.argsort(-values, kind="stable")
    values, right, query = values[order], right[order], query[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # of pairs of equal score
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, len(scored), len(scored)), minlength=len(scored))
        if num_positive := int(times @ positives):
            counts = times[query]
            found, seen = np.cumsum(counts * right)[last], np.cumsum(counts)[last]
            drawn.append(float((np.diff(found, prepend=0) * found / np.maximum(seen, 1)).sum() / num_positive))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pairs(scored: Sequence[Scored], scores: Mapping[str, Scores], k: int) -> tuple[Scores, npt.NDArray[np.bool_], I64]:
    """Score, verdict and number of the query of all pairs among the first k that are not ignored."""
    values, right, query = [], [], []
    for number, s in enumerate(scored):
        kept = np.setdiff1d(np.arange(min(len(s.ranked), k + len(s.ignored_at))), s.ignored_at)[:k]
        values.append(scores[s.list_of][kept])
        right.append(np.isin(kept, s.positive_at))
        query.append(np.full(len(kept), number))
    return np.concatenate(values), np.concatenate(right), np.concatenate(query)
