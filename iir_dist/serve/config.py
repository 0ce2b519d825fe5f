"""`[serve]`: what a request may cost, and who computes."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from iir_dist.config import StageConfig


class ServeConfig(StageConfig):
    """`[serve]`. A replica holds at most `concurrent` uploads, and decodes as many photos at a time as it has threads."""

    upload_mb: float = Field(20, gt=0, le=512)
    """Of a photo that is sent."""
    max_megapixels: float = Field(64, gt=0, le=178)
    """Of a photo that is sent; said by its header, and refused before a pixel is decoded."""
    concurrent: int = Field(32, ge=1, le=1024)
    """Searches under way, those that wait included; beyond them the answer is 429."""
    timeout_sec: float = Field(30, gt=0)
    """For the answer, once the photo is there."""
    upload_sec: float = Field(20, gt=0)
    """For the head of a request, and again for its body."""
    batch: int = Field(16, ge=1, le=256)
    """Photos that go through the network together, at most; none waits for others to come."""
    threads: int | None = Field(None, ge=1)
    """Of the network, of search and of decoding, each; all cores where not set, one a replica on Ray."""
    exact_rows: int = Field(100_000, ge=0)
    """Up to so many rows, a search may compare with all of them."""
    thumbnails_mb: float = Field(64, ge=0)
    """Of small copies that are kept in memory."""
    poll_sec: float = Field(2, gt=0)
    """After which the index is looked at again; a new version is opened and takes over."""
    replicas: int | tuple[int, int] = (1, 4)
    """On Ray Serve: a number, or the fewest and the most."""
    execution: ClassVar[frozenset[str]] = frozenset()

    @field_validator("replicas")
    @classmethod
    def _ordered(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (replicas, replicas) if isinstance(replicas, int) else replicas
        if not 1 <= low <= high:
            raise ValueError("expected a number from 1, or [fewest, most]")
        return replicas
