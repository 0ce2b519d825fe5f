"""Operating points: their recall is that of real searches against brute force, and the stages choose by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed import DIM, NQ, N, brute_force, clustered, ranking, write_vectors

from iir_dist.artifact import require
from iir_dist.errors import ConfigError, MismatchError
from iir_dist.index import build, living
from iir_dist.index.engine import open_index
from iir_dist.index.plan import IndexConfig
from iir_dist.index.points import DATABASE, OTHER, QUERIES, OperatingPoints, _ladder, _without, read_points, recall_of
from iir_dist.index.train import hashes
from iir_dist.vectors import F32, normalize

pytestmark = pytest.mark.ray
CONFIG = IndexConfig(factory="IVF32,PQ16x4fsr", recall=0.9, shards=2)


def others(n: int = 60) -> F32:
    """Noisier than the database."""
    return normalize(clustered(n, 5) + 0.2 * np.random.default_rng(6).normal(size=(n, DIM)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Embeddings of the database and queries, and an index measured with both kinds."""
    root = tmp_path_factory.mktemp("measured")
    write_vectors(root / "db", clustered(N, 1), files=3)
    write_vectors(root / "other", others(), "query", "query")
    build.run([str(root / "db")], str(root / "index"), CONFIG, queries=[str(root / "other")])
    return root


def points_of(index: Path) -> OperatingPoints:
    return read_points(*require(index, "index"))


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len({*f} & {*t}) / len(t) for f, t in zip(found.tolist(), truth.tolist(), strict=True)]))


