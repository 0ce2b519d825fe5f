"""kill -9 during pretraining, with all that a method remembers: as quiet as if nothing had happened, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killing import EVERY, result, with_a_worker_killed, with_the_driver_killed

pytestmark = [pytest.mark.ray, pytest.mark.slow]

METHODS: dict[str, tuple[str, ...]] = {
    "simclr": ("method.dim=8", "recompute=true"),
    "moco_v2": ("method.dim=8", "method.queue=64", "method.momentum=0.9"),
    "swav": (
        "method.dim=8", "method.prototypes=6", "method.local_views=1", "method.queue=24", "method.queue_start=4",
        "method.freeze_prototypes=2",
    ),
}  # fmt: skip
SETTINGS = (
    "encoder.backbone=timm:test_resnet", "encoder.weights=random", "encoder.size=48", "crop=48", "local_crop=32", "batch=8",
    "chunk=4", "steps=24", f"checkpoint_every={EVERY}", "optim.optimizer=sgd", "optim.lr=0.01", "optim.ema=0.9",
    "probe.every=6", "workers=2",
)  # fmt: skip


def command(images: Path, method: str, out: Path) -> list[str]:
    sets = [word for setting in (f"method.name={method}", *METHODS[method], *SETTINGS) for word in ("--set", setting)]
    return [sys.executable, "-m", "iir_dist", "pretrain", str(images / "unlabelled"), str(images / "train"),
            "--probe", str(images / "benchmark"), "--out", str(out), *sets]  # fmt: skip


@pytest.fixture(scope="module", params=list(METHODS))
def quiet(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of the method, and what an undisturbed run of it ends with."""
    out = tmp_path_factory.mktemp("quiet") / "encoder"
    subprocess.run(command(images, request.param, out), check=True, timeout=400)
    weights, curve = result(out)
    assert [line["step"] for line in curve] == list(range(24))
    assert sum("val_map" in line for line in curve) == 4
    return request.param, (weights, curve)


@pytest.mark.parametrize("seed", range(2))
def test_a_worker_is_killed(images: Path, tmp_path: Path, quiet: Any, seed: int) -> None:
    method, expected = quiet
    out = tmp_path / "encoder"
    assert with_a_worker_killed(command(images, method, out), out, seed) == expected


@pytest.mark.parametrize("seed", range(2))
def test_the_driver_is_killed(images: Path, tmp_path: Path, quiet: Any, seed: int) -> None:
    method, expected = quiet
    out = tmp_path / "encoder"
    assert with_the_driver_killed(command(images, method, out), out, 100 + seed) == expected
