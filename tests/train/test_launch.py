"""Training on Ray: workers that die are replaced, errors come back as themselves, resumed runs equal whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iir_dist import artifact
from iir_dist.errors import ConfigError, IirError, InputError, TrainingError
from iir_dist.models.encoder import EncoderConfig
from iir_dist.models.encoder import run as make_encoder
from iir_dist.train import finetune, launch, pretrain
from iir_dist.train.checkpoints import LOG
from iir_dist.train.finetune_config import FinetuneConfig
from iir_dist.train.finetune_task import FinetuneTask
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.pretrain_task import PretrainTask

pytestmark = pytest.mark.ray


def test_a_worker_that_dies_is_replaced(tmp_path: Path, ray_session: None) -> None:
    def body(arguments: dict[str, Any], on_step: Any) -> None:
        """Ten steps with a checkpoint file; worker 1 dies at step 4 of the first attempt."""
        import os

        from iir_dist.train import collectives

        folder = Path(arguments["folder"])
        state = folder / "step"
        start = int(state.read_text()) if state.exists() else 0
        with open(folder / f"attempts-{collectives.rank()}", "a") as file:
            file.write(f"{start}\n")
        for step in range(start, 10):
            total, _ = collectives.gather(torch.tensor([float(collectives.rank())]))
            assert total.tolist() == [0.0, 1.0]
            if step == 4 and collectives.rank() == 1 and start == 0:
                os._exit(9)
            if collectives.rank() == 0:
                state.write_text(str(step + 1))
            on_step(step + 1, "")

    launch.launch(body, {"folder": str(tmp_path)}, what="toy", steps=10, workers=2)
    assert (tmp_path / "step").read_text() == "10"
    first, second = (tmp_path / "attempts-1").read_text().split()
    assert first == "0"
    assert 4 <= int(second) <= 5


def test_errors_of_ours_come_back_at_once_also_of_one_worker_of_several(tmp_path: Path, ray_session: None) -> None:
    def body(arguments: dict[str, Any], on_step: Any) -> None:
        from iir_dist.errors import TrainingError
        from iir_dist.train import collectives

        with open(f"{arguments['log']}-{collectives.rank()}", "a") as file:
            file.write("x")
        if collectives.rank() == 1:
            raise TrainingError("photo 'a' cannot be decoded")
        collectives.barrier()

    with pytest.raises(TrainingError, match="photo 'a' cannot be decoded"):
        launch.launch(body, {"log": str(tmp_path / "log")}, what="toy", steps=10, workers=2)
    assert (tmp_path / "log-1").read_text() == "x"  # not tried again: it would only happen again
    with pytest.raises(IirError, match=r"toy\.workers = 999, but the cluster has \d+ CPUs"):
        launch.launch(body, {}, what="toy", steps=1, workers=999)


PRETRAIN: dict[str, Any] = {
    "encoder": {"backbone": "resnet18", "weights": "random", "size": 64}, "crop": 32, "batch": 8, "steps": 4,
    "optim": {"optimizer": "adam", "lr": 1e-3}, "checkpoint_every": 2,
}  # fmt: skip
FINETUNE: dict[str, Any] = {
    "projection": 16, "size": 48, "batches": {"classes": 3, "per_class": 3}, "chunk": 2, "steps": 4, "checkpoint_every": 2,
}  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / LOG).read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights.safetensors")


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage's body here, as the only worker: the loop knows no Ray."""

    def run(body: launch.Body, arguments: dict[str, Any], **_: Any) -> None:
        body(arguments, lambda step, note: None)

    monkeypatch.setattr(launch, "launch", run)


def test_pretraining_on_two_workers(images: Path, tmp_path: Path) -> None:
    config = PretrainConfig.model_validate({**PRETRAIN, "workers": 2})
    sources = [str(images / "unlabelled"), str(images / "train")]
    manifest = pretrain.run(sources, str(tmp_path / "e"), config)
    assert manifest.counts == {"images": 24 + 30, "steps": 4}
    assert len(losses(tmp_path / "e")) == 4
    assert set(manifest.files) == {
        "weights.safetensors",
        "encoder.json",
        "training.jsonl",
        "checkpoints/00000002.pt",
        "checkpoints/00000004.pt",
    }
    start = tmp_path / "start"
    make_encoder(str(start), EncoderConfig.model_validate(PRETRAIN["encoder"]))
    before, after = weights(start), weights(tmp_path / "e")
    assert before.keys() == after.keys()
    assert not torch.equal(before["trunk.net.conv1.weight"], after["trunk.net.conv1.weight"])
    assert artifact.require(tmp_path / "e", "pretrain")[1].info["encoder"]["weights"] == "simclr:random"
    artifact.verify(tmp_path / "e")


