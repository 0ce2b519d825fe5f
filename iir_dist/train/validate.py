"""Retrieval on photos of classes that a training does not see: the number that says when to stop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from iir_dist.data.cache import Photos
from iir_dist.data.images import prepare
from iir_dist.errors import InputError
from iir_dist.losses.pairwise import batch_average_precision
from iir_dist.models.encoder import Encoder
from iir_dist.train import collectives
from iir_dist.train.views import decoded, to_device


class Validation(BaseModel):
    """`validation`: held-out retrieval during training; the weights that do best at it are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    classes: int = Field(0, ge=0)
    """Classes kept aside for it; 0: no validation, the last weights are kept."""
    seed: int = 0
    """Which ones."""
    per_class: int = Field(100, ge=2)
    """At most so many photos of each."""
    every: int = Field(20, ge=1)
    """Steps between two."""
    patience: int | None = Field(None, ge=1)
    """End after so many without a better one."""


def kept_aside(labels: Sequence[str | None], config: Validation) -> frozenset[str]:
    """The held-out classes: of those with two photos or more, the first by a hash of seed and name.

    Raises:
        InputError: fewer than two classes would be left to train on.
    """
    if config.classes == 0:
        return frozenset()
    count: dict[str, int] = {}
    for label in labels:
        if label is not None:
            count[label] = count.get(label, 0) + 1
    usable = [label for label, n in count.items() if n > 1]
    if len(usable) < config.classes + 2:
        raise InputError(
            f"validation.classes = {config.classes}, but {len(usable)} classes have two or more images and training "
            f"needs two; expected at most {max(0, len(usable) - 2)}"
        )
    usable.sort(key=lambda label: hashlib.sha256(f"{config.seed}/{label}".encode()).digest())
    return frozenset(usable[: config.classes])


class HeldOut:
    """Photos of the classes that were kept aside, each searched for among all of them.

    They are prepared as embedding prepares them (size and resize of the encoder), one scale, so the figure is that of
    the network and not of what is put on top of it later.
    """

    def __init__(self, photos: Photos, classes: frozenset[str], config: Validation, chunk: int) -> None:
        self.photos, self.chunk = photos, chunk
        by_class: dict[str, list[int]] = {label: [] for label in sorted(classes)}
        for number, label in enumerate(photos.labels):
            if label in by_class:
                by_class[label].append(number)
        self.numbers: list[int] = []
        self.labels: list[int] = []
        for i, members in enumerate(by_class.values()):
            chosen = members if len(members) <= config.per_class else _spread(members, config.per_class)
            self.numbers += chosen
            self.labels += [i] * len(chosen)

    @torch.no_grad()
    def mean_average_precision(self, encoder: Encoder, device: torch.device) -> float:
        """Exact mAP over all held-out photos as queries; each worker embeds its share."""
        start, stop = collectives.share_of(len(self.numbers), collectives.rank(), collectives.world_size())
        training = encoder.training
        encoder.eval()
        own, waiting = [torch.zeros(0, encoder.spec.dim, device=device)], list[Tensor]()
        for number in self.numbers[start:stop]:
            x = self._pixels(number, encoder)
            if waiting and (waiting[0].shape != x.shape or len(waiting) == self.chunk):
                own.append(encoder.describe(to_device(torch.stack(waiting), device)))
                waiting.clear()
            waiting.append(x)
        if waiting:
            own.append(encoder.describe(to_device(torch.stack(waiting), device)))
        encoder.train(training)
        z, _ = collectives.gather(torch.cat(own))
        return batch_average_precision(z, torch.tensor(self.labels, device=z.device))

    def _pixels(self, number: int, encoder: Encoder) -> Tensor:
        image = decoded(self.photos, number)
        return torch.tensor(prepare(image, encoder.spec.size, encoder.spec.resize)).permute(2, 0, 1)


def _spread(members: list[int], count: int) -> list[int]:
    return [members[i * len(members) // count] for i in range(count)]
