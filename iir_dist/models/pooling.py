"""Global pooling of a feature map x (B, C, H, W) to (B, C)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["gem", "spoc", "mac", "rmac", "cls"]


class GeM(nn.Module):
    """Generalized mean: (mean over positions of max(x, eps)^p)^(1/p), one learnable p for all channels.

    p = 1 is the mean (SPoC), p -> infinity the maximum (MAC). Radenovic et al., TPAMI 2019, arXiv:1711.02512, eq. 3.
    GeM+ is p = 4.6 (Shao et al., ICCV 2023, arXiv:2308.06954).
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.eps).pow(self.p).mean(dim=(-2, -1)).pow(1.0 / self.p)


class SPoC(nn.Module):
    """Mean over positions (Babenko and Lempitsky, ICCV 2015, arXiv:1510.07493, without the centre prior)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


class MAC(nn.Module):
    """Maximum over positions (Tolias et al., ICLR 2016, arXiv:1511.05879)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(-2, -1))


class RMAC(nn.Module):
    """Sum of the L2-normalized maxima of square regions at three levels, and of the whole map.

    Tolias et al., arXiv:1511.05879, section 3.2, with the region rule of their code; the whole map takes part, as in
    Radenovic et al.'s. With whitening each maximum v becomes normalize(region_matrix (v - region_mean)) before the sum.

    Args:
        levels: of regions.
        whitening: (dim, C), the shape of region_matrix, which is still to be set; None sums the maxima as they are.
    """

    region_mean: Tensor
    region_matrix: Tensor

    def __init__(self, levels: int = 3, whitening: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.levels, self.whitening = levels, whitening
        if whitening:
            self.register_buffer("region_mean", torch.zeros(whitening[1]))
            self.register_buffer("region_matrix", torch.zeros(whitening))

    def forward(self, x: Tensor) -> Tensor:
        v = self.maxima(x)
        if self.whitening:
            v = F.normalize((v - self.region_mean) @ self.region_matrix.T, dim=-1)
        return v.sum(dim=1)

    def maxima(self, x: Tensor) -> Tensor:
        """(B, R, C), unit norm: of the whole map, then of each region."""
        found = [x.amax(dim=(-2, -1))]
        for top, left, side in regions(x.shape[-2], x.shape[-1], self.levels):
            found.append(x[..., top : top + side, left : left + side].amax(dim=(-2, -1)))
        return F.normalize(torch.stack(found, dim=1), dim=-1)


def regions(height: int, width: int, levels: int = 3, overlap: float = 0.4) -> list[tuple[int, int, int]]:
    """R-MAC's regions: (top, left, side) of squares, level by level.

    At level l the side is floor(2 min(H, W) / (l + 1)). There are l of them along the short side; along the long side
    as many more as bring neighbours at level 1 closest to `overlap`.

    >>> regions(4, 4, 2)
    [(0, 0, 4), (0, 0, 2), (0, 2, 2), (2, 0, 2), (2, 2, 2)]
    >>> [left for _, left, _ in regions(6, 9, 1)]
    [0, 3]
    """
    short, long = min(height, width), max(height, width)
    more = 0
    if long > short:
        more = min(range(1, 7), key=lambda n: abs(1 - (long - short) / n / short - overlap))
    found = []
    for level in range(1, levels + 1):
        side = 2 * short // (level + 1)
        if side:
            tops = _starts(height, side, level + (more if height > width else 0))
            lefts = _starts(width, side, level + (more if width > height else 0))
            found += [(top, left, side) for top in tops for left in lefts]
    return found


def _starts(length: int, side: int, count: int) -> list[int]:
    """Where `count` windows of `side` begin that are spread over `length`; half a window is taken off before rounding."""
    step = (length - side) / (count - 1) if count > 1 else 0.0
    half = math.floor(side / 2 - 1)
    return [math.floor(half + n * step) - half for n in range(count)]


class RegionalGeM(nn.Module):
    """A map to a map: half of it is the generalized mean of each position's neighbourhood, half is the map itself.

    Shao et al., ICCV 2023, arXiv:2308.06954, section 3.1.2, with the padding by reflection of their code. What is
    negative counts as zero.
    """

    def __init__(self, p: float = 2.5, size: int = 5) -> None:
        super().__init__()
        self.p, self.size = p, size

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(min=0)
        pad = self.size // 2
        # A reflection needs more rows than it adds; tiny maps repeat their border.
        mode = "reflect" if min(x.shape[-2:]) > pad else "replicate"
        padded = F.pad(x.pow(self.p), (pad, pad, pad, pad), mode=mode)
        return 0.5 * F.avg_pool2d(padded, self.size, stride=1).pow(1.0 / self.p) + 0.5 * x


def build_pooling(kind: Pooling, p: float = 3.0, whitening: tuple[int, int] | None = None) -> nn.Module:
    """The pooling layer of that name; `p` is GeM's, `whitening` R-MAC's. The class token ("cls") is the trunk's to give."""
    if kind == "gem":
        return GeM(p)
    if kind == "rmac":
        return RMAC(whitening=whitening)
    layers: dict[Pooling, type[nn.Module]] = {"spoc": SPoC, "mac": MAC, "cls": nn.Identity}
    return layers[kind]()
