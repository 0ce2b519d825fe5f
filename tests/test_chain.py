"""The whole chain through the command line: on the procedural world, and (slow) on real photos with a known number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from iir_dist.cli import main

pytestmark = pytest.mark.ray


def iir(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((folder / "metrics.json").read_text())["metrics"]
    return found


def test_from_photos_to_a_report(world: Path, tmp_path: Path, ray_session: None) -> None:
    t = tmp_path
    small = ["--set", "shard_mb=0.05"]
    iir("ingest", world / "benchmark.tar", "--groundtruth", world / "groundtruth.json", "--out", t / "images", *small)
    iir("ingest", world / "distractors.tar", "--split", "distractor", "--out", t / "distractors", *small)
    config = ["backbone=resnet18", "weights=random", "size=64"]
    iir("encoder", "--out", t / "encoder", *(x for s in config for x in ("--set", s)))
    for name in ("images", "distractors"):
        iir("embed", t / name, "--encoder", t / "encoder", "--out", t / f"raw-{name}")
    iir("whiten", t / "raw-distractors", "--encoder", t / "encoder", "--out", t / "white", "--set", "dim=8")
    for name in ("images", "distractors"):
        iir("embed", t / f"raw-{name}", "--encoder", t / "white", "--out", t / f"e-{name}")
    vectors = [t / "e-images", t / "e-distractors"]
    iir("index", *vectors, "--out", t / "index", "--set", "shards=3", "--set", "factory=PCA8,IVF4,PQ4x4np")
    iir("search", *vectors, "--queries", t / "e-images", "--out", t / "exact")
    iir("search", t / "index", "--queries", t / "e-images", "-k", 20, "--out", t / "indexed", "--set", "nprobe=4")
    for name in ("exact", "indexed"):
        output = iir("evaluate", t / name, "--groundtruth", t / "images", "--out", t / f"m-{name}")
        assert re.search(r"medium +mAP 0\.\d{4}  mP@1 [01]\.\d{4}", output)
    iir("report", t / "m-exact", t / "m-indexed", "--images", t / "images", "--out", t / "report")
    assert (t / "report" / "index.html").stat().st_size > 20_000
    for folder in ("images", "encoder", "white", "e-images", "index", "exact", "m-exact", "report"):
        assert "as written" in iir("verify", t / folder)
    exact = metrics(t / "m-exact")
    # An untrained network finds little here: there is room for training to show.
    assert exact["medium"]["map"] < 0.5
    assert exact["medium"]["num_found"] == exact["medium"]["num_positive"]
    # A whole-list AP is never below that of a list that was cut.
    assert metrics(t / "m-indexed")["medium"]["num_found"] <= exact["medium"]["num_found"]


@pytest.mark.slow
def test_the_number_that_proves_the_preprocessing(shared: Path, tmp_path: Path, ray_session: None) -> None:
    """EfficientNet-Lite0, GeM p=3, squashed to 224 px, no whitening, exact search: mAP 0.659, P@10 0.896 on wonders11."""
    t, truth = tmp_path, shared / "groundtruth" / "wonders11"
    iir("ingest", shared / "wonders11.tar", "--groundtruth", truth / "gnd_wonders11.pkl", "--out", t / "images")
    iir("encoder", "--out", t / "encoder")
    iir("embed", t / "images", "--encoder", t / "encoder", "--out", t / "embeddings")
    iir("search", t / "embeddings", "--queries", t / "embeddings", "--out", t / "rankings")
    iir("evaluate", t / "rankings", "--groundtruth", truth / "gnd_wonders11.pkl", "--out", t / "m")
    found = metrics(t / "m")
    assert list(found) == ["easy"]  # one difficulty: no medium or hard figure is made up
    assert found["easy"]["num_queries"] == 55
    assert found["easy"]["map"] == pytest.approx(0.659, abs=0.01)
    assert found["easy"]["mp@10"] == pytest.approx(0.896, abs=0.01)
    # The same annotation in the original format, on the same rankings, is the same number.
    iir("evaluate", t / "rankings", "--groundtruth", truth / "gt_files", "--out", t / "o", "--protocol", "original")
    assert metrics(t / "o")["original"]["map"] == pytest.approx(found["easy"]["map"], abs=1e-9)


@pytest.mark.slow
def test_training_shows_on_the_procedural_world(tmp_path: Path, ray_session: None) -> None:
    """The default world: an untrained network scores under 0.2, an ImageNet classifier well above it and below 0.6."""
    from iir_dist.data import synthetic

    synthetic.write(synthetic.World(), tmp_path)
    t = tmp_path
    iir("ingest", t / "benchmark.tar", "--groundtruth", t / "groundtruth.json", "--out", t / "images")
    scores = {}
    for name, settings in (("lite", []), ("random", ["--set", "backbone=resnet18", "--set", "weights=random"])):
        iir("encoder", "--out", t / name, *settings)
        iir("embed", t / "images", "--encoder", t / name, "--out", t / f"e-{name}")
        iir("search", t / f"e-{name}", "--queries", t / f"e-{name}", "--out", t / f"r-{name}")
        iir("evaluate", t / f"r-{name}", "--groundtruth", t / "images", "--out", t / f"m-{name}")
        scores[name] = metrics(t / f"m-{name}")["medium"]["map"]
    assert scores["random"] < 0.2 < scores["lite"] < 0.6
