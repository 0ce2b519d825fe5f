"""BYOL and SimSiam: predict the other view's projection, without negatives (arXiv:2006.07733, arXiv:2011.10566)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from iir_dist.data.augment import BYOL_A, BYOL_B, MOCO_V2
from iir_dist.losses.distillation import byol, negative_cosine
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, mlp, to_one


class BYOLConfig(MethodConfig):
    """BYOL (arXiv:2006.07733)."""

    name: Literal["byol"] = "byol"
    dim: int = Field(256, ge=2)
    hidden: int = Field(4096, ge=2)
    """Of head and predictor."""
    momentum: float = Field(0.99, ge=0, le=1)
    """At the start; it rises to 1. 0.99 for 300 epochs, 0.996 for 1,000."""
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6}


class BYOL(Method):
    """Each view predicts what the momentum network makes of the other."""

    remedy = "lower optim.lr, lengthen optim.warmup_steps, or raise method.momentum"

    def __init__(self, config: BYOLConfig, context: Context) -> None:
        self.config, self.steps = config, context.steps
        self.recipes = (context.recipe(BYOL_A), context.recipe(BYOL_B))
        self.passes = (Pass((0,), target=True), Pass((1,), target=True))
        self.head = mlp([context.width, config.hidden, config.dim])
        self.predictor = mlp([config.dim, config.hidden, config.dim])

    def momentum(self, step: int) -> float:
        """See `Method`."""
        return to_one(self.config.momentum, step, self.steps)

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        assert targets is not None
        return byol(z[0], targets[1]) + byol(z[1], targets[0])


class SimSiamConfig(MethodConfig):
    """SimSiam (arXiv:2011.10566)."""

    name: Literal["simsiam"] = "simsiam"
    dim: int = Field(2048, ge=2)
    """Of all three layers of the head."""
    bottleneck: int = Field(512, ge=2)
    """Of the predictor, whose rate stays at optim.lr (`optim.unscheduled`)."""
    optimization: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4, "unscheduled": ("predictor.*",)
    }  # fmt: skip


class _Beside(nn.Module):
    """x (n, D) -> (n, 2 D): what `net` makes of x, and x itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), x], dim=1)


class SimSiam(Method):
    """Each view predicts what the same network makes of the other, to which no gradient flows."""

    remedy = "lower optim.lr; its predictor must be trained at a constant rate (optim.unscheduled)"

    def __init__(self, config: SimSiamConfig, context: Context) -> None:
        self.dim = config.dim
        self.recipes = (context.recipe(MOCO_V2),) * 2
        self.passes = (Pass((0,)), Pass((1,)))
        self.head = mlp([context.width, config.dim, config.dim, config.dim], last="plain")
        self.predictor = _Beside(mlp([config.dim, config.bottleneck, config.dim]))

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        p, projection = z.split(self.dim, dim=-1)
        return (negative_cosine(p[0], projection[1]) + negative_cosine(p[1], projection[0])) / 2

    def pair(self, z: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Method`."""
        projection = z[..., self.dim :]
        return projection[0], projection[1]
