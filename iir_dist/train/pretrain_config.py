"""`[pretrain]`: what a self-supervised pretraining is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from iir_dist.config import StageConfig
from iir_dist.models.encoder import EncoderConfig
from iir_dist.train.loop import Precision
from iir_dist.train.methods import METHODS, AnyMethodConfig
from iir_dist.train.methods.simclr import SimCLRConfig
from iir_dist.train.optim import Optimization


class ProbeConfig(BaseModel):
    """`probe`: retrieval on a set of photos with labels or ground truth (`--probe IMAGES`), while training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    every: int = Field(500, ge=1)
    """Steps between two."""
    keep: Literal["best", "last"] = "best"
    """Which weights are the result. With the benchmark itself as the probe, "last": choosing by it would be training on it."""
    patience: int | None = Field(None, ge=1)
    """End after so many without a better one."""
    neighbours: int = Field(20, ge=1)
    """k of the kNN classifier, of a probe with labels."""


class PretrainConfig(StageConfig):
    """`[pretrain]`."""

    encoder: EncoderConfig = EncoderConfig(backbone="resnet50", weights="random")
    """The network to train, and what it starts from; its `size` and `resize` are those of the probe and of later embedding."""
    method: AnyMethodConfig = SimCLRConfig()
    """simclr, moco_v2, moco_v3, byol, simsiam, swav, barlow_twins, vicreg, dino or insclr, with its parameters."""
    crop: int = Field(224, ge=32)
    """px of the views."""
    local_crop: int = Field(96, ge=32)
    """px of the small views of swav and dino."""
    min_scale: float | None = Field(None, gt=0, le=1)
    """Smallest part of a photo that a view covers; null: as published (0.08 to 0.2)."""
    batch: int = Field(256, ge=2)
    """Photos in the global batch."""
    chunk: int | None = Field(None, ge=2)
    """Photos that go through the network together, over which batch norm takes its statistics. Results depend on it and not
    on the number of workers. null: the share of one worker; of moco_v2, which shuffles keys over chunks, 32 or half of a
    small batch."""
    parts: int = Field(1, ge=1)
    """Pieces that the set is cut into, by shards; with one a node, each node caches its own only. Each gives its share of every
    batch. Results depend on it and not on the number of workers, which is best a multiple of it."""
    norm: Literal["chunk", "global"] = "chunk"
    """"global": statistics over all workers (synchronized batch norm); needs chunk = null."""
    recompute: bool = False
    """Keep no activations but those of one chunk, for a second forward pass: a batch of 4,096 in the memory of a chunk."""
    precision: Precision = "float32"
    """Of trunk and head; the loss and the weights stay float32."""
    compile: bool = False
    """Compile the network (`torch.compile`)."""
    steps: int = Field(10_000, ge=1)
    optim: Optimization = Optimization()
    """What is left out is as the method's authors have it, its rate scaled to the batch: lr x batch / 256."""
    probe: ProbeConfig = ProbeConfig()
    checkpoint_every: int = Field(100, ge=1)
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay."""
    seed: int = 0
    workers: int | tuple[int, int] | None = None
    """One number, or [fewest, most]; all GPUs, else one, where null."""
    loaders: int = Field(0, ge=0)
    """Processes a worker that decode and augment ahead; 0: done between the steps, best where the CPU also trains."""
    tensorboard: str | None = None
    """Folder or s3:// address for TensorBoard's files, beside training.jsonl."""
    execution: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "keep", "workers", "loaders", "tensorboard"})

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Fill `optim` with the method's published values."""
        if not isinstance(data, dict):
            return data
        method, given = data.get("method", {}), data.get("optim", {})
        name = method.get("name", "simclr") if isinstance(method, dict) else getattr(method, "name", None)
        batch = data.get("batch", cls.model_fields["batch"].default)
        if isinstance(given, dict) and name in METHODS and isinstance(batch, int):  # else the fields say what is wrong
            published = {"schedule": "cosine", **METHODS[name][0].optimization}
            optimizer = given.get("optimizer", published["optimizer"])
            if optimizer != published["optimizer"] and "lr" not in given:
                raise ValueError(
                    f"optim.optimizer = {optimizer!r} without optim.lr: the published rate of {name} is for "
                    f"{published['optimizer']}; set optim.lr"
                )
            published["lr"] *= batch / 256
            data = {**data, "optim": {**published, **given}}
            chunk = METHODS[name][0].published_chunk
            if chunk is not None and data.get("norm", "chunk") == "chunk" and data.get("chunk") is None:
                data["chunk"] = max(2, min(chunk, batch // 2))
        return data

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        fewest, most = self.workers if isinstance(self.workers, tuple) else (self.workers or 1,) * 2
        if not 1 <= fewest <= most:
            raise ValueError(f"workers = {self.workers}: expected a number from 1, or [fewest, most]")
        if self.parts > 1 and self.method.name == "insclr":
            raise ValueError(f"insclr takes neighbours from all of the set; expected parts = 1, not {self.parts}")
        if self.parts > 1 and self.batch // self.parts < (self.chunk or 2):
            raise ValueError(
                f"parts = {self.parts} leaves {self.batch // self.parts} photos of a batch of {self.batch} to each part; "
                f"expected at least a chunk ({self.chunk or 2}): a larger batch or fewer parts"
            )
        if self.norm == "global" and (self.chunk is not None or self.recompute):
            raise ValueError('norm = "global" takes its statistics over the whole batch; expected chunk = null')
        if self.recompute and self.chunk is None:
            raise ValueError("recompute = true keeps the activations of one chunk; expected chunk, in photos")
        return self
