"""SimCLR: two views of a photo against all other views of the batch (Chen et al., ICML 2020, arXiv:2002.05709)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from iir_dist.data.augment import SIMCLR
from iir_dist.losses.contrastive import NTXent
from iir_dist.losses.pairwise import loss_and_gradient
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, mlp, unit, with_gradient


class SimCLRConfig(MethodConfig):
    """SimCLR (arXiv:2002.05709)."""

    name: Literal["simclr"] = "simclr"
    dim: int = Field(128, ge=2)
    """Output of the two-layer head."""
    temperature: float = Field(0.1, gt=0)
    """0.1 for large batches on ImageNet, 0.5 for CIFAR."""
    strength: float = Field(1.0, ge=0, le=2.5)
    """Of the colour jitter: 1 on ImageNet, 0.5 for CIFAR."""
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-4}


class SimCLR(Method):
    """See the module. The head has batch norm behind both layers, as the authors' code; both views share a forward pass."""

    remedy = "lower optim.lr, raise method.temperature, or take a larger batch (more negatives)"

    def __init__(self, config: SimCLRConfig, context: Context) -> None:
        s = config.strength
        colours = {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s}
        self.recipes = (context.recipe(SIMCLR.model_copy(update=colours)),) * 2
        self.passes = (Pass((0, 1)),)
        self.head = mlp([context.width, context.width, config.dim], last="affine")
        self._loss = NTXent(config.temperature)

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        z = unit(z).flatten(0, 1)
        labels = torch.arange(len(z) // 2, device=z.device).repeat(2)
        value, gradient = loss_and_gradient(self._loss, z.detach(), labels)  # chunked: B may be large
        return with_gradient(value, z, gradient)
