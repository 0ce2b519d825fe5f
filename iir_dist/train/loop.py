"""One training loop for all trainings. It knows no Ray: it runs alone in a test and unchanged on every worker.

Ways a run may start, in this order: from the newest checkpoint in its own output folder, if there is one; else from
the initial weights of its config. Whatever is random is a function of the seed and the step, so that a checkpoint
needs no generator's state, and a run that was cut off ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from iir_dist.data.augment import seed_of
from iir_dist.errors import TrainingError
from iir_dist.storage import Folder, open_folder
from iir_dist.train import checkpoints, collectives
from iir_dist.train.backprop import Outcome
from iir_dist.train.board import Board
from iir_dist.train.optim import Average, Optimization, build_optimizer, clip, gradient_norm, set_rate

Precision = Literal["float32", "bfloat16", "float16"]
OnStep = Callable[[int, str], None]


class Task(Protocol):
    """What a training is apart from its loop."""

    model: nn.Module
    """All that is trained, a loss's own weights included."""
    state: Any
    """What goes into the checkpoint beside the model (a memory, a queue): has state_dict and load_state_dict; or None."""

    def step(self, step: int, scale: float) -> Outcome:
        """Add this worker's share of the gradient of step `step`, times `scale`, to the model's parameters."""
        ...

    def images_per_step(self, step: int) -> int:
        """Photos in the global batch, for the rate."""
        ...

    def names(self, step: int, positions: Sequence[int]) -> list[str]:
        """Names of the photos at these positions of the global batch (all for an empty sequence), for messages."""
        ...

    def validate(self) -> dict[str, Any] | None:
        """Figures of the model as it is on a held-out set, `map` (retrieval mAP) among them; None without such a set."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Length and habits of one run.

    Args:
        steps: of the whole training, which the schedule is laid over.
        stop: end early, after this many steps, to go on later; `steps` where None.
        checkpoint_every, validate_every: steps.
        patience: validations without a better one after which the training ends.
        keep: newest checkpoints that stay.
        keep_best: the best validated weights are kept apart, and are the result.
        tensorboard: folder or s3:// address for TensorBoard's files.
    """

    steps: int
    optim: Optimization
    checkpoint_every: int
    seed: int
    stop: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    keep: int = 2
    keep_best: bool = True
    precision: Precision = "float32"
    tensorboard: str | None = None


def train(task: Task, run: Run, folder: Folder, on_step: OnStep = lambda step, note: None) -> bool:
    """Train to `run.stop`, continuing from the folder's newest checkpoint.

    Returns:
        Whether nothing is left to do: all steps done, or patience at its end.

    Raises:
        TrainingError: loss or gradient is not finite; names the step, the quantity and photos of the batch.
    """
    return _Training(task, run, folder, on_step).go()


