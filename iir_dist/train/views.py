"""Views of photos for training: decoded and augmented ahead by other processes, the same whoever makes them.

A view is a function of (photo, recipe, seed) and nothing else, so the two passes of three-stage backpropagation, a
resumed run, and any number of workers and loaders see the same pixels. All views of a photo in a chunk are made from one
decoding. Pixels travel as bytes; they become floats on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iir_dist.data.augment import View
from iir_dist.data.cache import Photos
from iir_dist.data.images import decode
from iir_dist.errors import ImageError, TrainingError


def decoded(photos: Photos, number: int, least: int | None = None) -> Image.Image:
    """A photo, upright RGB; `least` as in `decode`. Raises `TrainingError`."""
    photo = photos[number]
    try:
        return decode(photo.data, least=least)
    except ImageError as error:  # it decoded at ingest, so the stored bytes or the machine changed
        raise TrainingError(f"photo {photo.name!r} cannot be decoded: {error}; run iir verify on the images") from None


class Key(NamedTuple):
    """One view of one photo; `view` chooses the recipe."""

    number: int
    seed: int
    view: int = 0


class _Views(Dataset[Tensor]):
    """Keys -> as many (3, S, S) uint8."""

    def __init__(self, photos: Photos, views: Sequence[View]) -> None:
        self.photos, self.views = photos, views

    def __getitems__(self, keys: Sequence[Key]) -> list[Tensor] | str:
        """Of a chunk's keys, in their order; or what is wrong: an exception would arrive wrapped in a traceback."""
        # Views of a photo that ask for one scale share a decoding; nothing else about the others may matter to a view.
        alike: dict[tuple[int, int | None], list[int]] = {}
        for position, key in enumerate(keys):
            alike.setdefault((key.number, self.views[key.view].least), []).append(position)
        made: dict[int, Tensor] = {}
        try:
            for (number, least), positions in alike.items():
                image = decoded(self.photos, number, least)
                for position in positions:
                    key = keys[position]
                    made[position] = self.views[key.view](image, key.seed)
                del image  # before the next is decoded: one at a time is held
        except TrainingError as error:
            return str(error)
        return [made[position] for position in range(len(keys))]


def _collate(chunk: list[Tensor] | str) -> Tensor | str:
    return chunk if isinstance(chunk, str) else torch.stack(chunk)


class Stream:
    """The chunks of views of one step after another.

    Args:
        view: one for all keys, or those that `Key.view` counts.
        plan: step -> its chunks, each a list of keys of one size; called ahead.
        stop: the first step that is not planned.
        loaders: processes that decode; with 0 it is done here, when a chunk is asked for.
    """

    def __init__(
        self,
        photos: Photos,
        view: View | Sequence[View],
        plan: Callable[[int], Sequence[Sequence[Key]]],
        stop: int,
        loaders: int,
    ) -> None:
        self._dataset = _Views(photos, view if isinstance(view, Sequence) else [view])
        self._plan, self._stop, self._loaders = plan, stop, loaders
        self._chunks: Iterator[Tensor | str] = iter(())
        self._step: int | None = None

    def chunks(self, step: int) -> Iterator[Tensor]:
        """Each chunk of a step: (n, 3, S, S) uint8. Steps are asked for in rising order, each to its end.

        Raises:
            TrainingError: a photo cannot be decoded.
        """
        if step != self._step:
            self._start(step)
        count = len(self._plan(step))
        self._step = step if count else step + 1
        for i in range(count):
            chunk = next(self._chunks)
            if isinstance(chunk, str):
                raise TrainingError(chunk)
            if i == count - 1:  # nobody needs to ask for more than there is
                self._step = step + 1
            yield chunk

    def _start(self, step: int) -> None:
        keys = _Plan(self._plan, step, self._stop)
        # A generator of its own: a start would else draw from that which seeds the step.
        options: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if self._loaders else {}
        self._chunks = iter(
            DataLoader(
                self._dataset, batch_sampler=keys, collate_fn=_collate, num_workers=self._loaders,
                pin_memory=torch.cuda.is_available(), generator=torch.Generator(), **options,
            )
        )  # fmt: skip


class _Plan:
    """All chunks from one step on, made as they are asked for."""

    def __init__(self, plan: Callable[[int], Sequence[Sequence[Key]]], start: int, stop: int) -> None:
        self._plan, self._start, self._stop = plan, start, stop

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self._start, self._stop):
            for chunk in self._plan(step):
                yield list(chunk)


def to_device(chunk: Tensor, device: torch.device) -> Tensor:
    """(n, 3, H, W) uint8 -> float32 in [0, 1] on the device, channels last."""
    x = chunk.to(device, non_blocking=True, memory_format=torch.channels_last)
    return x.float().div_(255)
