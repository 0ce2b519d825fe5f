"""Batch norm in training that does not depend on the number of workers.

A forward pass in training takes its statistics from the photos of that pass: a *chunk* of the global batch, wherever it
is computed. So as long as the chunks are the same, so are outputs and gradients, on one worker or on many (the "ghost"
batch norm of Hoffer et al., arXiv:1705.08741; with one chunk a worker it is the usual per-device batch norm). `Running`
makes the running statistics independent of the workers too. `GlobalBatchNorm` takes statistics over all workers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from iir_dist.train import collectives


class Running:
    """Running statistics of batch norms, moved once a step to the mean over all passes of all workers.

    r <- (1 - m) r + m mean(s), where torch's own rule would apply r <- (1 - m) r + m s once a pass, in an order that
    depends on who computes what, and keeps apart what each worker has seen. Between `begin` and `end` the buffers hold
    what the last pass saw.

    Args:
        modules: whose batch norms they are; from now on torch's own momentum in them is 1.
    """

    def __init__(self, *modules: nn.Module) -> None:
        layers = [x for module in modules for x in module.modules() if isinstance(x, _BatchNorm)]
        self._layers = [layer for layer in layers if layer.running_mean is not None]
        self._momenta = [0.1 if layer.momentum is None else layer.momentum for layer in self._layers for _ in range(2)]
        for layer in self._layers:
            layer.momentum = 1.0
        self._before = self._sums = list[Tensor]()
        self._passes = 0

    def begin(self) -> None:
        """Before a step."""
        self._before = [x.clone() for x in self._buffers()]
        self._sums = [torch.zeros_like(x) for x in self._before]
        self._passes = 0

    @torch.no_grad()
    def count(self) -> None:
        """After a pass: it counts. A pass that only repeats another does not."""
        self._passes += 1
        for total, x in zip(self._sums, self._buffers(), strict=True):
            total += x

    @torch.no_grad()
    def end(self) -> None:
        """After a step's last pass, on every worker."""
        if not self._layers:
            return
        flat = torch.cat([*self._sums, self._sums[0].new_tensor([self._passes])])
        if collectives.world_size() > 1:
            dist.all_reduce(flat)
        means = (flat[:-1] / flat[-1]).split([len(x) for x in self._before])
        for x, before, mean, momentum in zip(self._buffers(), self._before, means, self._momenta, strict=True):
            x.copy_(before.lerp(mean, momentum))

    def _buffers(self) -> list[Tensor]:
        return [x for layer in self._layers for x in (layer.running_mean, layer.running_var) if x is not None]


class _Normalize(torch.autograd.Function):
    """x (N, C, ...) -> (x - mean) / std over all workers, with the mean and variance (C,) and the number of values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        wide = x.double()  # the sum of squares cancels
        sums = torch.cat([wide.sum(dims), wide.square().sum(dims), wide.new_tensor([x.numel() / x.shape[1]])])
        if collectives.world_size() > 1:
            dist.all_reduce(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        scale = (var + eps).rsqrt()
        shape = [1, -1] + [1] * (x.ndim - 2)
        y = (x - mean.to(x.dtype).view(shape)) * scale.to(x.dtype).view(shape)
        ctx.save_for_backward(y, scale, total)
        mean, var = mean.to(x.dtype), var.to(x.dtype)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Of the global loss: every worker's values moved the mean and the variance of all.
        gradient = gradients[0]
        y, scale, total = ctx.saved_tensors
        dims, shape = [0, *range(2, y.ndim)], [1, -1] + [1] * (y.ndim - 2)
        wide = gradient.double()
        sums = torch.cat([wide.sum(dims), (wide * y).sum(dims)])
        if collectives.world_size() > 1:
            dist.all_reduce(sums)
        shift, pull = ((x / total).to(y.dtype).view(shape) for x in sums.chunk(2))
        return scale.to(y.dtype).view(shape) * (gradient - shift - y * pull), None


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the passes of all workers at once, on any device (torch's SyncBatchNorm is for GPUs alone).

    Workers must make their passes together, and gradients are those of the global loss: summed over workers, not averaged.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C, ...), got {input.ndim} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        y, mean, var, total = _Normalize.apply(x, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            momentum = 0.1 if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((var * (total / (total - 1))).to(self.running_var.dtype), momentum)
        if self.affine:
            shape = [1, -1] + [1] * (x.ndim - 2)
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return cast(Tensor, y.to(input.dtype))


def globalize(model: nn.Module) -> nn.Module:
    """The model with every batch norm turned into a `GlobalBatchNorm` of the same weights."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            new = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            ).to(child.running_mean)
            new.load_state_dict(child.state_dict())
            setattr(model, name, new.train(child.training))
        else:
            globalize(child)
    return model