class _Training:
    def __init__(self, task: Task, run: Run, folder: Folder, on_step: OnStep) -> None:
        self.task, self.run, self.folder, self.on_step = task, run, folder, on_step
        collectives.copy_from_first(task.model)
        self.optimizer = build_optimizer(task.model, run.optim)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        device = next(task.model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=run.precision == "float16")
        self.average = Average(task.model, run.optim.ema) if run.optim.ema else None
        self.lines: list[str] = []
        self.best: dict[str, Any] = {"step": 0, "map": -1.0, "since": 0}
        self.step = self._restore()
        self.writer = checkpoints.Writer(folder, run.keep)
        shown = run.tensorboard is not None and collectives.rank() == 0
        self.board = Board(open_folder(run.tensorboard or ""), self.step) if shown else None

    def go(self) -> bool:
        stop = self.run.steps if self.run.stop is None else self.run.stop
        with contextlib.ExitStack() as ending:
            ending.callback(self.writer.wait)  # whatever ends the run, the last checkpoint is not cut off
            if self.board is not None:
                ending.enter_context(self.board)
            while self.step < stop and not self._out_of_patience():
                line = self._one()
                better = self._validate(line)
                self.lines.append(json.dumps(line))
                if self.board is not None:
                    self.board.write(line)
                if self.step % self.run.checkpoint_every == 0 or self.step == stop or self._out_of_patience() or better:
                    self._save(better)
                self.on_step(self.step, _note(line))
        collectives.barrier()
        return self.step >= self.run.steps or self._out_of_patience()

    def _one(self) -> dict[str, Any]:
        clock = time.monotonic()
        step, run, task = self.step, self.run, self.task
        rate = run.optim.rate(step, run.steps)
        set_rate(self.optimizer, rate, run.optim.lr)
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(run.seed, step, collectives.rank()))  # dropout and the like, equal after a resume
        outcome = task.step(step, float(self.scaler.scale(torch.ones((), device=self.parameters[0].device))))
        if not math.isfinite(outcome.loss):
            raise TrainingError(self._not_finite("loss", outcome.loss, outcome.broken))
        collectives.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters)
        # In float16 an overflow is expected now and then: the scaler skips the step and lowers its scale.
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise TrainingError(self._not_finite("gradient norm", norm, ()))
        if run.optim.clip_norm is not None and math.isfinite(norm):
            clip(self.parameters, norm, run.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(task.model)
        self.step += 1
        seconds = time.monotonic() - clock
        return {
            "step": step, "loss": outcome.loss, "ap": outcome.ap, "lr": rate,
            "gradient_norm": norm if math.isfinite(norm) else None, "seconds": round(seconds, 4),
            "images_per_sec": round(task.images_per_step(step) / seconds, 2),
        }  # fmt: skip

    def _not_finite(self, quantity: str, value: float, broken: Sequence[int]) -> str:
        names = self.task.names(self.step, broken)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        of = "the embeddings of" if broken else "the batch is"
        return f"{quantity} is {value} at step {self.step}; {of} {shown}; lower optim.lr, or look at these images"

    def _validate(self, line: dict[str, Any]) -> bool:
        """Add the held-out mAP to the step's line where one is due; whether it is the best so far."""
        every = self.run.validate_every
        if every is None or not (self.step % every == 0 or self.step == self.run.steps):
            return False
        with self._averaged():
            found = self.task.validate()
        if found is None:
            return False
        line |= {f"val_{key}": value for key, value in found.items()}
        line["val_map"] = value = collectives.first(found["map"])
        better = bool(value > self.best["map"])
        if better:
            self.best = {"step": self.step, "map": value, "since": 0}
        else:
            self.best["since"] += 1
        return better

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the averaged weights in the model, where there is an average."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.task.model.state_dict().items()}
        self.task.model.load_state_dict(self.average.state)
        try:
            yield
        finally:
            self.task.model.load_state_dict(own)

    def _out_of_patience(self) -> bool:
        return self.run.patience is not None and bool(self.best["since"] >= self.run.patience)

    def _save(self, better: bool) -> None:
        """Worker 0 writes: weights, buffers and state are the same everywhere."""
        if collectives.rank() != 0:
            return
        if self.board is not None:
            self.board.publish()
        model: dict[str, Tensor] = self.task.model.state_dict()
        state = {
            "step": self.step, "model": model, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "average": self.average.state if self.average else None,
            "task": self.task.state.state_dict() if self.task.state is not None else None, "best": dict(self.best),
        }  # fmt: skip
        best = {"step": self.step, "map": self.best["map"], "model": self.average.state if self.average else model}
        kept = best if better and self.run.keep_best else None
        self.writer.save(self.step, state, ("\n".join(self.lines) + "\n").encode(), kept)

    def _restore(self) -> int:
        step = checkpoints.latest(self.folder)
        if step == 0:
            return 0
        state = checkpoints.read(self.folder, checkpoints.name_of(step))
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            for name, value in state["average"].items():
                self.average.state[name].copy_(value)
        if self.task.state is not None:
            self.task.state.load_state_dict(state["task"])
        self.best = state["best"]
        # The log is written before the checkpoint: a crash between the two leaves lines that are about to come again.
        self.lines = self.folder.read(checkpoints.LOG).decode().splitlines()[:step]
        return step


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass of that precision runs in."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def _note(line: dict[str, Any]) -> str:
    held_out = f", held-out mAP {line['val_map']:.3f}" if "val_map" in line else ""
    held_out += f"; {line['val_warning']}" if line.get("val_warning") else ""
    return f"loss {line['loss']:.3f}, batch AP {line['ap']:.3f}, {line['images_per_sec']:.1f} images/s{held_out}"
