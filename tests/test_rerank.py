"""Re-ranking against its formulas written out, by hand, by its properties, and as a stage."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import rerank_reference as slow
from indexed import make_index, random_unit, write_vectors
from pydantic import BaseModel, TypeAdapter, ValidationError

from iir_dist.artifact import Manifest, verify
from iir_dist.config import build
from iir_dist.data.collection import open_collection
from iir_dist.data.embeddings import Embeddings
from iir_dist.errors import ConfigError, CorruptError, InputError, MismatchError
from iir_dist.evaluate.rankings import open_rankings
from iir_dist.index import living
from iir_dist.index import search as searching
from iir_dist.index.engine import open_index
from iir_dist.index.search import RANKINGS, RankingsWriter, SearchConfig
from iir_dist.rerank import interface, method, stage
from iir_dist.rerank.augmentation import Augmentation
from iir_dist.rerank.diffusion import Diffusion
from iir_dist.rerank.expansion import QueryExpansion
from iir_dist.rerank.interface import METHODS, RerankConfig, expand, rerank
from iir_dist.rerank.method import Method, best, nearest
from iir_dist.rerank.sources import CollectionSource, IndexSource
from iir_dist.rerank.superglobal import SuperGlobal
from iir_dist.vectors import F32, I64, normalize

IN_LIST = (
    QueryExpansion(again="list", n=25, k=4), QueryExpansion(again="list", n=30, k=20, alpha=1.5),
    QueryExpansion(again="list", n=30, k=6, alpha=0),
    Augmentation(n=25, k=3), Augmentation(n=30, k=5, alpha=0), Augmentation(n=30, k=4, expand=6, expand_alpha=1.5),
    SuperGlobal(n=25, k=4), SuperGlobal(n=30, beta=0.4),
    Diffusion(n=25, k=6, kq=3), Diffusion(n=30, k=12, kq=5, alpha=0.8, gamma=2, iterations=7),
)  # fmt: skip
ids = [f"{c.name}-{i}" for i, c in enumerate(IN_LIST)]  # type: ignore[attr-defined]
each = pytest.mark.parametrize("config", IN_LIST, ids=ids)


def f32(values: Sequence[object]) -> F32:
    return np.array(values, np.float32)


def half(x: F32) -> F32:
    """As an index holds them."""
    return x.astype(np.float16).astype(np.float32)


def clustered(n: int, dim: int, seed: int, noise: float = 0.5, clusters: int = 6) -> tuple[F32, I64]:
    """Vectors around some directions, and which."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(clusters, size=n)
    centres = normalize(np.random.default_rng(0).normal(size=(clusters, dim)))
    return normalize(centres[labels] + noise * rng.normal(size=(n, dim)) / np.sqrt(dim)), labels


def data(kind: str, n: int, dim: int, seed: int) -> F32:
    return half(random_unit(n, dim, seed) if kind == "random" else clustered(n, dim, seed, noise=1.0)[0])


def lists(xq: F32, xb: F32) -> I64:
    return np.argsort(-(xq @ xb.T), axis=1, kind="stable")


def expected(config: Method, q: F32, xb: F32, listed: Sequence[int]) -> tuple[list[float], list[int]]:
    """By the slow formulas: the scores of what is re-ranked, and the whole list."""
    own = sorted(r for r in listed[: config.taken] if r >= 0)
    x = xb[own].tolist()
    if isinstance(config, QueryExpansion):
        scores = slow.query_expansion(q.tolist(), x, config.k, config.alpha)
    elif isinstance(config, Augmentation):
        scores = slow.augmentation(q.tolist(), x, config.k, config.alpha, config.expand, config.expand_alpha)
    elif isinstance(config, SuperGlobal):
        scores = slow.superglobal(q.tolist(), x, config.k, config.beta)
    else:
        assert isinstance(config, Diffusion)
        scores = slow.diffusion(
            q.tolist(), x, config.k, config.kq, config.alpha, config.gamma, config.iterations, config.tolerance
        )
    order = [i for i in slow.largest(scores, len(scores)) if scores[i] > -np.inf]
    first = [own[i] for i in order]
    return [scores[i] for i in order], first + [r for r in listed if r >= 0 and r not in first]


# ------------------------------------------------------------------------------------------------ formulas


@each
@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("count", [12, 40])
def test_as_the_formulas_say(config: Method, kind: str, count: int) -> None:
    """On more candidates than are re-ranked, and on fewer."""
    xb, xq = data(kind, count, 16, seed=1), data(kind, 6, 16, seed=2)
    rows = lists(xq, xb)
    scores, found = rerank(config, xq, rows, lambda r: xb[r])
    assert scores.dtype == np.float32
    moved = 0
    for q in range(len(xq)):
        true_scores, true_rows = expected(config, xq[q], xb, rows[q].tolist())
        told, close = len(true_scores), 2e-5 * max(1, np.abs(true_scores).max())
        by_row = dict(zip(true_rows, true_scores, strict=False))
        # Candidates that the formula gives the same, as two that are blended of the same, may change places.
        assert np.abs(scores[q, :told] - [by_row[r] for r in found[q, :told].tolist()]).max() < close
        assert np.abs(scores[q, :told] - true_scores).max() < close
        assert found[q, told:].tolist() == true_rows[told:]
        assert (np.diff(scores[q]) <= 0).all()
        moved += found[q].tolist() != rows[q].tolist()
    assert moved  # a method that left everything as it was would prove nothing


