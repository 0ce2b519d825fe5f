"""`[finetune]`: what a fine-tuning is."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from iir_dist.config import StageConfig
from iir_dist.train.loop import Precision
from iir_dist.train.mining import MiningConfig
from iir_dist.train.objectives import LossConfig, QuantizedAPConfig
from iir_dist.train.optim import Optimization
from iir_dist.train.validate import Validation


class _Batches(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassBatches(_Batches):
    """P classes by K images: every query has K - 1 positives."""

    name: Literal["classes"] = "classes"
    classes: int = Field(64, ge=2)
    """Classes in a batch, P."""
    per_class: int = Field(64, ge=2)
    """Images of each class in a batch, K; P x K is the global batch (the paper's is 4,096)."""


class BalancedBatches(_Batches):
    """Every class as often as any other, and the images of a class in turn."""

    name: Literal["balanced"] = "balanced"
    size: int = Field(4096, ge=2)
    """Images of a batch."""
    per_class: int = Field(4, ge=2)
    """Images that a class gives in its turn."""


class RandomBatches(_Batches):
    """Images are drawn evenly, each once an epoch, as the authors do; those without a positive are negatives only."""

    name: Literal["random"] = "random"
    size: int = Field(4096, ge=2)
    """Images of a batch."""


class MinedBatches(_Batches):
    """Tuples of a query, a positive and hard negatives, mined anew in every round with the network as it is then."""

    name: Literal["mined"] = "mined"
    tuples: int = Field(64, ge=1)
    """Tuples in a batch."""
    every: int = Field(200, ge=1)
    """Steps in a round."""
    mining: MiningConfig = MiningConfig()

    @model_validator(mode="after")
    def _enough(self) -> MinedBatches:
        if self.tuples > self.mining.queries:
            raise ValueError(f"a batch of {self.tuples} tuples of the {self.mining.queries} that mining.queries gives")
        return self


def _named(value: Any) -> Any:
    """Without a name the default's is meant: `--set batches.classes=8` is enough."""
    return {"name": "classes", **value} if isinstance(value, dict) else value


Batches = Annotated[
    Annotated[ClassBatches | BalancedBatches | RandomBatches | MinedBatches, Field(discriminator="name")],
    BeforeValidator(_named),
]


class MemoryConfig(BaseModel):
    """`memory`: embeddings of earlier batches as further negatives and positives (XBM, arXiv:1912.06798)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int = Field(0, ge=0)
    """Embeddings; 0: none."""
    start: int = Field(0, ge=0)
    """First step that uses it: early embeddings drift too fast to be compared with later ones."""


class FinetuneConfig(StageConfig):
    """`[finetune]`. Defaults follow Revaud et al. (arXiv:1906.07589) where the paper states a value."""

    projection: int | None = Field(2048, ge=2)
    """Output dimension of the FC behind the pooling; none where null."""
    size: int = Field(800, ge=32)
    """px of the square training images."""
    min_scale: float = Field(0.4, gt=0, le=1)
    """Smallest part of a photo that a training crop covers."""
    batches: Batches = ClassBatches()
    loss: LossConfig = QuantizedAPConfig()
    memory: MemoryConfig = MemoryConfig()
    chunk: int = Field(16, ge=1)
    """Images in one forward pass; memory depends on this alone."""
    precision: Precision = "float32"
    """Of the trunk; pooling, loss and weights stay float32."""
    steps: int = Field(200, ge=1)
    optim: Optimization = Optimization(optimizer="adam", lr=1e-4, weight_decay=5e-5, schedule="linear")
    validation: Validation = Validation()
    allow_overlap: bool = False
    """Train although photos or landmarks of a test set (--test) are among the training images; the manifest says so."""
    seed: int = 0
    checkpoint_every: int = Field(20, ge=1)
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay; the best one stays anyway."""
    workers: int | tuple[int, int] | None = None
    """One number, or [fewest, most]; all GPUs, else one, where null."""
    loaders: int = Field(0, ge=0)
    """Processes a worker that decode and augment ahead; 0: done between the steps, best where the CPU also trains."""
    pixels_gb: float = Field(1.0, ge=0)
    """Memory of a worker (2**30 bytes) for the pixels of its share of a batch; a larger share is decoded twice."""
    tensorboard: str | None = None
    """Folder or s3:// address for TensorBoard's files, beside training.jsonl."""
    execution: ClassVar[frozenset[str]] = frozenset(
        {"checkpoint_every", "keep", "workers", "loaders", "pixels_gb", "tensorboard"}
    )

    @model_validator(mode="after")
    def _workers(self) -> FinetuneConfig:
        fewest, most = self.workers if isinstance(self.workers, tuple) else (self.workers or 1,) * 2
        if not 1 <= fewest <= most:
            raise ValueError(f"workers = {self.workers}: expected a number from 1, or [fewest, most]")
        return self
