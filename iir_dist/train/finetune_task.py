"""A step of fine-tuning: which photos, which pixels, which loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from iir_dist.data.augment import mild, seed_of
from iir_dist.data.cache import Photos
from iir_dist.data.sampling import BalancedSampler, ClassSampler, RandomSampler, Sampler, TupleSampler
from iir_dist.errors import ConfigError
from iir_dist.losses.classification import ArcFace
from iir_dist.models.encoder import Encoder
from iir_dist.train import collectives, stage
from iir_dist.train.backprop import Outcome, three_stage
from iir_dist.train.finetune_config import BalancedBatches, ClassBatches, FinetuneConfig, MinedBatches, RandomBatches
from iir_dist.train.loop import autocast
from iir_dist.train.memory import CrossBatchMemory
from iir_dist.train.objectives import build
from iir_dist.train.validate import HeldOut, kept_aside
from iir_dist.train.views import Key, Stream, to_device


class Trained(nn.Module):
    """All that has weights: the encoder, and a loss that learns some."""

    def __init__(self, encoder: Encoder, loss: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss if isinstance(loss, nn.Module) else None


class FinetuneTask:
    """One step over all workers; batch norm is frozen, so that both passes see one network.

    Args:
        photos: of all training images; those without a label take no part.
        tuples: address of mined tuples and the first step that uses them, for batches made of them.
    """

    def __init__(
        self, photos: Photos, encoder: Encoder, config: FinetuneConfig, tuples: tuple[str, int] | None = None
    ) -> None:
        self.photos, self.config = photos, config
        self.device = stage.device()
        aside = kept_aside(photos.labels, config.validation)
        labels = [None if label in aside else label for label in photos.labels]
        classes = {label: number for number, label in enumerate(sorted({x for x in labels if x is not None}))}
        self.labels = np.array([classes.get(label or "", -1) for label in labels])
        self.sampler = _sampler(labels, config, tuples)
        self._batch = functools.lru_cache(maxsize=16)(self.sampler.batch)  # asked for several times a step
        self.loss = build(config.loss, len(classes), encoder.spec.dim, config.seed)
        if isinstance(self.loss, ArcFace):  # all workers see the global batch, so one of them counts its own gradient
            self.loss.contributes = collectives.rank() == 0
        # Evaluation mode throughout: no dropout, batch norm by its running statistics.
        model = Trained(encoder, self.loss).eval()
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.encoder = encoder
        if all(config.optim.multiplier(f"encoder.{name}") == 0 for name, _ in encoder.named_parameters()):
            raise ConfigError("optim.rates freezes the whole encoder; leave some of it to train")
        memory = config.memory
        self.state: CrossBatchMemory | None = None
        if memory.size:
            self.state = CrossBatchMemory(memory.size, encoder.spec.dim, memory.start, self.device)
        self.held_out = HeldOut(photos, aside, config.validation, config.chunk) if aside else None
        self.view = mild(config.size, config.min_scale)
        self.stream = Stream(photos, self.view, self._plan, config.steps, config.loaders)

    def sample(self, size: int = 512) -> Tensor:
        """(n, D) vectors before the projection of training images spread over all; the same on every worker."""
        seed = self.config.seed
        known = np.flatnonzero(self.labels >= 0)
        keys = [Key(n, seed_of(seed, n)) for n in np.random.default_rng(seed).permutation(known)[:size].tolist()]
        chunks = self._chunks(keys)  # of all workers, so that what is computed together does not depend on their number
        start, stop = collectives.share_of(len(chunks), collectives.rank(), collectives.world_size())
        chunks = chunks[start:stop]
        width = cast(nn.Linear, self.encoder.projection).in_features
        parts = [torch.zeros(0, width, device=self.device)]
        with torch.no_grad():
            for x in Stream(self.photos, self.view, lambda _: chunks, 1, 0).chunks(0):
                parts.append(self.encoder.pooled(to_device(x, self.device)))
        return collectives.gather(torch.cat(parts))[0].cpu()

    def images_per_step(self, step: int) -> int:
        return len(self._batch(step))

    def names(self, step: int, positions: Sequence[int]) -> list[str]:
        batch = self._batch(step)
        return [self.photos[int(n)].name for n in (batch[list(positions)] if positions else batch)]

    def validate(self) -> dict[str, Any] | None:
        return {"map": self.held_out.mean_average_precision(self.encoder, self.device)} if self.held_out else None

    def step(self, step: int, scale: float) -> Outcome:
        own = self._own(step)
        labels = torch.from_numpy(self.labels[own]).to(self.device)
        loss, dim = functools.partial(self._loss, step), self.encoder.spec.dim
        outcome = three_stage(self._embed, self._passes(step, len(own)), labels, loss, dim, scale)
        if isinstance(self.loss, ArcFace) and self.loss.weight.grad is not None:
            self.loss.weight.grad *= scale  # as the gradient that went through the encoder
        return outcome

    def _embed(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.config.precision):
            return self.encoder.describe(x)

    def _loss(self, step: int, z: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        if self.state is None:
            return self.loss(z, labels)
        outcome = self.loss(z, labels, *self.state.contents(step))
        self.state.add(step, z, labels)
        return outcome

    def _own(self, step: int) -> Any:
        batch = self._batch(step)
        start, stop = collectives.share_of(len(batch), collectives.rank(), collectives.world_size())
        return batch[start:stop]

    def _passes(self, step: int, count: int) -> Callable[[], Iterable[Tensor]]:
        """The chunks of a step, once for each pass: kept in memory, or decoded again where they are many."""
        stream = self.stream.chunks(step)
        move = functools.partial(to_device, device=self.device)
        if self._twice(count):
            half = -(-count // self.config.chunk)
            return lambda: map(move, itertools.islice(stream, half))
        kept = list(stream)
        return lambda: map(move, kept)

    def _plan(self, step: int) -> list[list[Key]]:
        seed = self.config.seed
        keys = [Key(n, seed_of(seed, step, n)) for n in self._own(step).tolist()]
        return self._chunks(keys) * (2 if self._twice(len(keys)) else 1)

    def _chunks(self, keys: list[Key]) -> list[list[Key]]:
        return [keys[i : i + self.config.chunk] for i in range(0, len(keys), self.config.chunk)]

    def _twice(self, count: int) -> bool:
        return bool(count * 3 * self.config.size**2 > self.config.pixels_gb * 2**30)


def _sampler(labels: list[str | None], config: FinetuneConfig, tuples: tuple[str, int] | None) -> Sampler:
    batches = config.batches
    match batches:
        case ClassBatches():
            return ClassSampler.of(labels, batches.classes, batches.per_class, config.seed)
        case BalancedBatches():
            return BalancedSampler.of(labels, batches.size, batches.per_class, config.seed)
        case RandomBatches():
            return RandomSampler.of(labels, batches.size, config.seed)
        case MinedBatches():
            assert tuples is not None
            return TupleSampler.read(tuples[0], batches.tuples, config.seed, tuples[1])
