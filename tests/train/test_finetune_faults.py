"""kill -9 of a worker or of the driver, at a random moment: the weights and the loss curve are those of a quiet run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killing import EVERY, result, with_a_worker_killed, with_the_driver_killed

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    "projection=16", "size=48", "batches.classes=4", "batches.per_class=3", "chunk=3", "steps=24",
    f"checkpoint_every={EVERY}", "loss.name=smooth_ap", "memory.size=32", "memory.start=4", "optim.ema=0.9",
    "validation.classes=2", "validation.every=6", "workers=2",
)  # fmt: skip


def command(images: Path, encoder: Path, out: Path) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "iir_dist", "finetune", str(images / "train"), "--init", str(encoder),
            "--out", str(out), *sets]  # fmt: skip


@pytest.fixture(scope="module")
def quiet(images: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("quiet") / "encoder"
    subprocess.run(command(images, encoder, out), check=True, timeout=400)
    weights, curve = result(out)
    assert [line["step"] for line in curve] == list(range(24))
    return weights, curve


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_is_killed(images: Path, encoder: Path, tmp_path: Path, quiet: Any, seed: int) -> None:
    out = tmp_path / "encoder"
    assert with_a_worker_killed(command(images, encoder, out), out, seed) == quiet


@pytest.mark.parametrize("seed", range(4))
def test_the_driver_is_killed(images: Path, encoder: Path, tmp_path: Path, quiet: Any, seed: int) -> None:
    out = tmp_path / "encoder"
    assert with_the_driver_killed(command(images, encoder, out), out, 100 + seed) == quiet
