"""Optimizer, schedule, parameter groups and moving average of a training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from iir_dist.errors import ConfigError


class Optimization(BaseModel):
    """`optim`: optimizer and schedule of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(5e-5, ge=0)
    """Not applied to biases, norms and GeM's p."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd and lars."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls over the steps after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises to its peak."""
    final: float = Field(0.0, ge=0, le=1)
    """Part of the peak rate that is left at the end."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of the gradient of the global loss; longer ones are shortened to it."""
    rates: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Multiplier of the rate by pattern of the parameter's name, such as {"encoder.pool.p" = 10}; 0 freezes."""
    vectors: float = Field(1.0, gt=0)
    """Further multiplier of the rate of biases and norms (0.024 in Barlow Twins)."""
    unscheduled: tuple[str, ...] = ()
    """Patterns of names whose rate stays at `lr`, times its multiplier (SimSiam's predictor)."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights (0.999, say), which is then what is validated and kept."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[self.schedule]
        return self.lr * (self.final + (1 - self.final) * left)

    def multiplier(self, name: str) -> float:
        """Of the rate of the parameter `name`: that of the first pattern that fits, else 1."""
        return next((value for pattern, value in self.rates.items() if fnmatchcase(name, pattern)), 1.0)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, weight by weight, to the norm of the weight.

    You, Gitman and Ginsburg, arXiv:1708.03888, as used for large batches by SimCLR and BYOL:

        g = g + wd w      r = eta |w| / |g| (1 where either is 0)      v = mu v + r g      w = w - lr v

    Parameters of one dimension or none (biases, norms) get plain SGD: r = 1, and their group has no decay.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, eta: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not used."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                if p.ndim > 1:
                    weight, gradient = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
                    ratio = torch.where((weight > 0) & (gradient > 0), group["eta"] * weight / gradient, 1.0)
                    g = g * ratio
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                v = state["momentum"].mul_(group["momentum"]).add_(g)
                p.sub_(v, alpha=group["lr"])


def build_optimizer(model: nn.Module, optim: Optimization) -> torch.optim.Optimizer:
    """The optimizer; parameters whose multiplier is 0 stop requiring a gradient, those of one dimension are not decayed.

    Raises:
        ConfigError: a pattern of `rates` fits no parameter, or nothing is left to train.
    """
    named = list(model.named_parameters())
    for key, pattern in [*(("rates", p) for p in optim.rates), *(("unscheduled", p) for p in optim.unscheduled)]:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ConfigError(
                f"optim.{key}: {pattern!r} fits no parameter; there are, for example, "
                f"{', '.join(name for name, _ in named[:2] + named[-2:])}"
            )
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, p in named:
        multiplier = optim.multiplier(name)
        if multiplier == 0:
            p.requires_grad_(False)
        if p.requires_grad:
            scheduled = not any(fnmatchcase(name, pattern) for pattern in optim.unscheduled)
            vector = p.ndim < 2
            group = (multiplier * (optim.vectors if vector else 1.0), 0.0 if vector else optim.weight_decay, scheduled)
            groups.setdefault(group, []).append(p)
    if not groups:
        raise ConfigError("optim.rates freezes every parameter; leave one to train")
    parts = [
        {"params": params, "weight_decay": decay, "multiplier": multiplier, "scheduled": scheduled}
        for (multiplier, decay, scheduled), params in groups.items()
    ]
    match optim.optimizer:
        case "sgd":
            return torch.optim.SGD(parts, lr=optim.lr, momentum=optim.momentum)
        case "lars":
            return LARS(parts, lr=optim.lr, momentum=optim.momentum)
        case "adamw":
            return torch.optim.AdamW(parts, lr=optim.lr)
        case "adam":
            return torch.optim.Adam(parts, lr=optim.lr)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, peak: float) -> None:
    """Set the learning rate of every group, each times its multiplier; of those without a schedule, to the peak."""
    for group in optimizer.param_groups:
        group["lr"] = (rate if group["scheduled"] else peak) * group["multiplier"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm over all gradients; 0 where there is none."""
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip(parameters: Iterable[nn.Parameter], norm: float, longest: float) -> None:
    """Shorten the gradient, whose norm is `norm`, to `longest`."""
    if norm > longest:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(longest / norm)


class Average:
    """Exponential moving average of a model's weights and running statistics: a <- d a + (1 - d) w after each step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer's step. What is not floating-point (a counter) is copied."""
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value.to(self.state[name].dtype), 1 - self.decay)
            else:
                self.state[name].copy_(value)
