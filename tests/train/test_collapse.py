"""Collapse detectors against slow transcriptions and vectors whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iir_dist.models.encoder import EncoderConfig, create
from iir_dist.train.collapse import LEAST_SPREAD_OF_HEAD, Health


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaning(n: int, dim: int, width: float, seed: int = 0) -> Tensor:
    """Vectors around one direction."""
    return F.normalize(normal(1, dim, seed=seed) + width * normal(n, dim, seed=seed + 1), dim=1)


@pytest.mark.parametrize("chunk", [1, 8 * 9 * 3, 2**24])
@pytest.mark.parametrize(("n", "dim"), [(9, 4), (9, 9), (9, 20), (2, 3)])
def test_figures_against_loops(n: int, dim: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iir_dist.train.collapse._CHUNK_BYTES", chunk)
    tensor = leaning(n, dim, 0.7)
    z, labels = tensor.numpy(), [0, 1, 0, -1, 2, 1, 0, -1, 3][:n]
    found = Health.of(tensor, torch.tensor(labels))

    deviations = [math.sqrt(sum((z[i, j] - z[:, j].mean()) ** 2 for i in range(n)) / n) for j in range(dim)]
    assert found.spread == pytest.approx(sum(deviations) / dim * math.sqrt(dim), rel=1e-12)

    singular = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
    share = [s / sum(singular) for s in singular]
    assert found.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p > 1e-12)), rel=1e-5)
    assert found.full_rank == min(dim, n - 1)

    pairs = [(i, j) for i in range(n) for j in range(i)]
    squared = {(i, j): sum((z[i] - z[j]) ** 2) for i, j in pairs}
    assert found.uniformity == pytest.approx(math.log(np.mean([math.exp(-2 * squared[p]) for p in pairs])), abs=1e-12)
    equal = [squared[i, j] for i, j in pairs if labels[i] == labels[j] >= 0]
    assert found.alignment == (pytest.approx(np.mean(equal), abs=1e-12) if equal else None)
    assert Health.of(tensor).alignment is None


def test_vectors_spread_evenly() -> None:
    z = F.normalize(normal(2000, 64), dim=1)
    found = Health.of(z)
    assert found.spread == pytest.approx(1, abs=0.01)
    assert found.effective_rank > 60
    assert found.uniformity == pytest.approx(-4 + 4 * 4 / 2 / 64, abs=0.02)  # s has variance 1 / D: E exp(4s) / e^4
    assert found.warning() is None
    axes = torch.cat([torch.eye(5), -torch.eye(5)])
    found = Health.of(axes, torch.arange(5).repeat(2))
    assert found.spread == pytest.approx(1, abs=1e-6)
    assert found.effective_rank == pytest.approx(5, abs=1e-5)
    assert found.alignment == pytest.approx(4, abs=1e-6)
    assert found.warning() is None


def test_complete_collapse() -> None:
    same = leaning(1, 16, 0.5).repeat(40, 1)
    for z in (same, torch.zeros(40, 16), F.normalize(same + 1e-4 * normal(40, 16, seed=3), dim=1)):
        found = Health.of(z, torch.zeros(40, dtype=torch.int64))
        assert found.spread < 0.001
        assert found.uniformity >= -1e-5 or not z.any()
        warning = found.warning()
        assert warning is not None
        assert "collapsed completely" in warning
        assert "learning rate" in warning
    assert Health.of(same).effective_rank >= 1
    assert Health.of(same, torch.zeros(40, dtype=torch.int64)).alignment == pytest.approx(0, abs=1e-12)


def test_outputs_of_a_head_must_be_spread_wider() -> None:
    small = Health.of(leaning(40, 16, 0.05))
    assert 0.02 < small.spread < 0.08
    assert small.warning() is None
    assert "collapsed completely" in (small.warning(LEAST_SPREAD_OF_HEAD) or "")
    assert Health.of(leaning(40, 16, 0.5)).warning(LEAST_SPREAD_OF_HEAD) is None


@pytest.mark.parametrize(("n", "dim", "directions"), [(200, 160, 2), (300, 64, 1), (40, 256, 1), (320, 300, 4)])
def test_dimensional_collapse(n: int, dim: int, directions: int) -> None:
    z = normal(n, directions) @ normal(directions, dim, seed=1) + 1e-3 * normal(n, dim, seed=2)
    found = Health.of(F.normalize(z, dim=1))
    assert found.spread > 0.05
    warning = found.warning()
    assert warning is not None
    assert f"few of {min(dim, n - 1)} directions" in warning


@pytest.mark.parametrize(("n", "dim"), [(2, 512), (3, 2), (5, 128), (12, 2048), (200, 3), (200, 512)])
def test_few_vectors_or_dimensions_are_no_collapse(n: int, dim: int) -> None:
    assert Health.of(leaning(n, dim, 1.0)).warning() is None
    assert Health.of(leaning(n, dim, 0.05)).warning() is None  # mean cosine 0.9975


@pytest.mark.parametrize("pooling", ["gem", "spoc"])
def test_a_random_network_has_not_collapsed(pooling: str) -> None:
    encoder = create(EncoderConfig(backbone="resnet18", weights="random", size=64, pooling=pooling))  # type: ignore[arg-type]
    colours = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = encoder.describe(F.interpolate(colours, size=64, mode="bilinear"))
    found = Health.of(z)
    assert found.warning() is None
    assert found.spread > 0.03
    assert found.effective_rank > 10


def test_dtypes_and_what_is_not_finite() -> None:
    z = leaning(30, 8, 1.0)
    labels = torch.arange(30) % 4
    expected, found = Health.of(z, labels), Health.of(z.float(), labels)
    for name, value in found.as_dict().items():
        assert value == pytest.approx(expected.as_dict()[name], rel=1e-4)
    half = z.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Health.of(half, labels) == Health.of(half.float(), labels)
    assert set(found.as_dict()) == {"spread", "effective_rank", "uniformity", "alignment"}
    assert set(Health.of(z).as_dict()) == {"spread", "effective_rank", "uniformity"}

    z[3, 2] = torch.inf
    broken = Health.of(z, labels)
    assert all(math.isnan(value) for value in broken.as_dict().values())
    assert "not finite" in (broken.warning() or "")
    with pytest.raises(ValueError, match="two vectors"):
        Health.of(z[:1])
