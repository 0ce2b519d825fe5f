"""Barlow Twins and VICReg: views that agree, components that tell different things (arXiv:2103.03230, arXiv:2105.04906)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from iir_dist.data.augment import BYOL_A, BYOL_B, VICREG
from iir_dist.losses.redundancy import barlow_twins, vicreg
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, mlp


class BarlowTwinsConfig(MethodConfig):
    """Barlow Twins (arXiv:2103.03230)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    dim: int = Field(8192, ge=2)
    """Of all three layers of the head."""
    weight: float = Field(0.0051, ge=0)
    """lambda, of what is off the diagonal."""
    optimization: ClassVar[dict[str, Any]] = {
        "optimizer": "lars", "lr": 0.2, "weight_decay": 1e-6, "vectors": 0.024
    }  # fmt: skip


class BarlowTwins(Method):
    """The correlation of the two views' components, over the global batch, is to be the identity."""

    remedy = "lower optim.lr, or take a larger batch (the correlation is estimated on it)"

    def __init__(self, config: BarlowTwinsConfig, context: Context) -> None:
        self.weight = config.weight
        self.recipes = (context.recipe(BYOL_A), context.recipe(BYOL_B))
        self.passes = (Pass((0,)), Pass((1,)))
        self.head = mlp([context.width, config.dim, config.dim, config.dim])

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        return barlow_twins(z[0], z[1], self.weight)


class VICRegConfig(MethodConfig):
    """VICReg (arXiv:2105.04906)."""

    name: Literal["vicreg"] = "vicreg"
    dim: int = Field(8192, ge=2)
    """Of all three layers of the expander."""
    invariance: float = Field(25.0, ge=0)
    variance: float = Field(25.0, ge=0)
    covariance: float = Field(1.0, ge=0)
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "lars", "lr": 0.2, "weight_decay": 1e-6}


class VICReg(Method):
    """Variance, invariance, covariance, the statistics taken over the global batch."""

    remedy = "raise method.variance, or lower optim.lr"

    def __init__(self, config: VICRegConfig, context: Context) -> None:
        self.config = config
        self.recipes = (context.recipe(VICREG), context.recipe(VICREG))
        self.passes = (Pass((0,)), Pass((1,)))
        self.head = mlp([context.width, config.dim, config.dim, config.dim])

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        c = self.config
        return vicreg(z[0], z[1], c.invariance, c.variance, c.covariance)
