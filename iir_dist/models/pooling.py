"""Global pooling of a feature map x (B, C, H, W) to (B, C)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["gem", "spoc", "mac"]


class GeM(nn.Module):
    """Generalized mean: (mean over positions of max(x, eps)^p)^(1/p), one learnable p for all channels.

    p = 1 is the mean (SPoC), p -> infinity the maximum (MAC). Radenovic et al., TPAMI 2019, arXiv:1711.02512, eq. 3.
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


def build_pooling(kind: Pooling, p: float = 3.0) -> nn.Module:
    """The pooling layer of that name; `p` is GeM's."""
    return GeM(p) if kind == "gem" else SPoC() if kind == "spoc" else MAC()