def test_query_expansion_by_hand() -> None:
    """q = (1, 0) and x0 = (.8, .6): q' is (1, 0) + .8^alpha (.8, .6), at unit norm."""
    xb = f32([[0.8, 0.6], [0.6, -0.8]])
    q = f32([[1, 0]])
    config = QueryExpansion(again="list", k=1, alpha=1)
    scores, rows = rerank(config, q, np.array([[1, 0]]), lambda r: xb[r])
    norm = np.hypot(1.64, 0.48)
    assert rows.tolist() == [[0, 1]]
    assert np.allclose(scores, [[(1.64 * 0.8 + 0.48 * 0.6) / norm, (1.64 * 0.6 - 0.48 * 0.8) / norm]], atol=1e-6)
    average = config.model_copy(update={"alpha": 0.0})
    assert np.allclose(average.expanded(q[0], xb), np.array([1.8, 0.6]) / np.hypot(1.8, 0.6), atol=1e-6)


def test_augmentation_by_hand() -> None:
    """(1, 0) and (.6, .8) are .6 similar: with alpha 1 they become (1.36, .48) and (1.2, .8), at unit norm."""
    xb = f32([[1, 0], [0.6, 0.8]])
    scores, rows = rerank(Augmentation(k=1, alpha=1), f32([[0, 1]]), np.array([[1, 0]]), lambda r: xb[r])
    assert rows.tolist() == [[1, 0]]
    assert np.allclose(scores, [[0.8 / np.hypot(1.2, 0.8), 0.48 / np.hypot(1.36, 0.48)]], atol=1e-6)


def test_diffusion_by_hand() -> None:
    """Two neighbours: S swaps them, and f = (1, alpha) y_0 / (1 - alpha^2). The third is nobody's neighbour."""
    xb = f32([[0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]])
    config = Diffusion(k=2, kq=1, alpha=0.5, gamma=1)
    scores, rows = rerank(config, f32([[1, 0, 0]]), np.array([[0, 2, 1]]), lambda r: xb[r])
    assert rows.tolist() == [[0, 1, 2]]
    assert np.allclose(scores, [[0.8 / 0.75, 0.4 / 0.75, -1]], atol=1e-6)


def test_superglobal_by_hand() -> None:
    """(1, 0) and (.6, .8) are .6 similar, each has weight .3 in the other; 1.3 is the sum of weights."""
    xb = f32([[1, 0], [0.6, 0.8]])
    scores, rows = rerank(SuperGlobal(k=1, beta=0.5), f32([[1, 0]]), np.array([[0, 1]]), lambda r: xb[r])
    first, second = (1.18 / 1.3, 0.24 / 1.3), (0.9 / 1.3, 0.8 / 1.3)
    expanded = (1.18 / 1.3, 0.8 / 1.3)
    by_hand = [(x[0] + expanded[0] * x[0] + expanded[1] * x[1]) / 2 for x in (first, second)]
    assert rows.tolist() == [[0, 1]]
    assert np.allclose(scores, [by_hand], atol=1e-6)


def test_average_query_expansion_is_alpha_0() -> None:
    """Also where a similarity is negative or 0."""
    xb, q = random_unit(5, 8, seed=1), random_unit(1, 8, seed=2)[0]
    xb[0] = -q
    mean = np.vstack([q, xb]).astype(np.float64).mean(axis=0)
    found = QueryExpansion(k=5, alpha=0).expanded(q, xb)
    assert np.abs(found - mean / np.linalg.norm(mean)).max() < 1e-6


def test_augmentation_of_a_whole_database_is_that_ahead_of_time() -> None:
    xb, xq = data("clustered", 60, 16, seed=1), data("clustered", 5, 16, seed=2)
    ahead = f32([slow.expanded(x.tolist(), np.delete(xb, i, 0).tolist(), 7, 3.0) for i, x in enumerate(xb)])
    found = rerank(Augmentation(k=7), xq, lists(xq, xb), lambda r: xb[r])[1]
    assert np.array_equal(found, lists(xq, ahead))
    # Then query expansion on the augmented database, first search and second.
    again = QueryExpansion(k=5, alpha=2)
    ranked = rerank(again, xq, lists(xq, ahead), lambda r: ahead[r], lambda x, k: (x @ ahead.T, lists(x, ahead)))[1]
    both = rerank(Augmentation(k=7, expand=5, expand_alpha=2), xq, lists(xq, xb), lambda r: xb[r])[1]
    assert np.array_equal(both, ranked)
    assert not np.array_equal(both, found)


