"""A classifier trained from nothing on labelled photos: fine-tuning's batches, loss and loop, with batch norm that learns.

Fine-tuning freezes batch norm, whose statistics come with the weights. A random network has none, so here each chunk is
normalized by its own and running ones are kept, as pretraining does (`train.norm`), and what is trained is the average of the
feature map, as there and in published classifiers, whatever the pooling that it is read by: the two are then compared as equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from iir_dist import artifact, overlap
from iir_dist.artifact import Manifest
from iir_dist.data.cache import Photos
from iir_dist.models.encoder import Encoder, load
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints, launch, stage
from iir_dist.train.backprop import Outcome
from iir_dist.train.finetune_config import FinetuneConfig, MinedBatches
from iir_dist.train.finetune_task import FinetuneTask
from iir_dist.train.loop import Run, autocast, train
from iir_dist.train.norm import Running


class ClassifyConfig(FinetuneConfig):
    """As `[finetune]`, without a projection, held-out classes and mined batches."""

    projection: int | None = None

    @model_validator(mode="after")
    def _without(self) -> ClassifyConfig:
        if self.projection is not None or self.validation.classes or isinstance(self.batches, MinedBatches):
            raise ValueError(
                "a classifier has no projection, held-out classes or mined batches; leave them out of its settings"
            )
        return self


class ClassifierTask(FinetuneTask):
    """As fine-tuning, but of averages, and a chunk is normalized by its own statistics; nothing else is in training mode."""

    def __init__(self, photos: Photos, encoder: Encoder, config: FinetuneConfig) -> None:
        super().__init__(photos, encoder, config)
        for layer in encoder.modules():
            if isinstance(layer, _BatchNorm):
                layer.train()
        self.running = Running(encoder)

    def step(self, step: int, scale: float) -> Outcome:
        self.running.begin()
        outcome = super().step(step, scale)
        self.running.end()
        return outcome

    def _embed(self, x: Tensor) -> Tensor:
        encoder = self.encoder
        with autocast(self.device, self.config.precision):
            _, feature_map = encoder.trunk.tokens((x - encoder.mean) / encoder.std)
        z = functional.normalize(feature_map.float().mean((-2, -1)), dim=-1)
        if torch.is_grad_enabled():  # the first of the two passes sees the same chunks
            self.running.count()
        return z


def body(arguments: dict[str, Any], on_step: Any) -> None:
    """What each worker runs."""
    config = ClassifyConfig.model_validate(arguments["config"])
    photos = Photos([artifact.require(uri, "ingest") for uri in arguments["images"]])
    encoder = load(*artifact.require(arguments["init"], *artifact.ENCODERS))
    task = ClassifierTask(photos, encoder, config)
    run_ = Run(
        config.steps, config.optim, config.checkpoint_every, config.seed, keep=config.keep, precision=config.precision
    )
    train(task, run_, open_folder(arguments["out"]), on_step)


def run(
    images: Sequence[str],
    init: str,
    out: str,
    config: ClassifyConfig,
    *,
    tests: Sequence[str] = (),
    force: bool = False,
) -> Manifest:
    """Train a network on labelled images; the config is fine-tuning's.

    Raises:
        InputError: the images overlap a test set.
    """
    sources = [artifact.require(uri, "ingest") for uri in images]
    start = artifact.require(init, *artifact.ENCODERS)
    refs = {
        "images": artifact.combine(artifact.reference(*source) for source in sources), "init": artifact.reference(*start),
    }  # fmt: skip
    shared = overlap.check(images, tests, allow=config.allow_overlap)
    with artifact.begin(out, "finetune", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        arguments = {
            "config": config.model_dump(mode="json"), "images": [f.uri for f, _ in sources], "init": start[0].uri,
            "out": work.folder.uri,
        }  # fmt: skip
        done = checkpoints.latest(work.folder)
        launch.launch(body, arguments, what="classify", steps=config.steps, workers=config.workers, done=done)
        encoder = load(*start)
        stage.load_weights(encoder, checkpoints.final_weights(work.folder))
        encoder.spec = encoder.spec.model_copy(update={"weights": f"classifier:{encoder.spec.weights}"})
        counts = {"images": sum(m.counts["rows"] for _, m in sources), "steps": checkpoints.latest(work.folder)}
        return stage.publish(work, encoder, counts, {"overlap": shared})
