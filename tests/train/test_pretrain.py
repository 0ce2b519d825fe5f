"""Every self-supervised method: equal on any number of workers, resumable, and its networks do what they should."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from iir_dist.train.methods import METHODS

WORKER = Path(__file__).with_name("pretrain_worker.py")
VARIED = ["moco_v2/recompute", "simclr/recompute", "byol/global", "simclr/global"]


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_workers(world: int, folder: Path, images: Path, cases: list[str]) -> list[dict[str, Tensor]]:
    """What each of `world` processes ends with."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder / f"meet-{world}"), str(folder / f"out-{world}"),
             str(images / "unlabelled"), *cases]
        )
        for rank in range(world)
    ]  # fmt: skip
    assert [p.wait(timeout=300) for p in processes] == [0] * world
    return [torch.load(folder / f"out-{world}.{rank}", weights_only=True) for rank in range(world)]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert torch.isfinite(value).all(), name
            assert torch.allclose(found[name].double(), value.double(), atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_trains_the_same_network(workers: int, images: Path, tmp_path: Path) -> None:
    """Loss, weights, running statistics, momentum network, queues, prototypes and centre after three steps, in float64."""
    cases = [*METHODS, *VARIED]
    (one,) = on_workers(1, tmp_path, images, cases)
    for found in on_workers(workers, tmp_path, images, cases):
        # Queues are float32: a double that lies between two floats may be rounded either way.
        found = {k: v for k, v in found.items() if "num_batches_tracked" not in k}
        expected = {k: v for k, v in one.items() if "num_batches_tracked" not in k}
        assert_equal(found, expected, 1e-8)
    for case in cases:
        losses = one[f"{case}//losses"]
        assert len(losses) == 3
        assert len(set(losses.tolist())) == 3, case
