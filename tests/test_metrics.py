"""Metrics against rankings worked by hand, a slow transcription of the published loop, and the real ground truth."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iir_dist import metrics
from iir_dist.data import groundtruth
from iir_dist.evaluate import Rankings, numbers_of, score


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


def slow_ap_at(ranked: list[str], positive: set[str], ignored: set[str], k: int) -> float:
    """The loop of the Google Landmarks retrieval metric."""
    hits, total = 0, 0.0
    for place, name in enumerate([n for n in ranked if n not in ignored][:k]):
        if name in positive:
            hits += 1
            total += hits / (place + 1.0)
    return total / min(len(positive), k)


def slow_micro_ap(pairs: list[tuple[float, bool]], num_positive: int) -> float:
    """Threshold by threshold: what each new one adds to recall, times the precision there."""
    total = old = 0.0
    for threshold in sorted({value for value, _ in pairs}, reverse=True):
        above = [right for value, right in pairs if value >= threshold]
        recall = sum(above) / num_positive
        total += (recall - old) * sum(above) / len(above)
        old = recall
    return total


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
    skipped, counted = metrics.score_query(ids(), 0), metrics.score_query(ids(0), 1)
    summary = metrics.summarize([skipped, counted])
    assert summary["num_queries"] == 1
    assert summary["map"] == 1.0
    assert metrics.summarize([skipped]) == {"map": None, "num_queries": 0}
    for function in (metrics.average_precision, metrics.exact_average_precision):
        with pytest.raises(ValueError, match="without positives"):
            function(ids(), 0)
    nothing = metrics.score_query_at(ids(), 0, 10)
    assert np.isnan(nothing.ap)
    assert metrics.summarize([nothing]) == {"map": None, "num_queries": 0}


def test_cut_at_k_worked_by_hand() -> None:
    """Ranks 0, 2 and 9 of five positives. AP@3: (1/1 + 2/3) / 3. AP@10: (1/1 + 2/3 + 3/10) / 5."""
    found = metrics.score_query_at(ids(0, 2, 9), 5, 3, ks=(1, 10))
    assert found.ap == pytest.approx((1 + 2 / 3) / 3, abs=1e-15)
    assert found.figures == pytest.approx({"recall@1": 1 / 5, "recall@3": 2 / 5, "recall@10": 3 / 5}, abs=1e-15)
    assert metrics.average_precision_at(ids(0, 2, 9), 5, 10) == pytest.approx((1 + 2 / 3 + 0.3) / 5, abs=1e-15)
    assert metrics.average_precision_at(np.arange(3), 50, 3) == 1.0  # more positives than places
    assert metrics.average_precision_at(ids(7), 5, 3) == 0.0


def test_micro_ap_worked_by_hand() -> None:
    """Right, wrong, right at 0.9, 0.8, 0.7, with one positive pair that is not there: (1/1 + 2/3) / 3."""
    scores, right = np.array([0.7, 0.9, 0.8]), np.array([True, True, False])
    assert metrics.micro_average_precision(scores, right, 3) == pytest.approx((1 + 2 / 3) / 3, abs=1e-15)
    tied = np.array([0.9, 0.9, 0.9])  # one threshold: precision 2/3, recall 2/3
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert metrics.micro_average_precision(tied, right[order], 3) == pytest.approx(4 / 9, abs=1e-15)
    assert metrics.micro_average_precision(np.zeros(0), np.zeros(0, bool), 3) == 0.0


@given(n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 30), more=st.integers(1, 3))
def test_micro_ap_equals_the_slow_loop(n: int, seed: int, levels: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    scores, right = rng.integers(0, levels, n) / 7, rng.integers(0, 2, n).astype(bool)
    num_positive = int(right.sum()) + more
    pairs = list(zip(scores.tolist(), right.tolist(), strict=True))
    expected = slow_micro_ap(pairs, num_positive)
    assert metrics.micro_average_precision(scores, right, num_positive) == pytest.approx(expected, abs=1e-12)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), depth=st.integers(0, 60))
def test_equals_the_slow_loop(n: int, seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    ranked = rng.permutation(n)[: max(1, depth)]
    kind = rng.integers(0, 3, n)  # 0 negative, 1 positive, 2 ignored
    kind[rng.integers(n)] = 1
    positive, ignored = np.flatnonzero(kind == 1), np.flatnonzero(kind == 2)
    ranks = metrics.positive_ranks(ranked, positive, ignored)
    place = np.argsort(np.concatenate([ranked, np.setdiff1d(np.arange(n), ranked)]))
    at, junk_at = (np.sort(p[p < len(ranked)]) for p in (place[positive], place[ignored]))
    assert metrics.ranks_at(at, junk_at).tolist() == ranks.tolist()
    names, right, junk = [str(i) for i in ranked], set(map(str, positive)), set(map(str, ignored))
    found = metrics.score_query(ranks, len(positive))
    assert found.ap == pytest.approx(slow_ap(names, right, junk), abs=1e-12)
    for k in (1, 3, 100):
        assert metrics.average_precision_at(ranks, len(positive), k) == pytest.approx(
            slow_ap_at(names, right, junk, k), abs=1e-12
        )
    # Where ignored images lie in the list changes nothing.
    shuffled = np.concatenate([ignored, ranked[~np.isin(ranked, ignored)]])
    assert metrics.positive_ranks(shuffled, positive, ignored).tolist() == ranks.tolist()


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
    lists = {q.name: rng.permutation(len(names)).astype(np.int32) for q in truth.queries}
    rankings = Rankings(lists, pa.array(names, pa.large_string()))
    found = score(rankings, truth, numbers_of(rankings, truth))
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
            for k in (1, 5, 10):
                expected = slow_precision(ranked, positive, ignored, k)
                assert scored.score.figures[f"p@{k}"] == pytest.approx(expected, abs=1e-9)


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    values = np.random.default_rng(0).uniform(size=50)
    low, high = metrics.bootstrap_interval(values, seed=1)
    assert (low, high) == metrics.bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    # The half-width of a mean of 50 uniforms is about 1.96 * 0.289 / sqrt(50) = 0.080.
    assert high - low == pytest.approx(0.16, abs=0.03)
    assert np.isnan(metrics.bootstrap_interval(values[:1])[0])
    assert metrics.bootstrap_interval(np.ones(9)) == (1.0, 1.0)


def test_bootstrap_in_pieces_is_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 queries a draw of all at once would hold 1.6 GB."""
    values = np.random.default_rng(0).uniform(size=50)
    whole = metrics.bootstrap_interval(values)
    monkeypatch.setattr(metrics, "DRAWN_AT_A_TIME", 333)
    assert metrics.bootstrap_interval(values) == whole


def test_the_interval_covers() -> None:
    """Of 200 sets of 60 queries, about 95 % of the intervals hold the mean that the queries were drawn from."""
    rng = np.random.default_rng(5)
    intervals = [metrics.bootstrap_interval(rng.beta(2, 1, 60), seed=i, draws=500) for i in range(200)]
    covered = sum(low <= 2 / 3 <= high for low, high in intervals)
    assert 180 <= covered <= 198


def test_precision_recall_curve() -> None:
    assert metrics.precision_at_recall(np.arange(4), 4).tolist() == [1.0] * 21
    curve = metrics.precision_at_recall(ids(1), 2, points=3)  # one of two found, at rank 1
    assert curve.tolist() == [0.5, 0.5, 0.0]
