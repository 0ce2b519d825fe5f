"""Three-stage backprop equals the direct gradient, on one worker and on several, whatever the split."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iir_dist.losses.average_precision import QuantizedAP
from iir_dist.losses.pairwise import loss_and_gradient, masks
from iir_dist.train.backprop import three_stage

WORKER = Path(__file__).with_name("worker.py")


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def direct(loss_name: str) -> dict[str, Tensor]:
    """One graph over the whole batch, no chunk, no gather: what all others are compared with."""
    worker = load_worker()
    net, x, labels = worker.problem()
    z = F.normalize(net(x), dim=1)
    kind = worker.QuantizedAP(num_bins=20) if loss_name == "ap" else worker.NTXent(0.3)
    values, counted = kind(z @ z.T, *masks(labels, 0, len(z)))
    loss = (values * counted).sum() / counted.sum()
    loss.backward()
    return {**{n: p.grad for n, p in net.named_parameters()}, "loss": loss.detach()}


@pytest.mark.parametrize("loss", ["ap", "ntxent"])
def test_one_worker(loss: str) -> None:
    found, expected = load_worker().gradients(loss), direct(loss)
    for name, value in expected.items():
        assert torch.allclose(found[name].to(value.dtype), value, atol=1e-10, rtol=0), name


@pytest.mark.parametrize("world", [2, 4])
def test_several_workers(world: int, tmp_path: Path) -> None:
    """13 images over 2 or 4 workers, so that shares and chunks are uneven."""
    command = [sys.executable, str(WORKER)]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "meet"), str(tmp_path / "out")])
        for rank in range(world)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0] * world
    results = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(world)]
    for loss in ("ap", "ntxent"):
        for name, value in direct(loss).items():
            for result in results:
                found = result[f"{loss}/{name}"].to(value.dtype)
                assert torch.allclose(found, value, atol=1e-10, rtol=0), (loss, name)
    expected_rows = torch.cat([torch.full((r, 2), float(r)) for r in range(world)])
    for rank, result in enumerate(results):
        assert torch.equal(result["rows"], expected_rows)
        assert int(result["begin"]) == sum(range(rank))


def test_memory_holds_one_chunk_of_graph() -> None:
    """The largest input that ever gets a graph is a chunk, however large the batch."""
    graph_sizes = []
    weight = torch.ones(3, 4, requires_grad=True)

    def embed(x: Tensor) -> Tensor:
        z = F.normalize(x @ weight, dim=1)
        if z.requires_grad:
            graph_sizes.append(len(x))
        return z

    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    three_stage(embed, lambda: x.split(8), torch.arange(64) % 5, partial(loss_and_gradient, QuantizedAP()), 4)
    assert graph_sizes == [8] * 8
    assert weight.grad is not None
