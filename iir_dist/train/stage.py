"""What pretraining and fine-tuning share: reading photos, starting workers, writing the encoder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Manifest
from iir_dist.data.augment import View
from iir_dist.data.cache import Photos
from iir_dist.data.images import decode
from iir_dist.errors import ImageError, TrainingError
from iir_dist.models.encoder import Encoder, info_of, save
from iir_dist.storage import sha256_of
from iir_dist.train.loop import CHECKPOINT, LOG


def views(
    photos: Photos, numbers: Iterable[int], view: View, seed: Callable[[int, int], int], count: int = 1
) -> Tensor:
    """(count * n, 3, size, size) float32 in [0, 1]: view 0 of all photos, then view 1 of all, and so on.

    Args:
        seed: (photo number, view) -> seed of that view.
    """
    by_view: list[list[Tensor]] = [[] for _ in range(count)]
    for number in map(int, numbers):
        photo = photos[number]
        try:
            image = decode(photo.data)
        except ImageError as error:  # it decoded at ingest, so the stored bytes or the machine changed
            raise TrainingError(
                f"photo {photo.name!r} cannot be decoded: {error}; run iir verify on the images"
            ) from None
        for i in range(count):
            by_view[i].append(view(image, seed(number, i)))
    return torch.stack([x for part in by_view for x in part]).contiguous(memory_format=torch.channels_last)


def device() -> torch.device:
    """This worker's GPU if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def publish(work: artifact.Work, encoder: Encoder, counts: dict[str, int]) -> Manifest:
    """Write the trained encoder beside its log and last checkpoint, and the manifest."""
    files = save(encoder, work.folder)
    for name in (LOG, CHECKPOINT):
        with work.folder.local(name) as path:
            files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_of(path))
    return work.publish(counts, files, info_of(encoder))


def last_weights(work: artifact.Work) -> dict[str, Any]:
    """The model's state in the last checkpoint."""
    state = torch.load(io.BytesIO(work.folder.read(CHECKPOINT)), map_location="cpu", weights_only=True)
    weights: dict[str, Any] = state["model"]
    return weights