@pytest.mark.slow  # pretraining goes the same way, and test_backprop has the numbers
def test_finetuning_on_two_workers_equals_one(
    images: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm is frozen and the loss sees the global batch, so the split over workers only rounds differently."""
    config = FinetuneConfig.model_validate({**FINETUNE, "workers": 2})
    finetune.run([str(images / "train")], str(encoder), str(tmp_path / "two"), config)
    in_process(monkeypatch)
    finetune.run([str(images / "train")], str(encoder), str(tmp_path / "one"), config)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = weights(encoder)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-3), name
    moved = [n for n, v in one.items() if n in start and v.is_floating_point() and not torch.equal(v, start[n])]
    assert "pool.p" in moved  # GeM's exponent is learnt
    assert not [n for n in moved if "running" in n]  # batch norm is frozen


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_run_that_was_cut_off_equals_a_whole_one(
    images: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    in_process(monkeypatch)

    def run(out: Path) -> None:
        if kind == "pretrain":
            pretrain.run([str(images / "unlabelled")], str(out), PretrainConfig.model_validate(PRETRAIN))
        else:
            config = FinetuneConfig.model_validate(FINETUNE)
            finetune.run([str(images / "train")], str(encoder), str(out), config)

    run(tmp_path / "whole")
    task = PretrainTask if kind == "pretrain" else FinetuneTask
    step = task.step

    def cut_off(self: Any, number: int, scale: float) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, scale)

    with monkeypatch.context() as patch:
        patch.setattr(task, "step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    with pytest.raises(InputError, match="unfinished"):
        artifact.require(tmp_path / "cut", kind)
    run(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "cut")[name]), name
    whole, cut = (artifact.require(tmp_path / n, kind)[1] for n in ("whole", "cut"))
    assert whole.fingerprint == cut.fingerprint


def test_what_cannot_be_trained_on(
    images: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embeddings: Path
) -> None:
    from iir_dist import whiten

    in_process(monkeypatch)
    config = FinetuneConfig.model_validate(FINETUNE)
    with pytest.raises(InputError, match="0 classes have two or more images"):
        finetune.run([str(images / "unlabelled")], str(encoder), str(tmp_path / "a"), config)
    with pytest.raises(InputError, match=r"a batch of 500 needs at least as many images; there are 24"):
        big = PretrainConfig.model_validate({**PRETRAIN, "batch": 500})
        pretrain.run([str(images / "unlabelled")], str(tmp_path / "b"), big)
    whiten.run(str(embeddings / "distractors"), str(encoder), str(tmp_path / "w"), whiten.WhitenConfig(dim=4))
    with pytest.raises(ConfigError, match=r"optim\.rates freezes the whole encoder"):
        frozen = FinetuneConfig.model_validate(
            {**FINETUNE, "loss": {"name": "arcface"}, "optim": {"rates": {"encoder.*": 0}}}
        )
        finetune.run([str(images / "train")], str(encoder), str(tmp_path / "d"), frozen)
    with pytest.raises(ConfigError, match="is whitened; fine-tune the encoder that it was made from"):
        finetune.run([str(images / "train")], str(tmp_path / "w"), str(tmp_path / "c"), config)


def test_force_begins_an_unfinished_training_anew(
    images: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    config = FinetuneConfig.model_validate(FINETUNE)

    def stops(self: Any, number: int, scale: float) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, scale)

    step = FinetuneTask.step
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            finetune.run([str(images / "train")], str(encoder), str(tmp_path / "e"), config)
    assert (tmp_path / "e" / "checkpoints" / "00000002.pt").exists()
    other = FinetuneConfig.model_validate(FINETUNE | {"steps": 1})
    manifest = finetune.run([str(images / "train")], str(encoder), str(tmp_path / "e"), other, force=True)
    assert manifest.counts["steps"] == 1
    assert [path.name for path in (tmp_path / "e" / "checkpoints").iterdir()] == ["00000001.pt"]
