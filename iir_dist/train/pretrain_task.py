"""A step of self-supervised pretraining: which views, through which network, and the gradient of the global loss.

The batch is cut into chunks, and each chunk into the passes of the method; workers take whole chunks. All outputs are
gathered and put in the batch's order, every worker computes the loss of the whole and its gradient with respect to them,
and pushes the rows that are its own through its network. So the loss, its negatives, queues and centres are those of the
global batch, and equal on every worker.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from iir_dist.data.augment import seed_of, view_of
from iir_dist.data.cache import Photos
from iir_dist.data.sampling import I64, EpochSampler
from iir_dist.errors import ConfigError
from iir_dist.losses.pairwise import batch_average_precision
from iir_dist.models.backbones import backbone
from iir_dist.models.encoder import Encoder
from iir_dist.train import collectives, stage
from iir_dist.train.backprop import Outcome
from iir_dist.train.chunks import Chunks
from iir_dist.train.collapse import LEAST_SPREAD_OF_HEAD, Health
from iir_dist.train.learner import Learner
from iir_dist.train.loop import autocast
from iir_dist.train.methods import build
from iir_dist.train.methods.method import Context, Memory, Pass, all_views, unit
from iir_dist.train.neighbours import Neighbours
from iir_dist.train.norm import Running, globalize
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.probe import Probe
from iir_dist.train.views import Key, Stream, to_device


class _Work(NamedTuple):
    """One forward pass: which, and of which positions of the global batch."""

    part: Pass
    positions: list[int]


class PretrainTask:
    """One step over all workers.

    Args:
        photos: of all images; opened are at least those of this worker's parts (`Chunks.parts_of`).
        encoder: what is trained.
        probe: what is searched now and then; None: nothing.
        neighbours: of the round that begins, of a method that has rounds.
    """

    def __init__(
        self,
        photos: Photos,
        encoder: Encoder,
        config: PretrainConfig,
        probe: Probe | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.photos, self.config, self.probe = photos, config, probe
        self.device = stage.device()
        width = backbone(encoder.spec.backbone).dim
        context = Context(
            width, config.steps, config.batch, config.crop, config.local_crop, config.min_scale, config.seed, self.device,
            neighbours,
        )  # fmt: skip
        self.method = build(config.method, context)
        learner = Learner(encoder, self.method).train()
        if config.norm == "global":
            globalize(learner)
        self.learner: Learner = learner.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = self.learner
        trained = [] if self.method.descriptor else [encoder]  # whose batch norm takes statistics
        self.running = Running(*trained, self.method.head, self.method.predictor)
        self.state: Memory | None = self.method.memory
        self.views = all_views(self.method.passes, target=False)
        self.target_views = all_views(self.method.passes, target=True)
        self._forward = torch.compile(self.learner) if config.compile else self.learner
        self._last = torch.zeros(0, 0)
        self.sampler = EpochSampler.of(photos.counts, config.parts, config.batch, config.seed)
        self.chunks = Chunks(config.batch, config.chunk, config.parts, collectives.world_size())
        if len(self.chunks.cuts()) < collectives.world_size():
            raise ConfigError(
                f"a batch of {config.batch} photos in chunks of {config.chunk or 1} makes {len(self.chunks.cuts())} chunks for "
                f"{collectives.world_size()} workers; expected one each: a larger pretrain.batch, a smaller chunk, or fewer workers"
            )
        shuffled = config.norm == "chunk" and any(part.shuffled for part in self.method.passes)
        if shuffled and not self.chunks.shuffles():
            share = config.batch // config.parts
            raise ConfigError(
                f"{config.method.name} embeds keys among other photos than their queries, and the {share} photos of a batch"
                f"{' and part' if config.parts > 1 else ''} are one chunk; expected two or more: pretrain.chunk of at most "
                f"{share // 2}, or pretrain.norm=global"
            )
        recipes = [view_of(recipe) for recipe in self.method.recipes]
        keys = functools.lru_cache(maxsize=16)(self._keys)  # asked for several times a step
        self.stream = Stream(photos, recipes, keys, config.steps, config.loaders)

    def images_per_step(self, step: int) -> int:
        return self.config.batch

    def names(self, step: int, positions: Sequence[int]) -> list[str]:
        batch = self._batch(step)
        return [self.photos.name(int(n)) for n in (batch[list(positions)] if positions else batch)]

    def validate(self) -> dict[str, Any] | None:
        """The probe's figures and how evenly its vectors and the head's outputs for the last batch are spread."""
        if self.probe is None:
            return None
        encoder = cast(Encoder, self.learner.get_submodule(self.method.published))  # what is kept is what is measured
        figures, health = self.probe.measure(encoder, self.device)
        # A head may collapse while the trunk behind which it sits still tells photos apart.
        head = Health.of(self._last)
        warning = health.warning() or head.warning(LEAST_SPREAD_OF_HEAD)
        if warning:
            warning = f"{warning}; {self.config.method.name}: {self.method.remedy}"
        return {**figures, **health.as_dict(), "head_spread": head.spread, "warning": warning}

    def step(self, step: int, scale: float) -> Outcome:
        if step > 0 and self.learner.target is not None:
            self.learner.follow(self.method.momentum(step))
        self.running.begin()
        pixels, rows, outputs, targets = self._embed(step)
        all_rows, _ = collectives.gather(torch.tensor(rows, dtype=torch.int64))
        z = self._ordered(collectives.gather(outputs.detach())[0], all_rows, len(self.views))
        finite = torch.isfinite(z).flatten(2).all(dim=2).all(dim=0)
        if not finite.all():
            return Outcome(float("nan"), float("nan"), tuple((~finite).nonzero().flatten().tolist()))
        z.requires_grad_()
        value, ap = self._loss(step, z, targets, scale)
        assert z.grad is not None
        gradient = z.grad.flatten(0, 1)[torch.tensor(rows, dtype=torch.int64, device=z.device)] * scale
        self._backward(pixels, outputs, gradient)
        self.running.end()
        return Outcome(value, ap)

    def _embed(self, step: int) -> tuple[list[Tensor], list[int], Tensor, Tensor | None]:
        """This worker's passes: pixels to be embedded again, rows of the batch, outputs, and the targets of all workers."""
        recompute = self.config.recompute
        pixels, rows, outputs = list[Tensor](), list[int](), list[Tensor]()
        target_rows, targets = list[int](), list[Tensor]()
        for (part, positions), chunk in zip(self._own(step), self.stream.chunks(step), strict=True):
            if part.target:
                target_rows += self._rows(part, positions, self.target_views)
                targets.append(self._embed_target(to_device(chunk, self.device)))
            if part.online:
                rows += self._rows(part, positions, self.views)
                with torch.set_grad_enabled(not recompute):
                    outputs.append(self._embed_online(to_device(chunk, self.device)))
                self.running.count()
                pixels += [chunk] if recompute else []
        if not self.target_views:
            return pixels, rows, torch.cat(outputs), None
        gathered, _ = collectives.gather(torch.cat(targets))
        all_rows, _ = collectives.gather(torch.tensor(target_rows, dtype=torch.int64))
        return pixels, rows, torch.cat(outputs), self._ordered(gathered, all_rows, len(self.target_views))

    def _embed_online(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.config.precision):
            return _full(self._forward(x))

    @torch.no_grad()
    def _embed_target(self, x: Tensor) -> Tensor:
        assert self.learner.target is not None
        with autocast(self.device, self.config.precision):
            return _full(self.learner.target(x))

    def _loss(self, step: int, z: Tensor, targets: Tensor | None, scale: float) -> tuple[float, float]:
        """Value and logged AP; leaves the gradient at z, and that of the loss's own weights with worker 0, who speaks for all."""
        with torch.autocast(self.device.type, enabled=False):
            value = self.method.loss(step, z, targets)
        own = list(self.learner.weights.parameters())
        value.backward(inputs=[z, *own])
        for p in own:
            if collectives.rank() == 0 and self.method.trains_weights(step) and p.grad is not None:
                p.grad *= scale
            else:
                p.grad = None
        a, b = (unit(x) for x in self.method.pair(z.detach(), targets))
        self._last = a
        labels = torch.arange(len(a), device=a.device).repeat(2)
        return float(value.detach()), batch_average_precision(torch.cat([a, b]), labels)

    def _backward(self, pixels: list[Tensor], outputs: Tensor, gradient: Tensor) -> None:
        if not self.config.recompute:
            outputs.backward(gradient)
            return
        start = 0
        for chunk in pixels:  # the same pixels and statistics: the same outputs, now with a graph
            z = self._embed_online(to_device(chunk, self.device))
            z.backward(gradient[start : start + len(z)])
            start += len(z)

    def _ordered(self, z: Tensor, rows: Tensor, views: int) -> Tensor:
        """Gathered outputs (n, D) -> (views, B, D)."""
        ordered = torch.empty(views * self.config.batch, z.shape[1], dtype=z.dtype, device=z.device)
        ordered[rows.to(z.device)] = z
        return ordered.view(views, self.config.batch, z.shape[1])

    def _rows(self, part: Pass, positions: list[int], views: tuple[int, ...]) -> list[int]:
        return [views.index(view) * self.config.batch + position for view in part.views for position in positions]

    def _batch(self, step: int) -> I64:
        return (self.method.sampler or self.sampler).batch(step)

    def _own(self, step: int) -> list[_Work]:
        """This worker's forward passes. Chunks are those of the whole batch, whoever takes them."""
        order = self.chunks.dealt(seed_of(self.config.seed, step))
        work = []
        for start, stop in self.chunks.of(collectives.rank()):
            straight, dealt = list(range(start, stop)), order[start:stop]
            work += [_Work(part, dealt if part.shuffled else straight) for part in self.method.passes]
        return work

    def _keys(self, step: int) -> list[list[Key]]:
        """The views of each pass: functions of (seed, epoch, photo, view); of a sampler's batches, which may have a photo
        several times in an epoch, of (seed, step, photo, view)."""
        batch, seed = self._batch(step), self.config.seed
        epoch = self.sampler.epoch(step) if self.method.sampler is None else step
        return [
            [
                Key(int(batch[i]), seed_of(seed, epoch, int(batch[i]), view), view)
                for view in part.views
                for i in positions
            ]
            for part, positions in self._own(step)
        ]


def _full(z: Tensor) -> Tensor:
    """At least float32: losses are never computed in half precision."""
    return z if z.dtype == torch.float64 else z.float()
