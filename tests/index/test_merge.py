"""Parts that are asked for their share, and again where they hold more, give what all of them together hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.index.merge import Lists, gather
from iir_dist.vectors import I64, top_k


@given(
    seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 5), n=st.integers(1, 300), k=st.integers(1, 350),
    levels=st.sampled_from([2, 10, 10**6]), spread=st.sampled_from([0.0, 0.3, 5.0]), holes=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_the_best_of_all_parts(seed: int, parts: int, n: int, k: int, levels: int, spread: float, holes: float) -> None:
    """Rows by chance and rows that lie together (`spread`), ties, parts of several sizes, lists that end early."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, parts, n) if spread == 0 else np.sort(rng.integers(0, parts, n))
    of[:parts] = np.arange(parts)[:n]  # no part is empty
    scores = (rng.random((3, n)) * levels // 1 + spread * levels * of).astype(np.float32)
    rows = np.where(rng.random((3, n)) < holes, -1, np.arange(n))
    scores[rows < 0] = -np.inf
    counts = dict(enumerate(np.bincount(of).tolist()))

    def ask(queries: slice | I64, depths: Mapping[int, int]) -> list[Lists]:
        return [
            top_k(scores[queries][:, of == part], rows[queries][:, of == part], depth, larger_is_better=True)
            for part, depth in depths.items()
        ]

    found = gather(ask, counts, k)
    expected = top_k(scores, rows, k, larger_is_better=True)
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])


def test_only_as_many_as_are_needed_are_asked_for() -> None:
    """Spread by chance one round of little more than a share is enough; what lies in one part is fetched from there alone."""
    n, k, asked = 20_000, 1000, []

    def of(scores: np.ndarray) -> tuple[Lists, list[tuple[int, Mapping[int, int]]]]:
        rounds: list[tuple[int, Mapping[int, int]]] = []

        def ask(queries: slice | I64, depths: Mapping[int, int]) -> list[Lists]:
            part = scores[queries]
            rounds.append((len(part), depths))
            halves = {0: slice(0, n // 2), 1: slice(n // 2, n)}
            return [
                top_k(part[:, halves[p]], np.arange(n)[halves[p]], m, larger_is_better=True) for p, m in depths.items()
            ]

        return gather(ask, {0: n // 2, 1: n // 2}, k), rounds

    scores = np.random.default_rng(0).random((4, n), np.float32)
    _, asked = of(scores)
    assert len(asked) == 1
    assert sum(asked[0][1].values()) < 1.5 * k
    scores[1, : n // 2] += 1
    found, asked = of(scores)
    assert asked[1:] == [(1, {0: k})]
    assert np.array_equal(found[1], top_k(scores, np.arange(n), k, larger_is_better=True)[1])
