"""The loop: resume gives the undisturbed run, what is not finite stops it, the best weights are kept, patience ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iir_dist.errors import StorageError, TrainingError
from iir_dist.losses.average_precision import QuantizedAP
from iir_dist.losses.pairwise import loss_and_gradient
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints
from iir_dist.train.backprop import Outcome
from iir_dist.train.loop import Run, train
from iir_dist.train.optim import Optimization

LOG = checkpoints.LOG


class Counter:
    """State beside the model: what every step has seen so far."""

    def __init__(self) -> None:
        self.seen = torch.zeros(6)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen.copy_(state["seen"])


class ToyTask:
    """A linear map and dropout; batches are functions of the step, as everywhere."""

    def __init__(self, poison: int | None = None, crash: int | None = None, scores: Sequence[float] = ()) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.BatchNorm1d(4))
        self.poison, self.crash, self.scores = poison, crash, list(scores)
        self.state = Counter()
        self.steps: list[int] = []
        self.validated: list[Tensor] = []

    def images_per_step(self, step: int) -> int:
        return 12

    def names(self, step: int, positions: Sequence[int]) -> list[str]:
        return [f"photo-{step}-{i}" for i in (positions or range(12))]

    def validate(self) -> dict[str, Any] | None:
        if not self.scores:
            return None
        self.validated.append(self.model[0].weight.detach().clone())  # type: ignore[index, union-attr, operator]
        return {"map": self.scores[len(self.validated) - 1], "spread": 0.5, "warning": None}

    def step(self, step: int, scale: float) -> Outcome:
        if step == self.crash:
            raise KeyboardInterrupt
        self.steps.append(step)
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        self.state.seen += x.sum(0)
        if step == self.poison:
            x[0, 0] = torch.nan
        z = F.normalize(self.model.eval()(x) if step == self.poison else self.model.train()(x), dim=1)
        broken = tuple((~torch.isfinite(z).all(dim=1)).nonzero().flatten().tolist())
        if broken:
            return Outcome(float("nan"), float("nan"), broken)
        value, gradient = loss_and_gradient(QuantizedAP(), z.detach(), torch.arange(12) % 3)
        z.backward(scale * gradient)
        return Outcome(value, 0.0)


def run(**changes: object) -> Run:
    optim = Optimization(optimizer="adam", lr=1e-2, schedule="cosine", warmup_steps=2, ema=0.9, clip_norm=0.5)
    return Run(**{"steps": 9, "optim": optim, "checkpoint_every": 3, "seed": 4, **changes})  # type: ignore[arg-type]


def last(folder: Path) -> dict[str, Any]:
    return checkpoints.read(open_folder(folder), checkpoints.name_of(checkpoints.steps_of(open_folder(folder))[-1]))


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
    one, two = last(tmp_path / "whole"), last(tmp_path / "broken")
    for part in ("model", "average", "task"):
        assert one[part]
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), (part, name)
    assert not torch.equal(one["model"]["0.weight"], one["average"]["0.weight"])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    assert [line["step"] for line in log_of(tmp_path / "broken")] == list(range(9))


def test_a_finished_run_does_no_step(tmp_path: Path) -> None:
    train(ToyTask(), run(), open_folder(tmp_path))
    again = ToyTask()
    train(again, run(), open_folder(tmp_path))
    assert again.steps == []


def test_what_is_not_finite_stops_and_names_step_and_photos(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan at step 4; the embeddings of photo-4-0; lower optim\.lr"):
        train(ToyTask(poison=4), run(), open_folder(tmp_path))
    state = last(tmp_path)
    assert state["step"] == 3  # the last good checkpoint is still there
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_gradient_that_is_not_finite_names_the_batch(tmp_path: Path) -> None:
    class Explodes(ToyTask):
        def step(self, step: int, scale: float) -> Outcome:
            outcome = super().step(step, scale)
            if step == 2:
                next(self.model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
            return outcome

    with pytest.raises(TrainingError, match=r"gradient norm is inf at step 2; the batch is photo-2-0, .* and 4 more"):
        train(Explodes(), run(), open_folder(tmp_path))


def test_training_in_parts_equals_training_in_one_go(tmp_path: Path) -> None:
    assert train(ToyTask(), run(), open_folder(tmp_path / "whole"))
    assert not train(ToyTask(), run(stop=4), open_folder(tmp_path / "parts"))
    assert last(tmp_path / "parts")["step"] == 4
    assert train(ToyTask(), run(), open_folder(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_checkpoints_are_kept_by_number_and_by_metric(tmp_path: Path) -> None:
    task = ToyTask(scores=[0.2, 0.7, 0.4, 0.6])
    train(task, run(validate_every=2, steps=8, checkpoint_every=2, keep=2), open_folder(tmp_path))
    assert checkpoints.steps_of(open_folder(tmp_path)) == [6, 8]
    best = checkpoints.read(open_folder(tmp_path), checkpoints.BEST)
    assert (best["step"], best["map"]) == (4, 0.7)
    # What was validated is the moving average, and that is what is kept.
    assert torch.equal(best["model"]["0.weight"], task.validated[1])
    assert torch.equal(checkpoints.final_weights(open_folder(tmp_path))["0.weight"], task.validated[1])
    assert [line.get("val_map") for line in log_of(tmp_path)] == [None, 0.2, None, 0.7, None, 0.4, None, 0.6]
    assert log_of(tmp_path)[1]["val_spread"] == 0.5


def test_the_best_is_not_kept_where_the_last_is_asked_for(tmp_path: Path) -> None:
    task = ToyTask(scores=[0.2, 0.7, 0.4, 0.6])
    train(task, run(validate_every=2, steps=8, keep_best=False), open_folder(tmp_path))
    assert not (tmp_path / checkpoints.BEST).exists()
    assert torch.equal(
        checkpoints.final_weights(open_folder(tmp_path))["0.weight"], last(tmp_path)["average"]["0.weight"]
    )


def test_patience_ends_a_training_also_after_a_resume(tmp_path: Path) -> None:
    habits: dict[str, object] = {"validate_every": 1, "patience": 2, "checkpoint_every": 1}
    scores = [0.5, 0.6, 0.6, 0.3, 0.9]
    task = ToyTask(scores=scores)
    assert train(task, run(**habits), open_folder(tmp_path / "whole"))
    assert task.steps == [0, 1, 2, 3]
    assert not train(ToyTask(scores=scores), run(stop=3, **habits), open_folder(tmp_path / "parts"))
    assert train(ToyTask(scores=scores[3:]), run(**habits), open_folder(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    again = ToyTask(scores=scores)
    assert train(again, run(**habits), open_folder(tmp_path / "parts"))
    assert again.steps == []


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(type(folder), "publish", full)
    with pytest.raises(StorageError, match="the disk is full"):
        train(ToyTask(), run(), folder)


def test_half_precision_scales_the_gradient_and_not_the_step(tmp_path: Path) -> None:
    """The toy computes in float32 either way, so a scaler that is used rightly changes nothing but rounding."""
    train(ToyTask(), run(), open_folder(tmp_path / "full"))
    train(ToyTask(), run(precision="float16"), open_folder(tmp_path / "half"))
    one, two = last(tmp_path / "full")["model"], last(tmp_path / "half")["model"]
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-5) for name in one)


def test_tensorboard_gets_every_step_once(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  the files are TFRecords: length, crc, data, crc

    habits: dict[str, object] = {"tensorboard": str(tmp_path / "board"), "steps": 4, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(ToyTask(crash=3), run(**habits), open_folder(tmp_path / "out"))
    train(ToyTask(), run(**habits), open_folder(tmp_path / "out"))
    steps: dict[int, float] = {}
    for path in sorted((tmp_path / "board").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.tag == "loss":
                    steps[event.step] = value.simple_value
    assert steps == pytest.approx({int(str(x["step"])): float(str(x["loss"])) for x in log_of(tmp_path / "out")})
