"""A network read in another way: input size, scales and mirroring decide a descriptor and are no weights.

So one training serves every size and every set of scales, and each reading is an encoder of its own.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.images import Resize
from iir_dist.errors import MismatchError
from iir_dist.models import encoder as models


class ReadingConfig(StageConfig):
    """What changes; what is null stays as it is in the encoder. Meanings are those of `models.encoder.EncoderConfig`."""

    size: int | None = Field(None, ge=16, le=4096)
    resize: Resize | None = None
    scales: tuple[float, ...] | None = None
    scale_rule: models.ScaleRule | None = None
    flip: bool | None = None
    execution: ClassVar[frozenset[str]] = frozenset()


def run(encoder_uri: str, out: str, config: ReadingConfig, *, force: bool = False) -> Manifest:
    """Write the same network with another reading.

    Raises:
        MismatchError: the encoder is whitened; its whitening was learnt for the reading that it has.
    """
    folder, manifest = artifact.require(encoder_uri, *artifact.ENCODERS)
    with artifact.begin(out, "encoder", config, {"encoder": artifact.reference(folder, manifest)}, force=force) as work:
        if work.finished:
            return work.finished
        network = models.load(folder, manifest)
        if network.spec.whitening is not None:
            raise MismatchError(
                f"{encoder_uri} is whitened for the way that it is read; give the encoder before whitening"
            )
        changes = {key: value for key, value in config.model_dump().items() if value is not None}
        network.spec = models.EncoderSpec.model_validate({**network.spec.model_dump(), **changes})
        counts = {"parameters": models.num_parameters(network)}
        return work.publish(counts, models.save(network, work.folder), models.info_of(network))
