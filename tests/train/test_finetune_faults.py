"""kill -9 of a worker or of the driver, at a random moment: the weights and the loss curve are those of a quiet run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from iir_dist.train.checkpoints import LOG

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    "projection=16", "size=48", "batches.classes=4", "batches.per_class=3", "chunk=3", "steps=24", "checkpoint_every=3",
    "loss.name=smooth_ap", "memory.size=32", "memory.start=4", "optim.ema=0.9", "validation.classes=2",
    "validation.every=6", "workers=2",
)  # fmt: skip


def command(images: Path, encoder: Path, out: Path) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "iir_dist", "finetune", str(images / "train"), "--init", str(encoder),
            "--out", str(out), *sets]  # fmt: skip


def result(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_sec")} for line in lines]
    return {n: v.tolist() for n, v in load_file(out / "weights.safetensors").items()}, curve


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def quiet(images: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("quiet") / "encoder"
    subprocess.run(command(images, encoder, out), check=True, timeout=400)
    weights, curve = result(out)
    assert [line["step"] for line in curve] == list(range(24))
    return weights, curve


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_is_killed(images: Path, encoder: Path, tmp_path: Path, quiet: Any, seed: int) -> None:
    """Ray starts the group again; the run goes on from its checkpoint by itself."""
    rng, out = random.Random(seed), tmp_path / "encoder"
    first = out / f"checkpoints/{3 * rng.randint(1, 5):08d}.pt"
    process = subprocess.Popen(command(images, encoder, out))
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(rng.random())
    workers = workers_of(process)
    assert len(workers) == 2
    rng.choice(sorted(workers, key=lambda p: p.pid)).send_signal(signal.SIGKILL)
    assert process.wait(timeout=400) == 0
    assert result(out) == quiet


@pytest.mark.parametrize("seed", range(4))
def test_the_driver_is_killed(images: Path, encoder: Path, tmp_path: Path, quiet: Any, seed: int) -> None:
    rng, out = random.Random(100 + seed), tmp_path / "encoder"
    first = out / f"checkpoints/{3 * rng.randint(1, 5):08d}.pt"
    process = subprocess.Popen(command(images, encoder, out))
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(rng.random())
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=60)  # a local Ray ends with its driver
    assert not (out / "manifest.json").exists()
    subprocess.run(command(images, encoder, out), check=True, timeout=400)
    assert result(out) == quiet
