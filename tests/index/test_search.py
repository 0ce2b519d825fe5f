"""Search: in this process, over actors, exactly; filters, deep lists, and what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from indexed import NQ, N, brute_force, clustered, exact_unit, make_index, random_unit, ranking, search, write_vectors

from iir_dist.data.collection import open_collection
from iir_dist.errors import ConfigError, IirError, InputError
from iir_dist.index import exact, living, shard
from iir_dist.index.engine import open_index


def test_exact_search_is_brute_force(vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranked and the best few, in one pass and in several, block by block."""
    expected_scores, expected = brute_force(clustered(NQ, 2), clustered(N, 1), N)
    manifest, ids, scores = ranking(vectors / "db", vectors, tmp_path / "all")
    assert manifest.info["exact"]
    assert ids.shape == (NQ, N)
    assert (ids == expected).mean() > 0.999  # float32 may swap neighbours whose scores are equal to 1e-7
    assert np.abs(scores - expected_scores).max() < 1e-5
    for name, k in (("top", 7), ("half", N // 2)):
        assert np.array_equal(ranking(vectors / "db", vectors, tmp_path / name, k=k)[1], ids[:, :k])
    monkeypatch.setattr(exact, "ROWS", 77)
    monkeypatch.setattr(exact, "BLOCK", NQ * 77)
    monkeypatch.setattr(exact, "KEPT", 3 * N)
    monkeypatch.setattr("iir_dist.index.search.ROWS_PER_SHARD", 2 * N)
    assert np.array_equal(ranking(vectors / "db", vectors, tmp_path / "blocks")[1], ids)
    assert np.array_equal(ranking(vectors / "db", vectors, tmp_path / "top-blocks", k=7)[1], ids[:, :7])


@pytest.mark.parametrize("depth", [5, N])
def test_groups_of_queries_have_the_same_bits_alone(vectors: Path, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run that goes on computes of the groups that are left; products of other shapes sum in another order."""
    monkeypatch.setattr(exact, "ROWS", 128)
    monkeypatch.setattr(exact, "BLOCK", 2**12)
    collection, xq = open_collection([str(vectors / "db")])[0], random_unit(90, 32, seed=5)
    groups = {0: slice(0, 80), 1: slice(80, 89), 2: slice(89, 90)}
    searching = exact.Exact(collection, on_ray=False)
    together = {number: (scores, rows) for number, scores, rows in searching.rank(xq, groups, depth, None)}
    for number, group in groups.items():
        ((_, scores, rows),) = searching.rank(xq, {number: group}, depth, None)
        assert np.array_equal(scores, together[number][0])
        assert np.array_equal(rows, together[number][1])


@pytest.mark.ray
def test_actors_and_tasks_answer_as_this_process(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    for name, database in (("exact", vectors / "db"), ("index", indexes[3])):
        here, there = (
            ranking(database, vectors, tmp_path / f"{name}-{workers}", k=25, workers=workers)[0] for workers in (0, 2)
        )
        assert here.files == there.files


def test_a_single_query_and_any_number_of_threads_answer_the_same(tmp_path: Path) -> None:
    """Candidates are all rescored, so that scores do not depend on how many queries the coarse assignment had."""
    emb = write_vectors(tmp_path / "emb", random_unit(400, 8, seed=1))
    make_index(tmp_path / "index", [emb], "IVF8,PQ4np", cuts=[100, 250])
    xq = random_unit(50, 8, seed=2)
    with open_index(tmp_path / "index", threads=1) as one, open_index(tmp_path / "index", threads=3) as three:
        scores, rows = one.search(xq, 10, 8, 40)
        assert np.array_equal(three.search(xq, 10, 8, 40)[1], rows)
        for q in range(len(xq)):
            single = three.search(xq[q : q + 1], 10, 8, 40)
            assert np.array_equal(single[1], rows[q : q + 1])
            assert np.array_equal(single[0], scores[q : q + 1])


def test_deep_lists(tmp_path: Path) -> None:
    """k of 10,000 with refinement, and more than there are rows; many scores are equal, none is rounded."""
    x, xq = exact_unit(12_000, seed=1), exact_unit(3, seed=2)
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", x)], "IVF8,PQ4np", cuts=[5000])
    scores, rows = search(tmp_path / "index", xq, 10_000, nprobe=8, refine=2)
    expected_scores, expected = brute_force(xq, x, 10_000)
    assert np.array_equal(rows, expected)
    assert np.array_equal(scores, expected_scores)
    scores, rows = search(tmp_path / "index", xq, 12_001, nprobe=8)
    assert (rows[:, -1] == -1).all()
    assert np.isneginf(scores[:, -1]).all()
    assert [len(set(r)) for r in rows[:, :-1].tolist()] == [12_000] * 3


def test_more_ties_than_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cut goes through hundreds of equal scores: queries are then answered a few at a time."""
    xq = exact_unit(20, seed=2)
    x = np.concatenate([np.repeat(exact_unit(4, seed=1), 300, axis=0), exact_unit(400, seed=3)])
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", x)], "IVF8,Flat")
    widths: list[int] = []
    scan = shard.Shard._scan

    def watched(self: shard.Shard, visit: shard.Visit, k: int, allowed: shard.Bits | None) -> object:
        widths.append(len(visit.xt) * k)
        return scan(self, visit, k, allowed)

    monkeypatch.setattr(shard, "TIES", 2000)
    monkeypatch.setattr(shard.Shard, "_scan", watched)
    allowed = np.flatnonzero(np.random.default_rng(4).random(len(x)) < 0.7)
    for chosen in (None, allowed):
        scores, rows = search(tmp_path / "index", xq, 40, refine=0, allowed=chosen)
        expected_scores, expected = brute_force(xq, x, 40, chosen)
        assert np.array_equal(rows, expected)
        assert np.array_equal(scores, expected_scores)
    assert len(widths) > 4
    assert max(widths) <= 2000


def test_a_small_set_of_rows_is_found_whatever_the_lists(tmp_path: Path) -> None:
    """With few lists visited a filter would starve; rows that refine * k covers are all rescored."""
    x = random_unit(400, 8, seed=1)
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", x)], "IVF8,PQ4np", cuts=[200])
    xq, allowed = random_unit(5, 8, seed=2), np.array([3, 77, 210, 399])
    rows = search(tmp_path / "index", xq, 4, nprobe=1, refine=1, allowed=allowed)[1]
    assert np.array_equal(rows, brute_force(xq, x.astype(np.float16).astype(np.float32), 4, allowed)[1])


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", random_unit(40, 8, seed=1))])
    xq = random_unit(2, 8, seed=2)
    with pytest.raises(ConfigError, match=r"search\.nprobe = 9: the index has 8 lists"):
        search(tmp_path / "index", xq, 5, nprobe=9)
    with pytest.raises(ConfigError, match=r"search\.k = 0"):
        search(tmp_path / "index", xq, 0)
    with pytest.raises(InputError, match=r"queries of shape \(2, 4\); the index holds vectors of dimension 8"):
        search(tmp_path / "index", xq[:, :4], 5)
    with pytest.raises(InputError, match="allowed rows from 0 to 40; the index has rows 0 to 39"):
        search(tmp_path / "index", xq, 5, allowed=np.array([0, 40]))
    with pytest.raises(InputError, match=r"allowed rows of type bool and shape \(39,\)"):
        search(tmp_path / "index", xq, 5, allowed=np.ones(39, bool))


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["exact", "index"])
def test_filters_of_the_stage(kind: str, indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    database = vectors / "db" if kind == "exact" else indexes[1]
    (tmp_path / "only.txt").write_text("".join(f"db_{i:05d}\n" for i in range(100, 140)))
    manifest, ids, _ = ranking(database, vectors, tmp_path / "only", k=50, only=str(tmp_path / "only.txt"))
    assert manifest.info["database_rows"] == 40
    assert "only" in manifest.inputs
    assert all(set(row) == set(range(100, 140)) for row in ids)
    assert ranking(database, vectors, tmp_path / "split", k=5, splits=["db"])[0].info["database_rows"] == N
    with pytest.raises(InputError, match=r"has no row of split 'train'; it has db"):
        ranking(database, vectors, tmp_path / "x", splits=["train"])
    (tmp_path / "none.txt").write_text("nobody\n")
    with pytest.raises(InputError, match=r"has no name nobody \(1 of 1 are not there\)"):
        ranking(database, vectors, tmp_path / "y", only=str(tmp_path / "none.txt"))


@pytest.mark.ray
def test_the_stage_records_what_is_missing(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    shutil.copytree(indexes[3], tmp_path / "index")
    (tmp_path / "index" / "shard-00001.faiss").unlink()
    with pytest.raises(IirError, match=r"shard-00001\.faiss is missing"):
        ranking(tmp_path / "index", vectors, tmp_path / "a", k=5)
    for workers in (0, 2):
        manifest, ids, _ = ranking(
            tmp_path / "index", vectors, tmp_path / f"b{workers}", k=5, allow_partial=True, workers=workers
        )
        assert manifest.info["missing"] == [[1000, 2000]]
        assert not ((ids >= 1000) & (ids < 2000)).any()


def test_deleted_rows_do_not_count(tmp_path: Path) -> None:
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", random_unit(40, 8, seed=1))])
    living.delete(str(tmp_path / "index"), ids=[0, 39])
    with open_index(tmp_path / "index", threads=1) as index:
        assert index.alive.tolist() == [False, *[True] * 38, False]
        assert len(index.names) == 40
