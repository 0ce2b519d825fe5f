"""Top-k and its merge against a full sort, ties included."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.vectors import merge_top_k, normalize, top_k


def slow_top_k(scores: np.ndarray, ids: np.ndarray, k: int, larger: bool) -> list[list[int]]:
    result = []
    for row in scores:
        pairs = sorted(zip(row, ids, strict=True), key=lambda p: (-p[0] if larger else p[0], p[1]))
        result.append([int(i) for _, i in pairs[:k]])
    return result


@given(
    nq=st.integers(1, 4), nb=st.integers(1, 80), k=st.integers(1, 90), levels=st.integers(1, 6), larger=st.booleans(),
    shards=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), first=st.sampled_from([0, 2**32 - 500, 2**40]),
    signed=st.booleans(),
)  # fmt: skip
def test_sharded_merge_equals_full_sort(
    nq: int, nb: int, k: int, levels: int, larger: bool, shards: int, seed: int, first: int, signed: bool
) -> None:
    """Ids beyond 32 bits and zeros of both signs too."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels * signed, levels, (nq, nb)).astype(np.float32)  # few levels: many ties
    scores[scores == 0] *= rng.choice([-1, 1])
    ids = first + rng.permutation(1000)[:nb].astype(np.int64)
    expected = slow_top_k(scores, ids, k, larger)
    cuts = np.linspace(0, nb, shards + 1).astype(int)
    parts = [top_k(scores[:, a:b], ids[a:b], k, larger_is_better=larger) for a, b in pairwise(cuts) if b > a]
    found_scores, found = merge_top_k(parts, k, larger_is_better=larger)
    assert found.tolist() == expected
    position = {i: n for n, i in enumerate(ids.tolist())}
    for q, row in enumerate(found.tolist()):
        assert found_scores[q].tolist() == [scores[q, position[i]] for i in row]


def test_holes_are_never_better_than_entries() -> None:
    scores = np.float32([[-3.4e38, 0.1, 9.0]])
    ids = np.int64([[4, 5, -1]])
    found_scores, found = top_k(scores, ids, 3, larger_is_better=True)
    assert found.tolist() == [[5, 4, -1]]
    assert found_scores.tolist() == [[np.float32(0.1), np.float32(-3.4e38), -np.inf]]
    assert top_k(scores, ids, 3, larger_is_better=False)[0].tolist() == [[np.float32(-3.4e38), np.float32(0.1), np.inf]]


def test_scores_come_back_bit_for_bit() -> None:
    x = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    scores, ids = top_k(x, np.arange(1000), 400, larger_is_better=True)
    assert scores.tobytes() == np.take_along_axis(x, ids, axis=1).tobytes()
    assert (scores == -np.sort(-x, axis=1)[:, :400]).all()


def test_direction_has_no_default() -> None:
    with pytest.raises(TypeError):
        top_k(np.zeros((1, 1), np.float32), np.zeros(1, np.int64), 1)  # type: ignore[call-arg]


def test_normalize() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]])
    assert normalize(x)[0].tolist() == pytest.approx([0.6, 0.8])
    assert normalize(x)[1].tolist() == [0.0, 0.0]
    assert np.isfinite(normalize(x)).all()
    assert normalize(x).dtype == np.float32
