"""Pooling layers against slow transcriptions, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.models.pooling import RMAC, GeM, RegionalGeM, build_pooling, regions


def maps(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_gem_between_mean_and_maximum() -> None:
    x = maps(2, 5, 4, 6)
    assert torch.allclose(GeM(1.0).double()(x), build_pooling("spoc")(x), atol=1e-12)
    assert torch.allclose(GeM(400.0).double()(x), build_pooling("mac")(x), atol=2e-2)
    slow = torch.stack([torch.stack([(m.flatten() ** 3).mean() ** (1 / 3) for m in image]) for image in x])
    assert torch.allclose(GeM(3.0).double()(x), slow, atol=1e-12)
    gem = GeM(3.0).double()
    gem(x).sum().backward()
    assert gem.p.grad is not None
    assert gem.p.grad.abs() > 0


def published_regions(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    """The published rule, step by step: steps 2..7, overlap 0.4, centres rounded down."""
    w = min(height, width)
    best, extra = math.inf, 0
    if height != width:
        for index, steps in enumerate((2, 3, 4, 5, 6, 7)):
            shift = (max(height, width) - w) / (steps - 1)
            error = abs((w * w - w * shift) / (w * w) - 0.4)
            if error < best:
                best, extra = error, index + 1
    wide, high = (extra if height < width else 0), (extra if height > width else 0)
    found = []
    for level in range(1, levels + 1):
        side = math.floor(2 * w / (level + 1))
        if side == 0:
            continue
        half = math.floor(side / 2 - 1)
        columns, rows = level + wide, level + high
        for i in range(rows):
            shift = 0 if rows == 1 else (height - side) / (rows - 1)
            top = math.floor(half + i * shift) - half
            for j in range(columns):
                shift_x = 0 if columns == 1 else (width - side) / (columns - 1)
                found.append((top, math.floor(half + j * shift_x) - half, side))
    return found


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_regions_of_rmac(height: int, width: int) -> None:
    found = regions(height, width)
    assert found == published_regions(height, width, 3)
    assert all(t >= 0 and t + s <= height and le >= 0 and le + s <= width for t, le, s in found)
    covered = torch.zeros(height, width)
    for top, left, side in found[: len(regions(height, width, 1))]:
        covered[top : top + side, left : left + side] = 1
    if max(height, width) <= 7 * min(height, width):  # of longer maps seven squares cannot cover all
        assert covered.all()


def test_rmac_is_the_sum_of_normalized_maxima() -> None:
    x = maps(2, 7, 6, 9)
    slow = []
    for image in x:
        parts = [image.flatten(1).amax(dim=1)]
        parts += [image[:, t : t + s, le : le + s].flatten(1).amax(dim=1) for t, le, s in published_regions(6, 9, 3)]
        slow.append(sum(part / part.norm() for part in parts))
    assert torch.allclose(RMAC()(x), torch.stack(slow), atol=1e-12)  # type: ignore[arg-type]


def test_rmac_whitens_each_region() -> None:
    """Maximum, L2, whitening, L2, sum; each region by itself."""
    x = maps(2, 7, 6, 9)
    generator = torch.Generator().manual_seed(1)
    mean, matrix = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((7,), (3, 7)))
    layer = build_pooling("rmac", whitening=(3, 7)).double()
    layer.load_state_dict({"region_mean": mean, "region_matrix": matrix})
    for image, got in zip(x, layer(x), strict=True):
        slow = np.zeros(3)
        for top, left, height, width in [(0, 0, 6, 9), *((t, le, s, s) for t, le, s in published_regions(6, 9, 3))]:
            v = np.array([channel[top : top + height, left : left + width].max() for channel in image.numpy()])
            w = matrix.numpy() @ (v / np.linalg.norm(v) - mean.numpy())
            slow += w / np.linalg.norm(w)
        assert np.abs(got.numpy() - slow).max() < 1e-12
    assert not RMAC().state_dict()


def test_regional_gem_is_half_of_each_neighbourhood() -> None:
    x = maps(2, 3, 7, 8) - 0.2  # some of it negative
    got = RegionalGeM()(x)
    padded = F.pad(x.clamp(min=0), (2, 2, 2, 2), mode="reflect")
    for row in range(7):
        for column in range(8):
            window = padded[:, :, row : row + 5, column : column + 5].flatten(2)
            mean = (window**2.5).mean(dim=2) ** (1 / 2.5)
            expected = 0.5 * mean + 0.5 * x[:, :, row, column].clamp(min=0)
            assert torch.allclose(got[:, :, row, column], expected, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_regional_gem_of_tiny_maps(side: int) -> None:
    x = maps(1, 4, side, 5)
    got = RegionalGeM()(x)
    assert got.shape == x.shape
    constant = torch.full((1, 1, side, 3), 0.7, dtype=torch.float64)
    assert torch.allclose(RegionalGeM()(constant), constant)
