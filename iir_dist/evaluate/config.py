"""What decides an evaluation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from iir_dist.config import StageConfig


class EvaluateConfig(StageConfig):
    """`[evaluate]`."""

    protocol: Literal["revisited", "original", "custom"] | None = None
    """Insist on one; the ground truth says which where not set."""
    k: int = Field(100, ge=1)
    """Of mAP@k and micro AP of the custom protocol: 100 for Google Landmarks, 1,000 for ILIAS. The others have none."""
    seed: int = 0
    """Of the bootstrap over queries."""
    allow_whitening_on_test: bool = False
    """Score also where the whitening was learnt on the images that are evaluated; the protocol then says so."""
    execution: ClassVar[frozenset[str]] = frozenset()
