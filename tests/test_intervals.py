"""Intervals of the figures of an evaluation: against the same thing done slowly."""

from __future__ import annotations

import numpy as np
import pytest

from iir_dist import metrics
from iir_dist.evaluate.score import Scored, micro_ap, micro_ap_interval
from iir_dist.metrics import score_query_at

K = 12


def made(nq: int, seed: int) -> tuple[list[Scored], dict[str, np.ndarray]]:
    """Lists of 20 images with up to 5 positives and an ignored image; scores of one decimal, so many are equal."""
    rng = np.random.default_rng(seed)
    scored, scores = [], {}
    for q in range(nq):
        places = rng.permutation(20)
        ignored, positive = np.sort(places[:1]), np.sort(places[1 : 1 + rng.integers(0, 6)])
        result = score_query_at(metrics.ranks_at(positive, ignored), len(positive), K)
        scored.append(Scored(f"q{q}", np.arange(20, dtype=np.int32), positive, ignored, result))
        scores[f"q{q}"] = np.sort(rng.integers(0, 10, 20) / 10 + 0.1 * q)[::-1].astype(np.float32)
    return scored, scores


def test_micro_ap_of_drawn_queries() -> None:
    """A draw is micro AP of lists in which a query stands as often as it was drawn."""
    scored, scores = made(6, 1)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(200):
        picks = rng.integers(0, 6, 6)
        found = micro_ap([scored[i] for i in picks], scores, K)
        if found is not None:
            drawn.append(found)
    found = micro_ap_interval(scored, scores, K, seed=5, draws=200)
    assert found == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-12)
    whole = micro_ap(scored, scores, K)
    assert whole is not None
    assert found is not None
    assert found[0] < whole < found[1]


def test_what_has_no_interval() -> None:
    scored, scores = made(6, 1)
    assert micro_ap_interval(scored[:1], scores, K) is None
    assert micro_ap_interval(scored, {}, K) is None
    without = [s for s in scored if not s.score.num_positive] * 2
    assert micro_ap_interval(without, scores, K) is None