def test_recall_is_that_of_real_searches(measured: Path) -> None:
    xb = clustered(N, 1).astype(np.float16).astype(np.float32)
    rows = np.sort(np.argsort(hashes(np.arange(N), CONFIG.seed + 1))[:QUERIES])
    itself = brute_force(xb[rows], xb, 11)[1]
    assert (itself[:, 0] == rows).all()
    truth = {k: brute_force(others(), xb, k)[1] for k in (1, 10, 100)}
    found = points_of(measured / "index")
    assert found.queries == {DATABASE: QUERIES, OTHER: 60}
    with open_index(measured / "index") as index:
        for point in (found.points[0], found.points[len(found.points) // 2], found.points[-1]):
            for k, true in truth.items():
                ours = index.search(others(), k, point.nprobe, point.refine)[1]
                assert point.recall[OTHER][k] == pytest.approx(recall(ours, true), abs=1e-4)
            # Without itself, a row's best 10 are those of one search for 11, but for the last candidates.
            seen = index.search(xb[rows], 11, point.nprobe, point.refine)[1]
            assert point.recall[DATABASE][10] == pytest.approx(recall(seen[:, 1:], itself[:, 1:]), abs=0.02)


def test_points_are_those_that_no_other_beats(measured: Path) -> None:
    found = points_of(measured / "index")
    assert len(found.points) > 3
    costs, worst = [p.cost_ms for p in found.points], [p.worst for p in found.points]
    assert costs == sorted(costs)
    assert worst == sorted(set(worst))
    assert found.points[-1].worst > 0.99
    assert all(0 < p.latency_ms.p50 <= p.latency_ms.p95 <= p.latency_ms.p99 for p in found.points)
    for target in (0.5, 0.9, 0.95):
        chosen = found.reaching(target)
        assert chosen.worst >= target
        assert all(p.worst < target for p in found.points if p.cost_ms < chosen.cost_ms)
    assert found.memory_bytes["vectors"] == 2 * N * DIM


def test_the_default_reaches_the_target_of_the_build(measured: Path) -> None:
    manifest = require(measured / "index", "index")[1]
    chosen = points_of(measured / "index").reaching(0.9)
    assert (manifest.info["nprobe"], manifest.info["refine"]) == (chosen.nprobe, chosen.refine)
    assert chosen.nprobe > 1
    memory = manifest.info["memory_bytes"]
    assert memory["search"] == pytest.approx(memory["search_planned"], rel=0.1)


def test_search_by_recall(measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_vectors(measured / "queries", clustered(NQ, 2), "query", "query")
    chosen = points_of(measured / "index").reaching(0.97)
    manifest, ids, _ = ranking(measured / "index", measured, tmp_path / "r", k=10, recall=0.97)
    assert (manifest.info["nprobe"], manifest.info["refine"]) == (chosen.nprobe, chosen.refine)
    assert manifest.info["recall"] == {kind: r[10] for kind, r in chosen.recall.items()}
    by_hand = ranking(measured / "index", measured, tmp_path / "h", k=10, nprobe=chosen.nprobe, refine=chosen.refine)
    assert (ids == by_hand[1]).all()
    assert "was not reached" not in caplog.text
    ranking(measured / "index", measured, tmp_path / "all", k=10, recall=1)
    assert points_of(measured / "index").points[-1].worst == 1 or "recall@10 1 was not reached" in caplog.text
    with pytest.raises(ConfigError, match=r"search\.recall = 0\.9 chooses nprobe and refine; expected either"):
        ranking(measured / "index", measured, tmp_path / "both", recall=0.9, nprobe=3)


def test_recall_is_told_of_settings_that_were_measured(measured: Path, vectors: Path, tmp_path: Path) -> None:
    """Of the index's own too; not of others, and not where only a part of the rows is searched."""
    found, (folder, manifest) = points_of(measured / "index"), require(measured / "index", "index")
    for point in found.points:
        known = {kind: recall[10] for kind, recall in point.recall.items()}
        assert recall_of(folder, manifest, point.nprobe, point.refine) == known
    assert recall_of(folder, manifest, found.points[0].nprobe, 0) == {}
    own = (manifest.info["nprobe"], manifest.info["refine"])
    told = ranking(measured / "index", vectors, tmp_path / "own", k=10)[0].info["recall"]
    assert told == recall_of(folder, manifest, *own)
    for name, settings in (("codes", {"refine": 0}), ("part", {"splits": ["db"]})):
        assert "recall" not in ranking(measured / "index", vectors, tmp_path / name, k=10, **settings)[0].info
    assert f"{min(told.values()):.3f}" in living.describe(str(measured / "index"))


def test_a_target_out_of_reach_is_said(measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = IndexConfig(factory="IVF32,PQ2x4fs", recall=0.99)
    with caplog.at_level("INFO"):
        build.run([str(measured / "db")], str(tmp_path / "coarse"), config)
    assert "the target 0.99 is not reached" in caplog.text
    assert "measured with rows of the database only" in caplog.text
    assert points_of(tmp_path / "coarse").queries == {DATABASE: QUERIES}


def test_the_same_choice_every_time(measured: Path, tmp_path: Path) -> None:
    """Costs are computed and not timed; one shard or two."""
    config = CONFIG.model_copy(update={"shards": 1})
    build.run([str(measured / "db")], str(tmp_path / "again"), config, queries=[str(measured / "other")])
    ours, theirs = points_of(tmp_path / "again"), points_of(measured / "index")
    assert [(p.nprobe, p.refine, p.recall) for p in ours.points] == [
        (p.nprobe, p.refine, p.recall) for p in theirs.points
    ]


def test_measured_again_after_a_change(measured: Path, vectors: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "index")
    build.run([str(measured / "db")], out, CONFIG)
    before = require(out, "index")[1]
    assert ranking(Path(out), vectors, tmp_path / "known", k=10)[0].info["recall"][DATABASE] >= CONFIG.recall
    living.delete(out, ids=list(range(0, N, 2)))
    assert "changed since" in living.describe(out)
    for name, settings in (("own", {}), ("target", {"recall": 0.9})):  # which reads what was measured before
        assert "recall" not in ranking(Path(out), vectors, tmp_path / name, k=10, **settings)[0].info
    manifest = living.measure(out, [str(measured / "other")])
    assert ranking(Path(out), vectors, tmp_path / "again", k=10)[0].info["recall"][OTHER] >= CONFIG.recall
    found = points_of(Path(out))
    assert (found.rows, found.queries) == (N // 2, {DATABASE: QUERIES, OTHER: 60})
    assert "changed since" not in living.describe(out)
    assert manifest.fingerprint != before.fingerprint
    xb = clustered(N, 1).astype(np.float16).astype(np.float32)
    truth = brute_force(others(), xb, 10, np.arange(1, N, 2))[1]
    with open_index(out) as index:
        seen = index.search(others(), 10, found.points[-1].nprobe, found.points[-1].refine)[1]
    assert found.points[-1].recall[OTHER][10] == pytest.approx(recall(seen, truth), abs=1e-4)


def test_an_index_of_one_row(tmp_path: Path, ray_session: None) -> None:
    """Nobody can ask it for another row, so there is nothing to measure."""
    write_vectors(tmp_path / "db", clustered(1, 1))
    manifest = build.run([str(tmp_path / "db")], str(tmp_path / "index"), IndexConfig())
    assert (manifest.info["nprobe"], manifest.info["refine"]) == (1, 0)
    assert points_of(tmp_path / "index").queries == {}
    with open_index(tmp_path / "index") as index:
        assert index.search(clustered(1, 1), 3)[1].tolist() == [[0, -1, -1]]


def test_queries_of_another_space_are_refused(measured: Path, tmp_path: Path) -> None:
    write_vectors(tmp_path / "a", clustered(50, 3), "query", "query", encoder="a" * 64)
    write_vectors(tmp_path / "b", clustered(2000, 3), encoder="b" * 64)
    with pytest.raises(MismatchError, match=r"a{12}.*b{12}|b{12}.*a{12}"):
        build.run([str(tmp_path / "b")], str(tmp_path / "o"), CONFIG, queries=[str(tmp_path / "a")])


def test_an_index_without_points_says_how_to_get_them(measured: Path, tmp_path: Path) -> None:
    folder, manifest = require(measured / "index", "index")
    files = {name: entry for name, entry in manifest.files.items() if name != "operating_points.json"}
    with pytest.raises(ConfigError, match=r"has no operating points; measure them: iir index --out .* --measure"):
        read_points(folder, manifest.model_copy(update={"files": files}))
    points = json.loads((measured / "index" / "operating_points.json").read_bytes())
    assert set(points) == {"queries", "rows", "threads", "memory_bytes", "points"}


def test_steps() -> None:
    assert list(_ladder(1)) == [1]
    assert list(_ladder(32)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    rows = np.array([[4, 5, 6], [7, 8, 9]])
    assert _without(rows, np.array([5, -1])).tolist() == [[4, 6], [7, 8]]
