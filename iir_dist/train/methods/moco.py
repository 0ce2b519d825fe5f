"""MoCo: keys of a slowly moving network (He et al., arXiv:1911.05722; v2 arXiv:2003.04297; v3 arXiv:2104.02057)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from iir_dist.data.augment import BYOL_A, BYOL_B, MOCO_V2
from iir_dist.losses.contrastive import info_nce
from iir_dist.train.memory import CrossBatchMemory
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, mlp, random_units, to_one, unit


class MoCoV2Config(MethodConfig):
    """MoCo v2: a queue of keys as negatives (arXiv:2003.04297)."""

    name: Literal["moco_v2"] = "moco_v2"
    dim: int = Field(128, ge=2)
    """Output of the two-layer head."""
    queue: int = Field(65_536, ge=1)
    """Keys of earlier batches."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Of the network that makes the keys."""
    temperature: float = Field(0.2, gt=0)
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4}
    published_chunk: ClassVar[int | None] = 32


class MoCoV2(Method):
    """Queries of view 0, keys of view 1; keys are embedded in shuffled chunks, so that batch norm gives nothing away.

    The queue begins with random unit vectors and is the same on every worker: keys enter it gathered, in the batch's order.
    """

    remedy = "raise method.momentum or method.queue, or lower optim.lr"

    def __init__(self, config: MoCoV2Config, context: Context) -> None:
        self.config = config
        self.recipes = (context.recipe(MOCO_V2),) * 2
        self.passes = (Pass((0,)), Pass((1,), online=False, target=True, shuffled=True))
        self.head = mlp([context.width, context.width, config.dim], norm=False)
        self.memory: CrossBatchMemory = CrossBatchMemory(config.queue, config.dim, device=context.device)
        self.memory.add(0, *_labelled(random_units(config.queue, config.dim, context.seed)))

    def momentum(self, step: int) -> float:
        """See `Method`."""
        return self.config.momentum

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        assert targets is not None
        q, k = unit(z[0]), unit(targets[0])
        negatives, _ = self.memory.contents(step)
        assert negatives is not None
        value = info_nce(q, k, negatives.to(q), self.config.temperature)
        self.memory.add(step, *_labelled(k))
        return value


class MoCoV3Config(MethodConfig):
    """MoCo v3: the batch's other keys as negatives, both ways, with a predictor (arXiv:2104.02057)."""

    name: Literal["moco_v3"] = "moco_v3"
    dim: int = Field(256, ge=2)
    hidden: int = Field(4096, ge=2)
    """Of head and predictor."""
    momentum: float = Field(0.99, ge=0, le=1)
    """At the start; it rises to 1."""
    temperature: float = Field(1.0, gt=0)
    """1.0 for ResNet-50, 0.2 for ViT."""
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "lars", "lr": 0.3, "weight_decay": 1.5e-6}


class MoCoV3(Method):
    """Each view is a query to the other's keys."""

    remedy = "raise method.momentum, lower optim.lr, or take a larger batch (more negatives)"

    def __init__(self, config: MoCoV3Config, context: Context) -> None:
        self.config, self.steps = config, context.steps
        crops = {"scale": (0.2, 1.0), "interpolation": "bilinear"}  # of its ResNet-50 run
        self.recipes = tuple(context.recipe(recipe.model_copy(update=crops)) for recipe in (BYOL_A, BYOL_B))
        self.passes = (Pass((0,), target=True), Pass((1,), target=True))
        self.head = mlp([context.width, config.hidden, config.dim], last="plain")
        self.predictor = mlp([config.dim, config.hidden, config.dim])

    def momentum(self, step: int) -> float:
        """See `Method`."""
        return to_one(self.config.momentum, step, self.steps)

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        assert targets is not None
        q, k = unit(z), unit(targets)
        t = self.config.temperature
        return info_nce(q[0], k[1], None, t) + info_nce(q[1], k[0], None, t)


def _labelled(z: Tensor) -> tuple[Tensor, Tensor]:
    """Labels are not used; the memory keeps some."""
    return z, torch.full((len(z),), -1, device=z.device)
