"""Contrastive pretraining: SimCLR on N workers.

The loss sees the global batch: embeddings are gathered and every worker uses all negatives. Batch norm takes its
statistics from the worker's own share (two views of it), so that unlike the loss they depend on the number of
workers; running statistics are averaged over workers at each checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.augment import contrastive, seed_of
from iir_dist.data.cache import Photos
from iir_dist.data.sampling import I64, epoch_batch
from iir_dist.losses.contrastive import NTXent
from iir_dist.losses.pairwise import loss_and_gradient
from iir_dist.models.encoder import Encoder, EncoderConfig, create
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints, collectives, launch, stage
from iir_dist.train.backprop import Outcome, one_pass
from iir_dist.train.loop import Run, train
from iir_dist.train.optim import Optimization
from iir_dist.train.views import Key, Stream, to_device


class PretrainConfig(StageConfig):
    """`[pretrain]`."""

    encoder: EncoderConfig = EncoderConfig(backbone="resnet50", weights="random")
    """The network to train; its `size` and `resize` are those of later embedding."""
    crop: int = Field(224, ge=32)
    """px of the training crops."""
    min_scale: float = Field(0.2, gt=0, le=1)
    """Smallest part of a photo that a crop covers."""
    batch: int = Field(256, ge=2)
    """Photos in the global batch; each gives two views."""
    steps: int = Field(10_000, ge=1)
    temperature: float = Field(0.2, gt=0)
    head_dim: int = Field(128, ge=2)
    """Output of the two-layer projection head, which is dropped afterwards."""
    optim: Optimization = Optimization(optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine", warmup_steps=0)
    checkpoint_every: int = Field(100, ge=1)
    seed: int = 0
    workers: int | None = Field(None, ge=1)
    loaders: int = Field(0, ge=0)
    """Processes a worker that decode and augment ahead; 0: done between the steps, best where the CPU also trains."""
    execution: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "loaders"})


class SimCLR(nn.Module):
    """Trunk, global mean, two-layer head: (B, 3, H, W) in [0, 1] -> (B, head_dim) unit vectors (arXiv:2002.05709)."""

    def __init__(self, encoder: Encoder, head_dim: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.spec.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder.trunk((x - self.encoder.mean) / self.encoder.std)
        return F.normalize(self.head(features.mean(dim=(-2, -1))), dim=-1)


class PretrainTask:
    """One SimCLR step: two views of each photo of this worker's share, loss over the global batch."""

    def __init__(self, photos: Photos, config: PretrainConfig) -> None:
        self.photos, self.config = photos, config
        self.device = stage.device()
        model = SimCLR(create(config.encoder), config.head_dim, config.seed).train()
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stream = Stream(
            photos, contrastive(config.crop, config.min_scale), self._plan, config.steps, config.loaders
        )
        self.loss = NTXent(config.temperature)
        self.state = None

    def images_per_step(self, step: int) -> int:
        return self.config.batch

    def names(self, step: int, positions: Sequence[int]) -> list[str]:
        batch = self._batch(step)
        return [self.photos[int(n)].name for n in batch[[p % len(batch) for p in positions]]] if positions else []

    def validate(self) -> None:
        return None

    def step(self, step: int, scale: float) -> Outcome:
        start, stop = self._share(step)
        x = to_device(next(self.stream.chunks(step)), self.device)
        labels = torch.arange(start, stop, device=self.device).repeat(2)
        return one_pass(self.model(x), labels, partial(loss_and_gradient, self.loss), scale)

    def _batch(self, step: int) -> I64:
        return epoch_batch(len(self.photos), self.config.batch, step, self.config.seed)

    def _share(self, step: int) -> tuple[int, int]:
        return collectives.share_of(len(self._batch(step)), collectives.rank(), collectives.world_size())

    def _plan(self, step: int) -> list[list[Key]]:
        """One chunk: view 0 of this worker's photos, then view 1."""
        start, stop = self._share(step)
        own, seed = self._batch(step)[start:stop].tolist(), self.config.seed
        return [[Key(n, seed_of(seed, step, n, view)) for view in range(2) for n in own]]


def body(arguments: dict[str, Any], on_step: Any) -> None:
    """What each worker runs."""
    config = PretrainConfig.model_validate(arguments["config"])
    photos = Photos([artifact.require(uri, "ingest") for uri in arguments["images"]])
    run_ = Run(config.steps, config.optim, config.checkpoint_every, config.seed)
    train(PretrainTask(photos, config), run_, open_folder(arguments["out"]), on_step)


def run(images: list[str], out: str, config: PretrainConfig, *, force: bool = False) -> Manifest:
    """Pretrain an encoder on one or more images artifacts; labels and queries are not used."""
    sources = [artifact.require(uri, "ingest") for uri in images]
    refs = {"images": artifact.combine(artifact.reference(*source) for source in sources)}
    with artifact.begin(out, "pretrain", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        arguments = {
            "config": config.model_dump(mode="json"), "images": [f.uri for f, _ in sources], "out": work.folder.uri
        }  # fmt: skip
        launch.launch(body, arguments, what="pretrain", steps=config.steps, workers=config.workers)
        encoder = create(config.encoder)
        stage.load_weights(encoder, checkpoints.final_weights(work.folder))
        encoder.spec = encoder.spec.model_copy(update={"weights": f"simclr:{config.encoder.weights}"})
        return stage.publish(
            work, encoder, {"images": sum(m.counts["rows"] for _, m in sources), "steps": config.steps}
        )
