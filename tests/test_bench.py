"""The distractor benchmark: ranks against a full sort, synthetic vectors like the real ones, steps that are nested."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed import clustered, exact_unit, random_unit, write_vectors

from iir_dist import evaluate
from iir_dist.artifact import require
from iir_dist.bench import stage
from iir_dist.bench.mixture import comparison, fit, nearest_similarity
from iir_dist.bench.ranks import exact_ranks
from iir_dist.bench.stage import BenchConfig
from iir_dist.bench.subsets import SYNTHETIC, Distractors
from iir_dist.data.collection import Collection, Segment
from iir_dist.data.embeddings import open_embeddings
from iir_dist.errors import ConfigError, GroundTruthError, InputError
from iir_dist.index import search
from iir_dist.index.plan import IndexConfig
from iir_dist.vectors import F32


class Blocks(Collection):
    """Vectors in memory, in blocks."""

    def __init__(self, x: F32, size: int) -> None:
        object.__setattr__(self, "segments", (Segment(0, "", 0, len(x)),))
        object.__setattr__(self, "sources", ())
        object.__setattr__(self, "_parts", (x, size))

    def vectors(self, start: int, stop: int) -> Iterator[tuple[int, F32]]:
        x, size = self._parts  # type: ignore[attr-defined]
        for first in range(start, stop, size):
            yield first, x[first : min(first + size, stop)]


@given(n=st.integers(1, 60), nq=st.integers(1, 4), size=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_ranks_are_those_of_a_full_sort(n: int, nq: int, size: int, seed: int) -> None:
    """Inner products are exact and many are equal, so the rule for ties is tested too."""
    rng = np.random.default_rng(seed)
    xb, xq = exact_unit(n, seed), exact_unit(nq, seed + 1)
    rows = [rng.permutation(n)[: rng.integers(0, n + 1)] for _ in range(nq)]
    found = exact_ranks(Blocks(xb, size), xq, rows)
    for q in range(nq):
        order = sorted(range(n), key=lambda r: (-float(xq[q] @ xb[r]), r))
        assert found[q].tolist() == [order.index(r) for r in rows[q].tolist()]


def test_a_mixture_is_like_what_it_is_fitted_to() -> None:
    x = clustered(1500, 1)
    mixture = fit(x, seed=0)
    made = mixture.sample(1500, (7,))
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert np.median(nearest_similarity(made)) == pytest.approx(np.median(nearest_similarity(x)), abs=0.01)
    np.testing.assert_allclose(made.mean(axis=0), x.mean(axis=0), atol=0.03)
    assert made.tobytes() == mixture.sample(1500, (7,)).tobytes()
    assert made.tobytes() != mixture.sample(1500, (8,)).tobytes()
    told = comparison(mixture, x, clustered(40, 2), seed=0)
    near = told["similarity"]["to the nearest neighbour"]
    medians = [near[kind]["percentiles"][3] for kind in ("real", "synthetic")]
    assert medians[0] == pytest.approx(medians[1], abs=0.01)
    distances = np.sqrt(2 - 2 * nearest_similarity(x))
    expected, _ = np.histogram(distances, near["distance_edges"])
    np.testing.assert_allclose(near["real"]["share"], expected / len(x), atol=0.005)  # edges are rounded
    for pair in told["similarity"].values():
        for kind in ("real", "synthetic"):
            assert sum(pair[kind]["share"]) == pytest.approx(1, abs=1e-3)
    # Without the factor it would not be.
    assert abs(np.median(nearest_similarity(replace(mixture, scale=0.5).sample(1500, (7,)))) - medians[0]) > 0.05


def test_too_few_real_vectors_are_refused() -> None:
    with pytest.raises(InputError, match=r"199 real distractors are too few .* expected at least 200"):
        fit(clustered(199, 1), seed=0)


def test_rows_do_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    x = clustered(300, 1)
    made = Distractors([open_embeddings(write_vectors(tmp_path / "d", x, "photo"))], 0, fit(x, seed=0))

    def rows(cuts: list[int]) -> tuple[list[str], list[str], bytes]:
        parts = [p for a, b in pairwise(cuts) for p in made.rows(a, b)]
        names, splits = [n for p in parts for n in p[0]], [s for n, s, _ in parts for _ in n]
        return names, splits, np.concatenate([p[2] for p in parts]).tobytes()

    whole = rows([0, 50_700])
    assert whole == rows([0, 10, 299, 300, 301, 50_299, 50_301, 50_700])
    assert len(set(whole[0])) == 50_700
    assert whole[1] == ["distractor"] * 300 + [SYNTHETIC] * 50_400
    assert sorted(whole[0][:300]) == [f"photo_{i:05d}" for i in range(300)]
    assert whole[0][:300] != sorted(whole[0][:300])


@pytest.mark.parametrize("steps", ["[]", "[5, 3]", "[1, 1]", "[-1]"])
def test_steps_are_ascending(steps: str) -> None:
    from iir_dist.config import load

    with pytest.raises(ConfigError, match="not ascending numbers of distractors"):
        load(BenchConfig, "distractors", None, [f"steps={steps}"])


CONFIG = BenchConfig(
    steps=(0, 30, 900), recalls=(0.9,), index=IndexConfig(factory="IVF4,PQ64x4fsr", train_size=256), depth=200
)


@pytest.fixture(scope="module")
def benched(images: Path, embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark on the small world, among vectors of nobody's photos; stopped at the last step and run again."""
    root = tmp_path_factory.mktemp("bench")
    write_vectors(root / "d", random_unit(250, 512, seed=1), "photo", "distractor")
    arguments = (str(embeddings / "benchmark"), str(images / "benchmark"), [str(root / "d")], str(root / "out"), CONFIG)
    steps, step = [], stage._step

    def interrupted(folders: Sequence[str], *rest: Any) -> dict[str, Any]:
        steps.append(len(folders))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(folders, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage.run(*arguments)
        stage.run(*arguments)
    assert steps == [1, 2, 3, 3]  # what was done was not done again
    return root


def figures(benched: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((benched / "out" / "bench.json").read_bytes())
    return found


@pytest.mark.ray
def test_every_step_is_what_the_stages_give(benched: Path, images: Path, embeddings: Path, tmp_path: Path) -> None:
    """Exact search and evaluation of the same folders; all distractors of a step are among those of the next."""
    folders = [str(embeddings / "benchmark")]
    for step, count in zip(figures(benched)["steps"], CONFIG.steps, strict=True):
        if count:
            folders.append(str(benched / "out" / f"distractors-{count}"))
        search.run(folders, folders[:1], str(tmp_path / f"r{count}"), search.SearchConfig())
        manifest = evaluate.run(
            str(tmp_path / f"r{count}"),
            str(images / "benchmark"),
            str(tmp_path / f"m{count}"),
            evaluate.EvaluateConfig(),
        )
        for level, metrics in manifest.info["metrics"].items():
            assert step["exact"][level]["mean"] == pytest.approx(metrics["map"], abs=1e-9)
        assert step["rows"] == step["distractors"] + figures(benched)["steps"][0]["rows"]
    assert [s["synthetic"] for s in figures(benched)["steps"]] == [0, 0, 650]


@pytest.mark.ray
def test_an_index_that_loses_nothing_has_no_loss(benched: Path, images: Path, embeddings: Path, tmp_path: Path) -> None:
    for step in figures(benched)["steps"]:
        names = [p["name"] for p in step["points"]]
        refined = [p for p in step["points"] if p["refine"]]
        assert [n for n in names if not n.endswith(", codes only")] == ["default", "recall 0.9"]
        assert [n for n in names if n.endswith(", codes only")] == [f"{p['name']}, codes only" for p in refined]
        for point in step["points"]:
            for level, values in point["levels"].items():
                assert step["exact"][level]["mean"] - values["mean"] == pytest.approx(values["loss"]["mean"], abs=1e-9)
    config = CONFIG.model_copy(
        update={"steps": (0,), "index": IndexConfig(factory="IVF4,Flat", nprobe=4, refine=0), "depth": 10**6}
    )
    stage.run(str(embeddings / "benchmark"), str(images / "benchmark"), [], str(tmp_path / "o"), config)
    (step,) = json.loads((tmp_path / "o" / "bench.json").read_bytes())["steps"]
    for values in step["points"][0]["levels"].values():
        assert values["loss"]["mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.ray
def test_synthetic_rows_are_said_to_be(benched: Path) -> None:
    folder, manifest = require(benched / "out" / "distractors-900", "distractors")
    assert manifest.counts == {"out": 870, SYNTHETIC: 650}
    splits = pq.read_table(folder.path / "shard-00000.parquet").column("split").to_pylist()  # type: ignore[attr-defined]
    assert splits == ["distractor"] * 220 + [SYNTHETIC] * 650
    page = (benched / "out" / "report.html").read_text()
    assert "* with synthetic distractors" in page
    assert '<th scope="row">900*</th>' in page
    assert '<th scope="row">30</th>' in page
    assert "src=" not in page
    assert page.count("<svg") == 1 + 5 * len(figures(benched)["steps"][0]["exact"])


@pytest.mark.ray
def test_no_recall_is_told_of_a_setting_that_was_not_measured(images: Path, embeddings: Path, tmp_path: Path) -> None:
    config = BenchConfig(steps=(0,), rerank=(), index=IndexConfig(factory="IVF4,PQ64x4fsr", nprobe=3, refine=5))
    stage.run(str(embeddings / "benchmark"), str(images / "benchmark"), [], str(tmp_path / "o"), config)
    (step,) = json.loads((tmp_path / "o" / "bench.json").read_bytes())["steps"]
    assert (step["points"][0]["nprobe"], step["points"][0]["refine"]) == (3, 5)
    recalls = {p["name"]: p["recall@10"] for p in step["points"]}
    assert recalls["default"] is None
    assert recalls["recall 0.8"] is not None
    assert all(recall is None for name, recall in recalls.items() if name.endswith(", codes only"))


def test_a_custom_protocol_is_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "e", clustered(9, 1), "query", "query", encoder="a" * 64)
    (tmp_path / "truth.csv").write_text("query,name\nquery_00000,a\n")
    with pytest.raises(GroundTruthError, match=r"custom protocol.*expected the revisited or the original one"):
        stage.run(str(tmp_path / "e"), str(tmp_path / "truth.csv"), [], str(tmp_path / "o"), CONFIG)


@pytest.mark.ray
def test_without_real_distractors_there_are_no_others(images: Path, embeddings: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps up to 900 distractors and no real one given; expected --distractors"):
        stage.run(str(embeddings / "benchmark"), str(images / "benchmark"), [], str(tmp_path / "o"), CONFIG)
