"""From average precisions to a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from iir_dist.errors import MismatchError
from iir_dist.metrics import bootstrap_interval
from iir_dist.study.verdict import interval, judge, paired, sentence


def aps(values: np.ndarray) -> dict[int, dict[str, float]]:
    return {s: {f"q{i}": float(v) for i, v in enumerate(row)} for s, row in enumerate(values)}


def test_with_one_seed_it_is_the_bootstrap_over_queries() -> None:
    d = np.random.default_rng(0).normal(0.03, 0.1, (1, 60))
    assert interval(d) == pytest.approx(bootstrap_interval(d[0]), abs=2e-3)


def test_seeds_that_disagree_widen_it() -> None:
    """Two seeds, +0.1 and -0.1 for every query: their resampled mean is -0.1, 0 or 0.1 with odds of 1, 2, 1."""
    d = np.array([[0.1] * 20, [-0.1] * 20])
    assert interval(d) == pytest.approx((-0.1, 0.1))
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.1, 55)
    agree, disagree = (np.array([noise + 0.04 + s for s in shifts]) for shifts in ((0, 0, 0), (-0.04, 0, 0.04)))
    assert np.ptp(interval(disagree)) > np.ptp(interval(agree))  # type: ignore[arg-type]


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    """150 studies of three seeds and 40 queries, both with effects of their own: the true difference is inside in 90 % and more."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(150):
        d = 0.05 + rng.normal(0, 0.005, (3, 1)) + rng.normal(0, 0.1, (1, 40)) + rng.normal(0, 0.03, (3, 40))
        low, high = interval(d, draws=1000)  # type: ignore[misc]
        inside += low <= 0.05 <= high
    assert inside >= 135


def test_pairs() -> None:
    one, three = aps(np.full((1, 4), 0.5)), aps(np.arange(12).reshape(3, 4) / 12)
    assert paired(three, one) == pytest.approx(np.arange(12).reshape(3, 4) / 12 - 0.5)
    with pytest.raises(MismatchError, match="seed 2"):
        paired(three, {0: three[0], 1: three[1]})
    with pytest.raises(MismatchError, match="different queries"):
        paired(one, {0: {"x": 1.0}})


def test_sentences_follow_from_the_interval() -> None:
    base = np.random.default_rng(3).uniform(0.2, 0.8, (3, 50))
    better = judge("H", ("A", aps(base + 0.1)), ("B", aps(base)), "set", "easy")
    assert better.sentence == "On set, easy, A is better than B by 10.0 points of mAP (95 % interval 10.0 to 10.0)."
    worse = judge("H", ("B", aps(base)), ("A", aps(base + 0.1)), "set", "easy")
    assert worse.sentence == "On set, easy, B is worse than A by 10.0 points of mAP (95 % interval 10.0 to 10.0)."
    unclear = judge("H", ("A", aps(base)), ("B", aps(base[:, ::-1])), "set", "easy")
    assert unclear.interval is not None
    assert unclear.interval[0] < 0 < unclear.interval[1]
    assert "cannot be told apart at this scale" in unclear.sentence
    assert better.mean_a - better.mean_b == pytest.approx(better.difference)
    one = judge("H", ("A", aps(base[:1])), ("B", aps(base[1:2] * 0)), "set", "easy")
    assert one.sentence.endswith("One seed: what another training would give is not in the interval.")
    assert "too few" in sentence("A", "B", "set", 0.1, None, 1)


def test_the_edge_of_an_interval_is_not_outside() -> None:
    assert "cannot be told apart" in sentence("A", "B", "set", 0.02, (0.0, 0.04), 3)
