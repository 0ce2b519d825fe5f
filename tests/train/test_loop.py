"""The loop: resume gives the undisturbed run, what is not finite stops it, schedules are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iir_dist.errors import TrainingError
from iir_dist.losses.average_precision import QuantizedAP
from iir_dist.storage import open_folder
from iir_dist.train.backprop import Outcome, one_pass
from iir_dist.train.loop import CHECKPOINT, LOG, Optimization, Run, build_optimizer, train


class ToyTask:
    """A linear map and dropout; batches are functions of the step, as everywhere."""

    def __init__(self, poison: int | None = None, crash: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.BatchNorm1d(4))
        self.poison, self.crash = poison, crash
        self.steps: list[int] = []

    def images_per_step(self) -> int:
        return 12

    def step(self, step: int) -> Outcome:
        if step == self.crash:
            raise KeyboardInterrupt
        self.steps.append(step)
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        if step == self.poison:
            x[0, 0] = torch.nan
        return one_pass(F.normalize(self.model(x), dim=1), torch.arange(12) % 3, QuantizedAP())


def run(**changes: object) -> Run:
    optim = Optimization(optimizer="adam", lr=1e-2, schedule="cosine", warmup_steps=2)
    return Run(**{"steps": 9, "optim": optim, "checkpoint_every": 3, "seed": 4, **changes})  # type: ignore[arg-type]


def log_of(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_sec")} for line in lines]


@pytest.mark.parametrize("crash", [1, 3, 5, 8])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, crash: int) -> None:
    whole, broken = ToyTask(), ToyTask(crash=crash)
    train(whole, run(), open_folder(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(broken, run(), open_folder(tmp_path / "broken"))
    resumed = ToyTask()
    train(resumed, run(), open_folder(tmp_path / "broken"))
    assert resumed.steps == list(range(crash // 3 * 3, 9))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    assert [line["step"] for line in log_of(tmp_path / "broken")] == list(range(9))


def test_a_finished_run_does_no_step(tmp_path: Path) -> None:
    train(ToyTask(), run(), open_folder(tmp_path))
    again = ToyTask()
    train(again, run(), open_folder(tmp_path))
    assert again.steps == []


def test_what_is_not_finite_stops_and_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan at step 4; lower optim\.lr"):
        train(ToyTask(poison=4), run(), open_folder(tmp_path))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 3  # the last good checkpoint is still there
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_rates() -> None:
    linear = Optimization(lr=1.0, schedule="linear")
    assert [linear.rate(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = Optimization(lr=1.0, schedule="cosine", warmup_steps=2)
    assert [round(cosine.rate(s, 6), 4) for s in range(6)] == [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_biases_and_norms_are_not_decayed(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    optimizer = build_optimizer(model, Optimization.model_validate({"optimizer": kind, "weight_decay": 0.1}))
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert [tuple(p.shape) for p in plain["params"]] == [(2,), (2,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