def test_diffusion_solves_the_system() -> None:
    """With steps enough, against a direct solver; the graph is mutual and without loops."""
    xb, q = data("clustered", 40, 16, seed=1), data("clustered", 1, 16, seed=2)[0]
    config = Diffusion(k=8, kq=4, iterations=500, tolerance=1e-12)
    laplacian, y = slow.system(q.tolist(), xb.tolist(), 8, 4, 0.99, 3)
    f = np.linalg.solve(laplacian, y)
    found = np.maximum(config.scores(q, xb), 0)
    assert np.abs(found - np.where(f > 1e-12, f, 0)).max() < 1e-3 * f.max()
    graph = config.graph(xb).toarray()
    assert np.array_equal(graph, graph.T)
    assert not graph.diagonal().any()
    assert np.abs(graph - slow.affinity(xb.tolist(), 8, 3)).max() < 1e-6


# ------------------------------------------------------------------------------------------------ properties


@each
def test_the_order_of_candidates_does_not_matter(config: Method) -> None:
    """To the bit, but for what a method says nothing of, which keeps its order."""
    xb, xq = data("clustered", 50, 16, seed=1), data("clustered", 4, 16, seed=2)
    rows = lists(xq, xb)
    shuffled = rows.copy()
    head = shuffled[:, : config.taken]
    head[:] = np.random.default_rng(3).permuted(head, axis=1)
    scores, found = rerank(config, xq, rows, lambda r: xb[r])
    scores_shuffled, found_shuffled = rerank(config, xq, shuffled, lambda r: xb[r])
    assert np.array_equal(scores, scores_shuffled)
    for q in range(len(xq)):
        told = len(expected(config, xq[q], xb, rows[q].tolist())[0])
        assert found[q, :told].tolist() == found_shuffled[q, :told].tolist()
        behind = [r for r in shuffled[q].tolist() if r not in found_shuffled[q, :told]]
        assert found_shuffled[q, told:].tolist() == behind


@each
def test_numbers_of_rows_do_not_matter(config: Method) -> None:
    """But where scores are equal, up to how they are rounded."""
    xb, xq = data("clustered", 50, 16, seed=1), data("clustered", 4, 16, seed=2)
    numbers = np.random.default_rng(3).permutation(50)
    rows = lists(xq, xb)
    scores, found = rerank(config, xq, rows, lambda r: xb[r])
    scores_named, found_named = rerank(config, xq, numbers[rows], lambda r: xb[np.argsort(numbers)[r]])
    for q in range(4):
        by_row = dict(zip(numbers[found[q]].tolist(), scores[q].tolist(), strict=True))
        assert np.allclose([by_row[r] for r in found_named[q].tolist()], scores_named[q], rtol=1e-4, atol=1e-5)


@each
def test_holes_and_short_lists(config: Method) -> None:
    xb, xq = data("clustered", 40, 16, seed=1), data("clustered", 5, 16, seed=2)
    rows = lists(xq, xb)
    holed = np.full((5, 50), -1)
    holed[:, np.sort(np.random.default_rng(3).permutation(50)[:40])] = rows
    scores, found = rerank(config, xq, holed, lambda r: xb[r])
    expected_scores, expected_rows = rerank(config, xq, rows, lambda r: xb[r])
    assert np.array_equal(found[:, :40], expected_rows)
    assert np.array_equal(scores[:, :40], expected_scores)
    assert (found[:, 40:] == -1).all()
    assert np.isneginf(scores[:, 40:]).all()
    one = np.array([[3], [-1]])
    scores, found = rerank(config, xq[:2], one, lambda r: xb[r])
    assert found.tolist() == one.tolist()
    assert np.isfinite(scores[0, 0])
    for empty in (rows[:0], rows[:, :0]):
        scores, found = rerank(config, xq[: len(empty)], empty, lambda r: xb[r])
        assert scores.shape == found.shape == empty.shape


