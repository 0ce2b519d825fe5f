"""What a self-supervised method is, apart from the network it trains and the loop it trains in.

A method declares its views (one recipe each) and which of them go through which network together; it brings the head (and
the predictor) behind the trunk, and a loss of the *global* batch. That loss sees the outputs for all photos of all workers
and is the same on each of them; `iir_dist.train.pretrain_task` gathers the outputs, takes the loss's gradient with respect
to them and pushes its own rows through the network. So no method has distributed code, and none can be wrong on two workers
if it is right on one.

Legend: V views of the trained network, in the order of the passes; T views of the momentum network; B photos in the global
batch; D the output's dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from iir_dist.data.augment import Recipe
from iir_dist.data.sampling import Sampler
from iir_dist.train.neighbours import Neighbours


class MethodConfig(BaseModel):
    """Base of each method's parameters. Defaults are those of its paper and code, for ResNet-50 on ImageNet."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    optimization: ClassVar[dict[str, Any]]
    """Its published optimizer; `lr` is per 256 photos of the batch."""
    published_chunk: ClassVar[int | None] = None
    """`pretrain.chunk` where it is not set and batch norm would otherwise give an answer away."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Views of the same photos that are embedded in one forward pass, so that batch norm sees them together.

    Args:
        views: numbers of recipes.
        online: embedded by the trained network.
        target: embedded by the momentum network.
        shuffled: the photos of a chunk are dealt out anew, so that batch norm sees others here than in the online pass and
            cannot tell which belong together (the shuffling BN of MoCo, arXiv:1911.05722, section 3.3). Of a pass that is
            the target's alone.
    """

    views: tuple[int, ...]
    online: bool = True
    target: bool = False
    shuffled: bool = False


class Memory(Protocol):
    """What a method remembers from step to step; it goes into the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a method is built for.

    Args:
        width: of the trunk's pooled features.
        steps: of the whole training.
        batch: photos in the global batch.
        crop, local_crop: px of the views.
        min_scale: smallest part of a photo in a (global) view, where it differs from the published one.
        seed: of everything that is drawn.
        device: where what a method remembers lies.
        neighbours: of all photos, of a method that has rounds.
    """

    width: int
    steps: int
    batch: int
    crop: int
    local_crop: int
    min_scale: float | None
    seed: int
    device: torch.device
    neighbours: Neighbours | None = None

    def recipe(self, published: Recipe, *, local: bool = False) -> Recipe:
        """A published recipe at this run's sizes."""
        changes: dict[str, Any] = {"size": self.local_crop if local else self.crop}
        if self.min_scale is not None and not local:
            changes["scale"] = (self.min_scale, published.scale[1])
        return published.model_copy(update=changes)


class Method:
    """Base of all methods.

    Attributes:
        recipes: one a view.
        passes: see `Pass`.
        head: pooled features (n, width) -> projection.
        predictor: projection -> output, in the trained network only.
        weights: what the loss itself learns (prototypes); its gradient is the loss's.
        descriptor: what goes into the head is the encoder's own descriptor, batch norm frozen (evaluation mode) as where
            it is used; else the mean of the feature map, batch norm in training.
        sampler: draws the batches; None: all photos in epochs.
        memory: or None.
        published: whose trunk is the result.
    """

    recipes: tuple[Recipe, ...]
    passes: tuple[Pass, ...]
    head: nn.Module
    predictor: nn.Module = nn.Identity()
    weights: nn.Module = nn.Module()
    descriptor: bool = False
    sampler: Sampler | None = None
    memory: Memory | None = None
    published: Literal["encoder", "target.encoder"] = "encoder"
    remedy: str = "lower optim.lr or lengthen optim.warmup_steps"
    """What to do if it collapses."""

    def momentum(self, step: int) -> float:
        """Of the momentum network, which follows before step `step`: t <- m t + (1 - m) o."""
        raise NotImplementedError

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """The scalar loss of the global batch; called once a step, because what it remembers moves on.

        Args:
            z: (V, B, D) outputs of the trained network, float32 or float64.
            targets: (T, B, D') outputs of the momentum network, without gradient; None where there is none.
        """
        raise NotImplementedError

    def pair(self, z: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two (B, D) outputs of the same photos, whose search for each other is logged beside the loss."""
        other = z[1] if len(z) > 1 else targets
        assert other is not None
        return z[0], other[0] if other.ndim == 3 else other

    def trains_weights(self, step: int) -> bool:
        """Whether the loss's own weights are trained in this step."""
        return True


def mlp(dims: Sequence[int], *, norm: bool = True, last: Literal["none", "plain", "affine"] = "none") -> nn.Sequential:
    """Linear layers with ReLU between; with `norm` a batch norm before each ReLU, and behind the last layer as `last` says.

    A layer before a batch norm has no bias.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        end = i == len(dims) - 2
        layers.append(nn.Linear(a, b, bias=not norm or (end and last == "none")))
        if not end:
            layers += [nn.BatchNorm1d(b), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]
        elif last != "none":
            layers.append(nn.BatchNorm1d(b, affine=last == "affine"))
    return nn.Sequential(*layers)


def to_one(start: float, step: int, steps: int) -> float:
    """A momentum that rises from `start` to 1 along a cosine (BYOL, arXiv:2006.07733, section 3.3)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


def unit(x: Tensor) -> Tensor:
    """Rows of unit L2 norm."""
    return F.normalize(x, dim=-1)


def with_gradient(value: float, z: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of that value whose gradient with respect to z is `gradient`: for losses that compute theirs themselves."""
    return ((z - z.detach()) * gradient).sum() + value


def random_units(count: int, dim: int, seed: int) -> Tensor:
    """(count, dim) unit vectors."""
    return unit(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def all_views(passes: Iterable[Pass], *, target: bool) -> tuple[int, ...]:
    """Numbers of the views that the trained (or the momentum) network embeds, in the order of the passes."""
    return tuple(view for p in passes if (p.target if target else p.online) for view in p.views)
