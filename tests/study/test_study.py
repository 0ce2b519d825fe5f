"""Studies of the small world from photos to the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from iir_dist.cli import main

pytestmark = pytest.mark.ray


def study(config: Path, data: Path, out: Path) -> tuple[int, str]:
    arguments = ["study", "--config", str(config), "--data", str(data), "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def rows(out: Path) -> dict[tuple[str, str, str, str], float]:
    found = json.loads((out / "study.json").read_text())
    return {(r["part"], r["name"], json.dumps(r["value"]), r["search"]): r["mean"] for r in found["rows"]}


def manifests(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.glob("*/*/manifest.json")}


def test_a_stage_that_fails_and_the_same_command_again(
    tiny: dict[str, Any], world: Path, tmp_path: Path, write_config: Any, ray_session: None
) -> None:
    """The distractors are not there: the rest is done, the page says so, the exit code too. Then they are."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("benchmark.tar", "groundtruth.json", "train.tar"):
        shutil.copy(world / name, data)
    tiny["distractors"], tiny["distractor_arms"] = ["distractors"], ["OTS"]
    tiny["index"] = {"shards": 1, "factory": "PCA8,IVF4,PQ4x4np"}
    config = write_config(tiny)

    code, output = study(config, data, out)
    assert code == 1
    assert re.search(
        r"Error: 1 of \d+ stages failed and 6 that need them were not run; first images/distractors", output
    )
    assert "Traceback" not in output
    assert re.search(r"H2: On benchmark, medium, FT (is|and)", output)
    assert "Not complete" in (out / "index.html").read_text()
    before, first = manifests(out), rows(out)
    assert {key[:2] for key in first} == {("arm", "OTS"), ("arm", "FT")}

    shutil.copy(world / "distractors.tar", data)
    code, output = study(config, data, out)
    assert code == 0, output
    after = manifests(out)
    assert {key: after[key] for key in before} == before, "a finished stage was made again"
    assert {key: rows(out)[key] for key in first} == first
    assert {key[:2] + key[3:] for key in rows(out)} >= {
        ("distractors", "OTS", "exact"),
        ("distractors", "OTS", "index"),
    }

    page, found = (out / "index.html").read_text(), json.loads((out / "study.json").read_text())
    assert "Not complete" not in page
    assert [v["question"] for v in found["verdicts"]] == ["H2"] * len({v["level"] for v in found["verdicts"]})
    for v in found["verdicts"]:
        assert v["sentence"] in page
        assert v["interval"][0] <= v["difference"] <= v["interval"][1]
        assert v["difference"] == pytest.approx(v["mean_a"] - v["mean_b"])
    assert page.count("<li class=") >= 8 * 2 * 5  # the first five of two arms
    assert "http" not in page.replace("http://www.w3.org", "").split("Config</summary>")[0]


def test_a_landmark_of_the_test_in_the_training_set(
    tiny: dict[str, Any], world: Path, tmp_path: Path, write_config: Any, ray_session: None
) -> None:
    """Found by name before anything is trained; what is not trained is measured."""
    import io
    import tarfile

    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("benchmark.tar", "groundtruth.json"):
        shutil.copy(world / name, data)
    with tarfile.open(world / "benchmark.tar") as archive:
        member = next(m for m in archive if m.isfile())
        content = archive.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(world / "train.tar") as source, tarfile.open(data / "train.tar", "w") as target:
        for m in source:
            target.addfile(m, source.extractfile(m))
        added = tarfile.TarInfo(f"taken/{Path(member.name).name}")
        added.size = len(content)
        target.addfile(added, io.BytesIO(content))
    code, output = study(write_config(tiny), data, out)
    assert code == 1
    assert "stages failed" in output
    assert "training and test share" in output
    assert Path(member.name).stem in output
    assert {key[1] for key in rows(out)} == {"OTS"}
    assert not list(out.glob("encoders/*-ap-*"))


@pytest.mark.slow
def test_everything_that_a_study_can_hold_and_a_kill_in_the_middle(
    tiny: dict[str, Any], world: Path, tmp_path: Path, write_config: Any
) -> None:
    tiny["seeds"] = [0, 1]
    tiny["distractors"], tiny["index"] = ["distractors"], {"shards": 1, "factory": "PCA8,IVF4,PQ4x4np"}
    tiny["whitening_photos"], tiny["near_duplicates"] = "train", 0.5
    tiny["trainings"]["simclr"] = {
        "stage": "pretrain", "photos": ["train"],
        "settings": {"crop": 32, "batch": 8, "steps": 2, "workers": 1, "optim": {"optimizer": "adamw", "lr": 1e-3}},
    }  # fmt: skip
    tiny["arms"]["CLS"] = {"start": "scratch", "pretraining": "classifier"}
    tiny["arms"]["CL"] = {"start": "scratch", "pretraining": "simclr"}
    tiny["hypotheses"].append({"name": "H1", "a": "CL", "b": "CLS", "axis": "pretraining"})
    tiny["ablations"] = [
        {"axis": "size", "values": [32], "arms": ["OTS", "FT"]},
        {"axis": "whitening", "values": [{"method": "pca", "dim": 8}, {"method": "lw", "dim": 8}], "arms": ["OTS"]},
        {"axis": "finetuning.labels", "values": [0.5], "arms": ["FT"]},
    ]
    tiny["leaderboard"] = [
        {
            "name": "best", "arm": "FT", "rerank": {"name": "qe"},
            "settings": {"scales": [1.0, 0.5], "whitening": {"method": "pca", "dim": 8}},
        }
    ]  # fmt: skip
    config = write_config(tiny)
    text = config.read_text()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "iir_dist", "study", "--config", str(config), "--data", str(world), "--out"]
    assert "nan" not in text
    done = subprocess.run([*command, str(whole)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    process = subprocess.Popen([*command, str(killed)], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while len(list(killed.glob("encoders/*/manifest.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "study.json").exists()
    before = manifests(killed)
    done = subprocess.run([*command, str(killed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {key: manifests(killed)[key] for key in before} == before
    assert rows(killed) == rows(whole)
    found = json.loads((whole / "study.json").read_text())
    assert {row["part"] for row in found["rows"]} == {"arm", "distractors", "ablation", "leaderboard"}
    assert {v["question"] for v in found["verdicts"]} == {"H1", "H2"}
    assert {o["what"] for o in found["overlap"]} == {"overlap", "near"}
    page = (whole / "index.html").read_text()
    for part in ("One thing at a time", "Leaderboard", "Among distractors", "look like a test photo"):
        assert part in page
