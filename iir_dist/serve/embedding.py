"""A photo's bytes to a vector, by the encoder that made the index; photos that wait go through the network together."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iir_dist import artifact
from iir_dist.data.images import U8, Box, clip_box, decode, prepare
from iir_dist.embed.config import EmbedConfig
from iir_dist.embed.forward import Embedder
from iir_dist.errors import ImageError, InputError
from iir_dist.models.encoder import read_spec
from iir_dist.serve.batches import Batches
from iir_dist.vectors import F32


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vector (1, d) of a photo, the size of the upright photo in px, and seconds by step."""

    vector: F32
    size: tuple[int, int]
    seconds: dict[str, float]


class Embedding:
    """The encoder of an index, loaded after its files were checked.

    Args:
        threads: of the network; as many photos are decoded at a time, which bounds the memory of decoding.
        batch: photos that go through the network together, at most.

    Raises:
        InputError, CorruptError: there is no encoder, or it is not the one that was written.
    """

    def __init__(self, uri: str, threads: int, batch: int, max_megapixels: float) -> None:
        folder, manifest = artifact.require(uri, *artifact.ENCODERS)
        self.uri, self.fingerprint, self.spec = folder.uri, manifest.fingerprint, read_spec(folder)
        self.max_megapixels = max_megapixels
        self._network = Embedder(uri, threads, EmbedConfig())
        self._decoding = threading.Semaphore(threads)
        self._batches: Batches[U8, F32] = Batches("embed", self._vectors, batch)
        self._vectors([np.zeros((self.spec.size, self.spec.size, 3), np.uint8)])  # the first pass is the slowest

    def __call__(self, data: bytes, box: Box | None) -> Embedded:
        """Decode, cut to the box, embed.

        Raises:
            ImageError: the photo cannot be used, or nothing of the box lies in it.
            InputError: the network gives no vector for it.
        """
        start = time.perf_counter()
        with self._decoding:
            began = time.perf_counter()
            image = decode(data, self.max_megapixels)
            size = image.size
            if box is not None:
                clip_box(box, size)
            pixels = prepare(image, self.spec.size, self.spec.resize, box)
            del image
            decoded = time.perf_counter()
        done = self._batches(pixels)
        seconds = {"queue": began - start + done.waited, "decode": decoded - began, "embed": done.worked}
        return Embedded(done.result, size, seconds)

    @property
    def waiting(self) -> int:
        """Photos that wait for the network."""
        return self._batches.waiting

    def close(self) -> None:
        """Stop its thread."""
        self._batches.close()

    def _vectors(self, photos: Sequence[U8]) -> list[F32 | Exception]:
        """One forward pass for each shape."""
        out: list[F32 | Exception] = [InputError("the network gave no vector")] * len(photos)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for number, pixels in enumerate(photos):
            shapes.setdefault(pixels.shape, []).append(number)
        for numbers in shapes.values():
            with torch.inference_mode():
                found = self._network.vectors(np.stack([photos[n] for n in numbers]), set())
            for number, x in zip(numbers, found, strict=True):
                if np.isfinite(x).all() and np.linalg.norm(x) > 0.5:
                    out[number] = np.ascontiguousarray(x[None], np.float32)
                else:
                    out[number] = ImageError("corrupt", "the network gave no finite, non-zero vector for the photo")
        return out
