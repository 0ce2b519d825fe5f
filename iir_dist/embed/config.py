"""`[embed]`: what decides the vectors, and who computes them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from iir_dist.config import StageConfig


class EmbedConfig(StageConfig):
    """`[embed]`."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    batch_megapixels: float = Field(0.41, gt=0)
    """Pixels in one forward pass, in millions (8 images of 224 x 224, enough for a CPU); a GPU wants about 13."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass. bfloat16 is autocast: pooling and all behind it stay float32."""
    compile: bool = False
    """torch.compile the network: half a minute at the start of each worker, then 1.6 times the speed on an H100."""
    workers: int | None = Field(None, ge=1)
    """Embedding actors; all GPUs, else all CPUs, where not set."""
    execution: ClassVar[frozenset[str]] = frozenset({"workers"})
