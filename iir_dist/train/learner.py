"""The networks of a self-supervised method: the trained one, and the one that follows it."""

from __future__ import annotations

import copy
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from iir_dist.models.encoder import Encoder
from iir_dist.train.methods.method import Method, all_views


class Branch(nn.Module):
    """Trunk and head: (n, 3, H, W) in [0, 1] -> (n, D). `descriptor` as in `Method`."""

    def __init__(self, encoder: Encoder, head: nn.Module, *, descriptor: bool = False) -> None:
        super().__init__()
        self.encoder, self.head, self.descriptor = encoder, head, descriptor

    def forward(self, x: Tensor) -> Tensor:
        if self.descriptor:
            return cast(Tensor, self.head(self.encoder.describe(x)))
        token, feature_map = self.encoder.trunk.tokens((x - self.encoder.mean) / self.encoder.std)
        pooled = token if self.encoder.spec.pooling == "cls" else feature_map.mean(dim=(-2, -1))
        return cast(Tensor, self.head(pooled))


class Learner(nn.Module):
    """All that has weights, the momentum network among them, so that a checkpoint of it is whole.

    Attributes:
        encoder, head, predictor: the trained network, `predict` of which is (n, 3, H, W) -> (n, D).
        weights: the loss's own.
        target: the momentum network, without gradient; None where the method has none.
    """

    def __init__(self, encoder: Encoder, method: Method) -> None:
        super().__init__()
        # In a list: its parts are named below, once.
        self.online = [Branch(encoder, method.head, descriptor=method.descriptor)]
        self.encoder, self.head, self.predictor, self.weights = encoder, method.head, method.predictor, method.weights
        self.target: Branch | None = None
        if all_views(method.passes, target=True):
            self.target = copy.deepcopy(self.online[0]).requires_grad_(False)
            for layer in self.target.modules():
                if isinstance(layer, _BatchNorm):
                    layer.momentum = 0.0  # its running statistics follow the trained network's, as its weights do

    def train(self, mode: bool = True) -> Self:
        """As of any module, but an encoder whose own descriptor is trained stays in evaluation mode."""
        super().train(mode)
        if self.online[0].descriptor:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The trained network's output."""
        return cast(Tensor, self.predictor(self.online[0](x)))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """t <- m t + (1 - m) o, running statistics too."""
        assert self.target is not None
        own = self.online[0].state_dict()
        for name, value in self.target.state_dict().items():
            if value.is_floating_point():
                value.lerp_(own[name], 1 - momentum)
