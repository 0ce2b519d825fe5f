"""Metrics against rankings worked by hand, a slow transcription of the published loop, and the real ground truth."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iir_dist import metrics
from iir_dist.data import groundtruth
from iir_dist.data.rankings import Rankings
from iir_dist.evaluate import score


def slow_ap(ranked: list[str], positive: set[str], ignored: set[str]) -> float:
    """The loop of the Oxford5k annotation's compute_ap."""
    old_recall, old_precision, ap = 0.0, 1.0, 0.0
    hits = seen = 0
    for name in ranked:
        if name in ignored:
            continue
        if name in positive:
            hits += 1
        recall, precision = hits / len(positive), hits / (seen + 1.0)
        ap += (recall - old_recall) * (old_precision + precision) / 2.0
        old_recall, old_precision = recall, precision
        seen += 1
    return ap


def slow_precision(ranked: list[str], positive: set[str], ignored: set[str], k: int) -> float:
    """mP@k of the revisited code: positions from 1 of the positives, junk removed, depth min(max position, k)."""
    kept = [name for name in ranked if name not in ignored]
    positions = [i + 1 for i, name in enumerate(kept) if name in positive]
    depth = min(max(positions), k)
    return sum(p <= depth for p in positions) / depth


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_worked_by_hand() -> None:
    """List P N P J N P with one more positive that is never found; N+ = 4.

    Without the ignored J the positives have ranks 0, 2, 4. Trapezoids: (1 + 1)/2, (1/2 + 2/3)/2, (2/4 + 3/5)/2.
    """
    ranked, positive, ignored = ids(10, 20, 11, 30, 21, 12), ids(10, 11, 12, 13), ids(30)
    ranks = metrics.positive_ranks(ranked, positive, ignored)
    assert ranks.tolist() == [0, 2, 4]
    assert metrics.average_precision(ranks, 4) == pytest.approx(
        (1 + (0.5 + 2 / 3) / 2 + (0.5 + 0.6) / 2) / 4, abs=1e-15
    )
    assert metrics.exact_average_precision(ranks, 4) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4, abs=1e-15)
    assert metrics.precision_at(ranks, 1) == 1.0
    assert metrics.precision_at(ranks, 4) == 0.5
    assert metrics.precision_at(ranks, 10) == pytest.approx(3 / 5)  # depth is the last positive's position


def test_perfect_and_worst() -> None:
    assert metrics.average_precision(np.arange(5), 5) == 1.0
    assert metrics.average_precision(ids(), 5) == 0.0
    assert metrics.precision_at(ids(), 10) == 0.0


def test_a_query_without_positives_is_skipped() -> None:
    skipped = metrics.score_query(ids(1, 2), ids(), ids(1))
    counted = metrics.score_query(ids(1, 2), ids(1), ids())
    summary = metrics.summarize([skipped, counted])
    assert summary["num_queries"] == 1
    assert summary["map"] == 1.0
    assert metrics.summarize([skipped]) == {"map": None, "num_queries": 0}
    with pytest.raises(ValueError, match="without positives"):
        metrics.average_precision(ids(), 0)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), depth=st.integers(0, 60))
def test_equals_the_slow_loop(n: int, seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    ranked = rng.permutation(n)[: max(1, depth)]
    kind = rng.integers(0, 3, n)  # 0 negative, 1 positive, 2 ignored
    kind[rng.integers(n)] = 1
    positive, ignored = np.flatnonzero(kind == 1), np.flatnonzero(kind == 2)
    found = metrics.score_query(ranked, positive, ignored)
    names = [str(i) for i in ranked]
    assert found.ap == pytest.approx(slow_ap(names, set(map(str, positive)), set(map(str, ignored))), abs=1e-12)
    # Where ignored images lie in the list changes nothing.
    shuffled = np.concatenate([ignored, ranked[~np.isin(ranked, ignored)]])
    assert metrics.score_query(shuffled, positive, ignored).ap == found.ap


@pytest.mark.parametrize(
    ("path", "counted"),
    [
        ("revisitop/gnd_roxford5k.pkl", {"easy": 68, "medium": 70, "hard": 70}),
        ("revisitop/gnd_rparis6k.pkl", {"easy": 70, "medium": 70, "hard": 70}),
        ("wonders11/gnd_wonders11.pkl", {"easy": 55}),
        ("oxford5k_gt_files", {"original": 55}),
        ("paris6k_gt_files", {"original": 55}),
        ("wonders11/gt_files", {"original": 55}),
    ],
)
def test_real_ground_truth_on_random_rankings(shared: Path, path: str, counted: dict[str, int]) -> None:
    truth = groundtruth.read(shared / "groundtruth" / path)
    rng = np.random.default_rng(3)
    labelled = truth.images() if truth.protocol == "original" else set(truth.database or ())
    names = sorted(labelled) + [f"distractor_{i}" for i in range(500)]
    rankings = Rankings({q.name: rng.permutation(len(names)) for q in truth.queries}, names)
    found = score(rankings, truth)
    assert {
        level: metrics.summarize([s.score for s in column])["num_queries"] for level, column in found.items()
    } == counted
    for level, (positive_labels, ignored_labels) in truth.levels().items():
        for query, scored in zip(truth.queries, found[level], strict=True):
            positive = {n for label in positive_labels for n in query.labels[label]}
            ignored = {n for label in ignored_labels for n in query.labels[label]}
            ranked = [names[i] for i in rankings.lists[query.name]]
            if not positive:
                assert scored.score.num_positive == 0
                continue
            assert scored.score.ap == pytest.approx(slow_ap(ranked, positive, ignored), abs=1e-9)
            for k, p in zip((1, 5, 10), scored.score.precision, strict=True):
                assert p == pytest.approx(slow_precision(ranked, positive, ignored, k), abs=1e-9)


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    values = np.random.default_rng(0).uniform(size=50)
    low, high = metrics.bootstrap_interval(values, seed=1)
    assert (low, high) == metrics.bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    # The half-width of a mean of 50 uniforms is about 1.96 * 0.289 / sqrt(50) = 0.080.
    assert high - low == pytest.approx(0.16, abs=0.03)
    assert np.isnan(metrics.bootstrap_interval(values[:1])[0])


def test_precision_recall_curve() -> None:
    assert metrics.precision_at_recall(np.arange(4), 4).tolist() == [1.0] * 21
    curve = metrics.precision_at_recall(ids(1), 2, points=3)  # one of two found, at rank 1
    assert curve.tolist() == [0.5, 0.5, 0.0]
