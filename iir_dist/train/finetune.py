"""Fine-tuning with a listwise AP loss: GeM, a projection (FC), and three-stage backpropagation over the global batch."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.augment import mild, seed_of
from iir_dist.data.cache import Photos
from iir_dist.data.sampling import ClassSampler
from iir_dist.errors import ConfigError
from iir_dist.losses.average_precision import QuantizedAP
from iir_dist.models.encoder import Encoder, centre, load, project
from iir_dist.storage import open_folder
from iir_dist.train import collectives, launch, stage
from iir_dist.train.backprop import Outcome, three_stage
from iir_dist.train.loop import CHECKPOINT, Optimization, Run, train


class FinetuneConfig(StageConfig):
    """`[finetune]`. Defaults follow Revaud et al. (arXiv:1906.07589) where the paper states a value."""

    projection: int | None = Field(2048, ge=2)
    """Output dimension of the FC behind the pooling; none where null."""
    size: int = Field(800, ge=32)
    """px of the square training images."""
    min_scale: float = Field(0.4, gt=0, le=1)
    """Smallest part of a photo that a training crop covers."""
    classes: int = Field(64, ge=2)
    """Classes in a batch."""
    per_class: int = Field(64, ge=2)
    """Images of each class in a batch; classes x per_class is the global batch (the paper's is 4,096)."""
    chunk: int = Field(16, ge=1)
    """Images in one forward pass; memory depends on this alone."""
    bins: int = Field(20, ge=2)
    bin_range: tuple[float, float] = (-1.0, 1.0)
    """Of the similarities; 20 bins on [-1, 1] in the paper, 25 on [0, 1] in its released code."""
    steps: int = Field(200, ge=1)
    optim: Optimization = Optimization(optimizer="adam", lr=1e-4, weight_decay=5e-5, schedule="linear")
    checkpoint_every: int = Field(20, ge=1)
    seed: int = 0
    workers: int | None = Field(None, ge=1)
    execution: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "workers"})

    @model_validator(mode="after")
    def _range(self) -> FinetuneConfig:
        if not self.bin_range[0] < self.bin_range[1]:
            raise ValueError(f"bin_range must rise, got {self.bin_range}")
        return self


class FinetuneTask:
    """One step: P classes x K photos over all workers, batch norm frozen, so that both passes see one network."""

    def __init__(self, photos: Photos, encoder: Encoder, config: FinetuneConfig) -> None:
        self.photos, self.config = photos, config
        self.device = stage.device()
        # Evaluation mode throughout: no dropout, batch norm by its running statistics.
        self.model: nn.Module = encoder.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.encoder = encoder
        self.sampler = ClassSampler.of(photos.labels, config.classes, config.per_class, config.seed)
        classes = {label: number for number, label in enumerate(sorted({x for x in photos.labels if x is not None}))}
        self.labels = [classes.get(label or "", -1) for label in photos.labels]
        self.view = mild(config.size, config.min_scale)
        self.loss = QuantizedAP(config.bins, *config.bin_range)

    def sample(self, size: int = 512) -> Tensor:
        """(n, D) vectors before the projection of training images spread over all; the same on every worker."""
        rng = np.random.default_rng(self.config.seed)
        chosen = rng.permutation(len(self.photos))[:size]
        start, stop = collectives.share_of(len(chosen), collectives.rank(), collectives.world_size())
        seed, parts = self.config.seed, []
        for n in chosen[start:stop]:
            x = stage.views(self.photos, [n], self.view, lambda number, _: seed_of(seed, number))
            with torch.no_grad():
                parts.append(self.encoder.pooled(x.to(self.device)))
        return collectives.gather(torch.cat(parts))[0].cpu()

    def images_per_step(self) -> int:
        return self.sampler.num_classes * self.sampler.per_class

    def step(self, step: int) -> Outcome:
        batch = self.sampler.batch(step)
        start, stop = collectives.share_of(len(batch), collectives.rank(), collectives.world_size())
        own = batch[start:stop]
        seed = self.config.seed
        # Pixels of both passes are made once and kept: 3 bytes a pixel and image, little beside a graph.
        x = stage.views(self.photos, own, self.view, lambda number, _: seed_of(seed, step, number))
        chunks = [part.to(self.device) for part in x.split(self.config.chunk)]
        labels = torch.tensor([self.labels[n] for n in own], device=self.device)
        return three_stage(self.encoder.describe, chunks, labels, self.loss)


def _start(init: str, config: FinetuneConfig) -> Encoder:
    encoder = load(*artifact.require(init, *artifact.ENCODERS))
    return encoder if config.projection is None else project(encoder, config.projection)


def body(arguments: dict[str, Any], on_step: Any) -> None:
    """What each worker runs."""
    config = FinetuneConfig.model_validate(arguments["config"])
    photos = Photos([artifact.require(uri, "ingest") for uri in arguments["images"]])
    task = FinetuneTask(photos, _start(arguments["init"], config), config)
    folder = open_folder(arguments["out"])
    if config.projection is not None and not folder.exists(CHECKPOINT):
        centre(task.encoder, task.sample())
    train(task, Run(config.steps, config.optim, config.checkpoint_every, config.seed), folder, on_step)


def run(images: list[str], init: str, out: str, config: FinetuneConfig, *, force: bool = False) -> Manifest:
    """Fine-tune an encoder on labelled images.

    Raises:
        ConfigError: the encoder is whitened already.
        InputError: the images have too few classes.
    """
    sources = [artifact.require(uri, "ingest") for uri in images]
    init_folder, init_manifest = artifact.require(init, *artifact.ENCODERS)
    if init_manifest.info["encoder"]["whitening"] is not None:
        raise ConfigError(
            f"{init} is whitened; fine-tune the encoder that it was made from, then learn whitening again"
        )
    refs = {
        "images": artifact.combine(artifact.reference(*source) for source in sources),
        "init": artifact.reference(init_folder, init_manifest),
    }
    with artifact.begin(out, "finetune", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        arguments = {
            "config": config.model_dump(mode="json"), "images": [f.uri for f, _ in sources], "init": init_folder.uri,
            "out": work.folder.uri,
        }  # fmt: skip
        launch.launch(body, arguments, what="finetune", steps=config.steps, workers=config.workers)
        encoder = _start(init, config)
        encoder.load_state_dict(stage.last_weights(work))
        encoder.spec = encoder.spec.model_copy(update={"weights": f"ap:{encoder.spec.weights}"})
        return stage.publish(
            work, encoder, {"images": sum(m.counts["rows"] for _, m in sources), "steps": config.steps}
        )