@each
def test_a_query_does_not_depend_on_those_beside_it(config: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many vectors are fetched at a time, which is bounded."""
    xb, xq = data("clustered", 50, 16, seed=1), data("clustered", 7, 16, seed=2)
    rows = lists(xq, xb)
    scores, found = rerank(config, xq, rows, lambda r: xb[r])
    fetched = []

    def fetch(wanted: I64) -> F32:
        fetched.append(len(wanted))
        return xb[wanted]

    monkeypatch.setattr(interface, "FETCHED", 2 * config.taken * 16 * 4)
    scores_few, found_few = rerank(config, xq, rows, fetch)
    assert np.array_equal(scores, scores_few)
    assert np.array_equal(found, found_few)
    assert len(fetched) == 4
    assert max(fetched) <= 2 * config.taken


@each
def test_duplicates_are_ordered_by_row(config: Method) -> None:
    """Equal vectors have equal scores, to the bit, where no number of neighbours cuts between them."""
    if isinstance(config, Diffusion):
        config = config.model_copy(update={"k": 6, "kq": 6})
    xb = np.repeat(data("clustered", 10, 16, seed=1), 3, axis=0)[np.random.default_rng(3).permutation(30)]
    xq = data("clustered", 4, 16, seed=2)
    scores, found = rerank(config.model_copy(update={"n": 30}), xq, lists(xq, xb)[:, ::-1], lambda r: xb[r])
    copies = 0
    for q in range(len(xq)):
        for x in np.unique(xb, axis=0):
            places = np.flatnonzero((xb[found[q]] == x).all(axis=1))
            if np.isin(scores[q, places[0]], -np.arange(1, 31)):
                continue  # diffusion did not reach them
            copies += 1
            assert len(set(scores[q, places].tolist())) == 1
            assert (np.diff(found[q, places]) > 0).all()
    assert copies >= 8


def test_copies_are_as_similar_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one would be alone in the last block, and its products sums in another order."""
    x = random_unit(41, 512, seed=1)
    x[40] = x[0]
    monkeypatch.setattr(method, "BLOCK", 410)
    sims, places = nearest(x, 40)
    assert places[0, 0] == 40
    assert places[40, 0] == 0
    assert np.array_equal(places[0, 1:], places[40, 1:])
    assert np.array_equal(sims[0, 1:], sims[40, 1:])


def test_equal_scores_are_ordered_by_row() -> None:
    """All the same vector, and neighbours beyond number: the order is that of rows."""
    assert best(np.tile(f32([0, 1]), 500), 100).tolist() == list(range(1, 200, 2))
    xb = np.repeat(data("random", 1, 16, seed=1), 40, axis=0)
    rows = np.random.default_rng(3).permutation(40)[None]
    for config in (QueryExpansion(again="list"), Augmentation(), SuperGlobal()):
        scores, found = rerank(config, xb[:1], rows, lambda r: xb[r])
        assert found.tolist() == [list(range(40))]
        assert len(set(scores[0].tolist())) == 1


def test_diffusion_keeps_the_order_of_what_it_does_not_reach() -> None:
    """Without edges the query's neighbours come first, by similarity, and nothing else moves."""
    xb, xq = data("random", 30, 16, seed=1), data("random", 3, 16, seed=2)
    by_similarity = lists(xq, xb)
    assert np.array_equal(rerank(Diffusion(k=1), xq, by_similarity, lambda r: xb[r])[1], by_similarity)
    any_order = np.random.default_rng(3).permuted(by_similarity, axis=1)
    scores, found = rerank(Diffusion(k=1, kq=2), xq, any_order, lambda r: xb[r])
    for q in range(3):
        first = by_similarity[q, :2].tolist()
        assert found[q].tolist() == first + [r for r in any_order[q].tolist() if r not in first]
    assert np.array_equal(scores[:, 2:], np.broadcast_to(-1.0 - np.arange(28), (3, 28)))
    # Nothing that is similar: nothing to spread.
    scores, found = rerank(Diffusion(), xq[:1], any_order[:1], lambda r: np.repeat(-xq[:1], len(r), axis=0))
    assert found.tolist() == any_order[:1].tolist()


def test_diffusion_says_nothing_where_it_is_negative() -> None:
    """As a few steps can be; the exact solution is positive or 0."""
    x, q = random_unit(12, 3, seed=42), np.random.default_rng(42).normal(size=(13, 3))[12:]
    laplacian, y = slow.system(normalize(q)[0].tolist(), x.tolist(), 3, 3, 0.99, 3)
    f = slow.conjugate_gradient(laplacian, y, 3, 1e-6)
    assert (f < -0.01).sum() == 1
    scores = Diffusion(k=3, kq=3, iterations=3).scores(normalize(q)[0], x)
    assert np.array_equal(np.isneginf(scores), f <= 0)


def test_what_is_behind_keeps_its_order_below() -> None:
    """A list of a million: scores still go down with every place."""
    xb = data("random", 20, 16, seed=1)
    rows = np.random.default_rng(3).permutation(1_000_000)[None]
    scores, found = rerank(SuperGlobal(n=20), -3 * xb[:1], rows, lambda r: 3 * xb)
    assert scores[0, 19] < -2
    assert np.array_equal(found[0, 20:], rows[0, 20:])
    assert scores[0, 19] > scores[0, 20]
    assert (np.diff(scores[0, 20:]) < 0).all()


def test_neighbours_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same neighbours whatever the size of blocks, and never all similarities in memory."""
    x = data("clustered", 1500, 16, seed=1)
    x[700:800] = x[:100]
    x[900:950] = x[5]
    sims, places = nearest(x, 20)
    products = x.astype(np.float64) @ x.astype(np.float64).T
    np.fill_diagonal(products, -np.inf)
    assert np.abs(sims - -np.sort(-products, axis=1)[:, :20]).max() < 1e-6
    assert np.abs(np.take_along_axis(products, places, axis=1) - sims).max() < 1e-6
    ties = np.diff(sims, axis=1) == 0
    assert ties.sum() > 1000
    assert (np.diff(places, axis=1)[ties] > 0).all()
    monkeypatch.setattr(method, "BLOCK", 30_000)
    tracemalloc.start()
    sims_few, places_few = nearest(x, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(sims_few - sims).max() < 1e-6
    assert (places_few == places).mean() > 0.99  # other sums: neighbours that are as near to 1e-7 may change places
    assert peak < 1500 * 1500 * 4 / 2


@pytest.mark.parametrize(
    "config",
    [
        QueryExpansion(),
        QueryExpansion(alpha=0),
        QueryExpansion(again="list"),
        Augmentation(),
        Diffusion(),
        SuperGlobal(),
    ],
    ids=lambda c: f"{c.name}-{getattr(c, 'alpha', '')}-{getattr(c, 'again', '')}",
)
def test_hard_queries_find_more(config: Method) -> None:
    """Queries that are farther from their cluster than its members; recall of the cluster in as many places."""
    xb, labels = clustered(3000, 64, seed=1, noise=1.2, clusters=60)
    xq, of = clustered(60, 64, seed=2, noise=2.4, clusters=60)
    rows = lists(xq, xb)[:, :500]

    def recall(found: I64) -> float:
        counts = np.bincount(labels, minlength=60)
        return float(np.mean([(labels[found[q, : counts[of[q]]]] == of[q]).mean() for q in range(60)]))

    found = rerank(
        config, xq, rows, lambda r: xb[r], lambda x, k: (np.zeros((60, k), np.float32), lists(x, xb)[:, :k])
    )[1]
    assert 0.3 < recall(rows) < 0.8
    assert recall(found) > recall(rows) + 0.05


# ------------------------------------------------------------------------------------------------ interface


def test_a_second_search_is_asked_the_expanded_queries() -> None:
    """Its answer is the list, with rows that were no candidates, and holes where it has fewer."""
    xb, xq = data("clustered", 50, 16, seed=1), data("clustered", 4, 16, seed=2)
    rows, config = lists(xq, xb)[:, :12], QueryExpansion(k=5)
    asked: list[F32] = []
    fetched: list[int] = []

    def fetch(wanted: I64) -> F32:
        fetched.append(len(wanted))
        return xb[wanted]

    def search(x: F32, k: int) -> tuple[F32, I64]:
        asked.append(x)
        order = lists(x, xb)[:, : k - 2]
        return np.take_along_axis(x @ xb.T, order, axis=1), order

    scores, found = rerank(config, xq, rows, fetch, search)
    assert fetched == [len(np.unique(rows[:, :5]))]  # no more than it needs
    for q in range(4):
        x = xb[sorted(rows[q, :5])]
        assert np.abs(asked[0][q] - slow.expanded(xq[q].tolist(), x.tolist(), 5, 3.0)).max() < 1e-6
        assert found[q].tolist() == [*np.argsort(-(xb @ asked[0][q]), kind="stable")[:10].tolist(), -1, -1]
    assert len(asked) == 1
    assert not set(found[:, :10].ravel()) <= set(rows.ravel())
    assert np.isneginf(scores[:, 10:]).all()
    holed = np.concatenate([np.full((4, 3), -1), rows], axis=1)
    assert np.array_equal(expand(config, xq, holed, fetch), asked[0])
    nothing = rerank(config, xq[:1], np.full((1, 12), -1), lambda r: xb[r], search)
    assert np.abs(asked[1] - xq[:1]).max() < 1e-3
    assert (nothing[1] >= 0).sum() == 10


def test_what_cannot_be_reranked() -> None:
    xb, xq = random_unit(20, 8, seed=1), random_unit(2, 8, seed=2)
    rows = lists(xq, xb)

    def vectors(r: I64) -> F32:
        return xb[r]

    with pytest.raises(ConfigError, match=r"qe\.again = 'search' needs a database to search in"):
        rerank(QueryExpansion(), xq, rows, vectors)
    with pytest.raises(InputError, match=r"queries of shape \(1, 8\) and lists of shape \(2, 20\)"):
        rerank(SuperGlobal(), xq[:1], rows, vectors)
    with pytest.raises(InputError, match=r"vectors of shape \(20, 4\) for 20 rows and queries of dimension 8"):
        rerank(SuperGlobal(), xq, rows, lambda r: xb[r, :4])
    rows[1, 3] = rows[1, 0]
    with pytest.raises(InputError, match=f"the list of query 1 has row {rows[1, 0]} twice"):
        rerank(SuperGlobal(), xq, rows, vectors)


def test_configs() -> None:
    """Told apart by name, whole in JSON, and refused where they are wrong."""

    class Bench(BaseModel):
        rerank: tuple[RerankConfig, ...]

    told = [{"name": kind().model_dump()["name"]} for kind in METHODS]
    read = Bench.model_validate({"rerank": told}).rerank
    assert [type(c) for c in read] == list(METHODS)
    for config in read:
        assert TypeAdapter(RerankConfig).validate_json(json.dumps(config.resolved())) == config
    with pytest.raises(ValidationError, match="'qe', 'dba', 'diffusion', 'superglobal'"):
        Bench.model_validate({"rerank": [{"name": "magic"}]})
    with pytest.raises(ConfigError, match=r"superglobal\.kq is not a known key; known: beta, k, n, name"):
        build(SuperGlobal, {"kq": 3}, "superglobal")
    with pytest.raises(ConfigError, match=r"diffusion\.alpha = 1\.0: Input should be less than 1"):
        build(Diffusion, {"alpha": 1.0}, "diffusion")


# ------------------------------------------------------------------------------------------------ sources

N, DIM, NQ = 600, 16, 23


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of a database in three files and of queries; an index of three shards."""
    root = tmp_path_factory.mktemp("rerank")
    write_vectors(root / "db", clustered(N, DIM, seed=1, noise=1.0)[0], files=3, encoder="ours")
    write_vectors(root / "queries", clustered(NQ, DIM, seed=2, noise=1.5)[0], "query", "query", encoder="ours")
    make_index(root / "index", [root / "db"], "IVF8,PQ8np", cuts=[150, 400])
    return root


def test_vectors_of_an_index(stored: Path, tmp_path: Path) -> None:
    xb, xq = clustered(N, DIM, seed=1, noise=1.0)[0], clustered(NQ, DIM, seed=2, noise=1.5)[0]
    rows = np.array([0, 149, 150, 151, 399, 400, 599])
    with open_index(stored / "index", threads=2) as index:
        source = IndexSource(index, nprobe=1, refine=1)
        source.open(codes=True)
        assert np.array_equal(source.fetch(rows), half(xb)[rows])
        assert source.fetch(rows[:0]).shape == (0, DIM)
        assert np.array_equal(source.search(xq, 5)[1], index.search(xq, 5, 1, 1)[1])
        assert not np.array_equal(source.search(xq, 5)[1], index.search(xq, 5)[1])
        for beyond in ([-1, 3], [3, 600]):
            with pytest.raises(InputError, match="has no vectors of 1 of 2 rows"):
                source.fetch(np.array(beyond))
    make_index(tmp_path / "index", [stored / "db"], "IVF8,PQ8np", cuts=[150, 400])
    living.delete(str(tmp_path / "index"), ids=list(range(160, 360)))
    living.compact(str(tmp_path / "index"))
    with open_index(tmp_path / "index", threads=2) as index:
        source = IndexSource(index)
        assert np.array_equal(source.fetch(rows), half(xb)[rows])
        with pytest.raises(InputError, match="has no vectors of 1 of 3 rows"):
            source.fetch(np.array([151, 200, 399]))


def test_vectors_of_embeddings(stored: Path) -> None:
    """Only the files that hold wanted rows are read."""
    xb, xq = clustered(N, DIM, seed=1, noise=1.0)[0], clustered(NQ, DIM, seed=2, noise=1.5)[0]
    collection, _ = open_collection([str(stored / "db")])
    source = CollectionSource(collection)
    rows = np.array([0, 199, 200, 599])
    assert np.array_equal(source.fetch(rows), xb[rows])
    assert source.fetch(rows[:0]).shape == (0, DIM)
    assert np.array_equal(source.search(xq, 10_000)[1], lists(xq, xb))
    source.keep(rows)
    for wanted in (rows, rows[1:3], np.array([1, 200, 599]), np.arange(N)):
        assert np.array_equal(source.fetch(wanted), xb[wanted])
    even = np.arange(N) % 2 == 0
    assert source.missing == []
    found = CollectionSource(collection, even).search(xq, 10_000)[1]
    assert found.shape == (NQ, N // 2)
    assert (found % 2 == 0).all()
    with pytest.raises(InputError, match="rows 0 to 600; the database has rows 0 to 599"):
        source.fetch(np.array([0, 600]))


# ------------------------------------------------------------------------------------------------ stage


def searched(stored: Path, kind: str, out: Path, only: str | None = None, **config: object) -> Manifest:
    database = stored / ("db" if kind == "exact" else "index")
    settings = SearchConfig.model_validate(config)
    return searching.run([str(database)], [str(stored / "queries")], str(out), settings, only=only)


def reranked(stored: Path, kind: str, rankings: Path, out: Path, config: Method, force: bool = False) -> Manifest:
    database = stored / ("db" if kind == "exact" else "index")
    return stage.run(str(rankings), [str(database)], [str(stored / "queries")], str(out), config, force=force)


def table(out: Path, manifest: Manifest) -> pa.Table:
    return pa.concat_tables(pq.read_table(out / name) for name in manifest.shards())


def as_lists(out: Path, manifest: Manifest) -> tuple[F32, I64]:
    """(NQ, depth) of lists that are full."""
    read = table(out, manifest)
    return read["score"].to_numpy().reshape(NQ, -1), read["id"].to_numpy().reshape(NQ, -1)


@pytest.fixture
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rankings of 5 queries a shard, for lists of 50."""
    monkeypatch.setattr(searching, "ROWS_PER_SHARD", 250)


@pytest.mark.parametrize("kind", ["exact", "index"])
@pytest.mark.parametrize("config", [SuperGlobal(n=30), Diffusion(n=30, k=5), Augmentation(), QueryExpansion()], ids=str)
def test_stage(kind: str, config: Method, stored: Path, tmp_path: Path, several_shards: None) -> None:
    """The same as by hand; rankings like those of search, which know all that search knew."""
    before = searched(stored, kind, tmp_path / "rankings", k=50)
    after = reranked(stored, kind, tmp_path / "rankings", tmp_path / "out", config)
    verify(str(tmp_path / "out"))
    read = table(tmp_path / "out", after)
    assert read.schema.equals(RANKINGS)
    assert len(open_rankings(str(tmp_path / "out"))[0].lists) == NQ
    assert len(after.shards()) == len(before.shards()) == 5
    assert after.counts == before.counts == {"queries": NQ, "rows": NQ * 50}
    same = set(before.info) - {"seconds"}
    assert {k: after.info[k] for k in same} == {k: before.info[k] for k in same}
    assert after.info["search"] == before.config
    assert after.info["rerank"] == after.config == config.resolved()
    assert after.info["rerank_ms_per_query"] > 0
    assert after.inputs["database"] == before.inputs["database"]
    assert after.inputs["queries"] == before.inputs["queries"]

    xq = clustered(NQ, DIM, seed=2, noise=1.5)[0]
    listed = as_lists(tmp_path / "rankings", before)[1]
    scores, found = as_lists(tmp_path / "out", after)
    with open_index(stored / "index", threads=2) as index:
        source = CollectionSource(open_collection([str(stored / "db")])[0]) if kind == "exact" else IndexSource(index)
        for q in range(NQ):  # one by one, that is
            true_scores, true_rows = rerank(config, xq[q : q + 1], listed[q : q + 1], source.fetch, source.search)
            assert np.array_equal(found[q], true_rows[0])
            assert np.abs(scores[q] - true_scores[0]).max() < 1e-6
    assert not np.array_equal(found, listed)
    assert read["name"].to_pylist() == [f"db_{i:05d}" for i in found.ravel()]


@pytest.mark.parametrize("kind", ["exact", "index"])
@pytest.mark.parametrize("config", [SuperGlobal(), QueryExpansion()], ids=["superglobal", "qe"])
def test_a_run_that_stopped_goes_on(
    kind: str, config: Method, stored: Path, tmp_path: Path, several_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the shards that are left, and to the same bits."""
    searched(stored, kind, tmp_path / "rankings", k=50)
    rankings, out = tmp_path / "rankings", tmp_path / "out"
    whole = reranked(stored, kind, rankings, tmp_path / "whole", config)
    written: list[int] = []

    class Stopping(RankingsWriter):
        def write(self, number: int, *arguments: Any, **more: Any) -> None:
            if written == [0, 1]:
                written.append(-1)
                raise KeyboardInterrupt
            written.append(number)
            super().write(number, *arguments, **more)

    monkeypatch.setattr(stage, "RankingsWriter", Stopping)
    with pytest.raises(KeyboardInterrupt):
        reranked(stored, kind, rankings, out, config)
    with pytest.raises(MismatchError, match=r"unfinished work of another run: config\.k: \d+ there, 11 now"):
        reranked(stored, kind, rankings, out, config.model_copy(update={"k": 11}))
    manifest = reranked(stored, kind, rankings, out, config)
    assert written == [0, 1, -1, 2, 3, 4]
    assert manifest.files == whole.files
    assert reranked(stored, kind, rankings, out, config) == manifest
    other = reranked(stored, kind, rankings, out, config.model_copy(update={"k": 2}), force=True)
    assert set(other.files) == set(whole.files)
    assert other.files != whole.files


def test_embeddings_are_read_few_times(
    stored: Path, tmp_path: Path, several_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the candidates of all shards, where they fit, and once to search again; else once for each shard."""
    searched(stored, "exact", tmp_path / "rankings", k=50)
    read: list[str] = []
    original = Embeddings.database_vectors

    def counting(self: Embeddings, shard: str) -> F32:
        read.extend([shard] * ("db" in self.folder.uri))
        return original(self, shard)

    monkeypatch.setattr(Embeddings, "database_vectors", counting)
    manifests = []
    for kept, config, passes in ((2**28, SuperGlobal(), 1), (2**28, QueryExpansion(), 2), (1, SuperGlobal(), 5)):
        monkeypatch.setattr("iir_dist.rerank.sources.FETCHED", kept)
        out = tmp_path / f"{kept}-{passes}"
        manifests.append(reranked(stored, "exact", tmp_path / "rankings", out, config))
        assert len(read) == 3 * passes
        read.clear()
    assert manifests[0].files == manifests[2].files


@pytest.mark.parametrize("kind", ["exact", "index"])
def test_a_second_search_has_the_filters_of_the_first(kind: str, stored: Path, tmp_path: Path) -> None:
    only = tmp_path / "only.txt"
    only.write_text("".join(f"db_{i:05d}\n" for i in range(100, 500)))
    before = searched(stored, kind, tmp_path / "rankings", only=str(only), k=50)
    after = reranked(stored, kind, tmp_path / "rankings", tmp_path / "out", QueryExpansion(k=20, alpha=0))
    found = as_lists(tmp_path / "out", after)[1]
    assert after.inputs["only"] == before.inputs["only"]
    assert not np.array_equal(found, as_lists(tmp_path / "rankings", before)[1])
    assert ((found >= 100) & (found < 500)).all()
    only.write_text("db_00100\n")
    with pytest.raises(MismatchError, match=r"only\.txt is not the list that was searched; search again"):
        reranked(stored, kind, tmp_path / "rankings", tmp_path / "again", QueryExpansion())


def test_queries_that_found_nothing(stored: Path, tmp_path: Path, several_shards: None) -> None:
    """Lists are short or empty, at the end of a shard, and all of one; nothing shifts."""
    before = searched(stored, "index", tmp_path / "rankings", k=50)
    document = json.loads((tmp_path / "rankings" / "manifest.json").read_text())
    for number, name in enumerate(before.shards()):
        read = pq.read_table(tmp_path / "rankings" / name)
        query = np.array([int(q[-5:]) for q in read["query"].to_pylist()])
        keep = (read["rank"].to_numpy() < query) & ~np.isin(query, [9, 10, 11, 12, 13, 14, 15])
        pq.write_table(read.filter(pa.array(keep)), tmp_path / "rankings" / name)
        data = (tmp_path / "rankings" / name).read_bytes()
        document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert number != 2 or not keep.any()
    (tmp_path / "rankings" / "manifest.json").write_text(json.dumps(document))
    after = reranked(stored, "index", tmp_path / "rankings", tmp_path / "out", SuperGlobal())
    assert after.counts["queries"] == NQ
    read = table(tmp_path / "out", after)
    found = {q: read.filter(pc.equal(read["query"], f"query_{q:05d}")) for q in range(NQ)}
    original = table(tmp_path / "rankings", before)
    for q in range(NQ):
        there = original.filter(pc.equal(original["query"], f"query_{q:05d}"))
        assert set(found[q]["id"].to_pylist()) == set(there["id"].to_pylist())
        assert found[q]["rank"].to_pylist() == list(range(len(there)))


def test_ids_are_not_rows(tmp_path: Path) -> None:
    """Of somebody's embeddings, in any order."""
    xb, xq = clustered(90, DIM, seed=1, noise=1.0)[0], clustered(5, DIM, seed=2, noise=1.5)[0]
    write_vectors(tmp_path / "db", xb)
    write_vectors(tmp_path / "queries", xq, "query", "query")
    ids = np.random.default_rng(3).permutation(90) * 7 + 1000
    read = pq.read_table(tmp_path / "db" / "shard-00000.parquet")
    pq.write_table(read.set_column(0, "id", pa.array(ids)), tmp_path / "db" / "shard-00000.parquet")
    arguments = [str(tmp_path / "db")], [str(tmp_path / "queries")]
    searching.run(*arguments, str(tmp_path / "rankings"), SearchConfig(k=30))
    manifest = stage.run(str(tmp_path / "rankings"), *arguments, str(tmp_path / "out"), SuperGlobal())
    found = rerank(SuperGlobal(), xq, lists(xq, xb)[:, :30], lambda r: xb[r])[1]
    assert table(tmp_path / "out", manifest)["id"].to_pylist() == ids[found].ravel().tolist()


def test_what_does_not_fit(stored: Path, tmp_path: Path) -> None:
    rankings = tmp_path / "rankings"
    before = searched(stored, "index", rankings, k=50)
    with pytest.raises(MismatchError, match=r"was searched with database .*index .* give the same, or search again"):
        reranked(stored, "exact", rankings, tmp_path / "out", SuperGlobal())
    write_vectors(tmp_path / "others", random_unit(NQ, DIM, seed=7), "query", "query", encoder="ours")
    with pytest.raises(MismatchError, match="was searched with queries"):
        stage.run(
            str(rankings), [str(stored / "index")], [str(tmp_path / "others")], str(tmp_path / "out"), SuperGlobal()
        )
    with pytest.raises(InputError, match="2 databases given; expected one index, or embeddings folders"):
        stage.run(
            str(rankings), [str(stored / "index"), str(stored / "db")], [str(stored / "queries")], str(tmp_path / "out"),
            SuperGlobal(),
        )  # fmt: skip
    with pytest.raises(InputError, match="was written by 'embed'; expected search"):
        reranked(stored, "index", stored / "db", tmp_path / "out", SuperGlobal())
    assert not (tmp_path / "out").exists()
    with open(rankings / before.shards()[0], "r+b") as file:
        file.write(b"x")
    with pytest.raises(CorruptError, match="has other content than its manifest says"):
        reranked(stored, "index", rankings, tmp_path / "out", SuperGlobal())
