"""One training loop for all trainings. It knows no Ray: it runs alone in a test and unchanged on every worker.

Ways a run may start, in this order: from the checkpoint in its own output folder, if there is one; else from the
initial weights of its config. Checkpoints go through the same atomic writes as every artifact.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from iir_dist.data.augment import seed_of
from iir_dist.errors import NotFoundError, TrainingError
from iir_dist.storage import Folder
from iir_dist.train import collectives
from iir_dist.train.backprop import Outcome

LOG, CHECKPOINT = "training.jsonl", "checkpoints/last.pt"


class Optimization(BaseModel):
    """`optim`: optimizer and schedule of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(5e-5, ge=0)
    """Not applied to biases, norms and GeM's p."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the rate falls to 0 over the steps after warm-up."""
    warmup_steps: int = Field(0, ge=0)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Task(Protocol):
    """What a training is apart from its loop."""

    model: nn.Module

    def step(self, step: int) -> Outcome:
        """Add this worker's share of the gradient of step `step` to the model's parameters."""
        ...

    def images_per_step(self) -> int:
        """Photos in a global batch, for the rate."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Length and habits of one run."""

    steps: int
    optim: Optimization
    checkpoint_every: int
    seed: int


def train(task: Task, run: Run, folder: Folder, on_step: Callable[[int, str], None] = lambda step, note: None) -> None:
    """Train to `run.steps`, continuing from the folder's checkpoint.

    Raises:
        TrainingError: loss or gradient is not finite; names the step and the quantity.
    """
    optimizer = build_optimizer(task.model, run.optim)
    lines: list[str] = []
    start = _restore(task.model, optimizer, folder, lines)
    for step in range(start, run.steps):
        clock = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = run.optim.rate(step, run.steps)
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(run.seed, step, collectives.rank()))  # dropout and the like, equal after a resume
        outcome = task.step(step)
        collectives.sum_gradients(task.model.parameters())
        norm = gradient_norm(task.model)
        for quantity, value in (("loss", outcome.loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{quantity} is {value} at step {step}; lower optim.lr, or look at the images of that step"
                )
        optimizer.step()
        seconds = time.monotonic() - clock
        line = {
            "step": step, "loss": outcome.loss, "ap": outcome.ap, "lr": run.optim.rate(step, run.steps),
            "gradient_norm": norm, "seconds": round(seconds, 4), "images_per_sec": round(task.images_per_step() / seconds, 2),
        }  # fmt: skip
        lines.append(json.dumps(line))
        if (step + 1) % run.checkpoint_every == 0 or step + 1 == run.steps:
            _save(task.model, optimizer, folder, step + 1, lines)
        on_step(step + 1, f"loss {outcome.loss:.3f}, batch AP {outcome.ap:.3f}")


def build_optimizer(model: nn.Module, optim: Optimization) -> torch.optim.Optimizer:
    """The optimizer; parameters of one dimension or none (biases, norms, p) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    return (torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam)(groups, lr=optim.lr)


def gradient_norm(model: nn.Module) -> float:
    """L2 norm over all gradients."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Folder, step: int, lines: list[str]) -> None:
    """Worker 0 writes log and checkpoint; running statistics are averaged first, so that no worker's are lost."""
    collectives.average_buffers(model)
    if collectives.rank() == 0:
        folder.write(LOG, ("\n".join(lines) + "\n").encode())
        with folder.publish(CHECKPOINT) as file:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, file.path)
    collectives.barrier()


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Folder, lines: list[str]) -> int:
    """Load the checkpoint into model and optimizer and its log into `lines`; the step to go on with."""
    try:
        data = folder.read(CHECKPOINT)
    except NotFoundError:
        return 0
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    # The log is written before the checkpoint: a crash between the two leaves lines that are about to come again.
    lines += folder.read(LOG).decode().splitlines()[: state["step"]]
    return int(state["step"])
