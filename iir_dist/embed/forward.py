"""The network of a worker: batches of pixels to unit vectors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from iir_dist import artifact
from iir_dist.embed.config import EmbedConfig
from iir_dist.errors import IirError
from iir_dist.models import encoder
from iir_dist.models.encoder import Encoder, EncoderSpec


class Embedder:
    """Turns one decoded batch into rows of vectors.

    On a GPU two threads call it: while one computes, the other copies its batch from pinned memory to the device.
    """

    def __init__(self, encoder_uri: str, threads: int, config: EmbedConfig) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder, manifest = artifact.require(encoder_uri, *artifact.ENCODERS)
        network = encoder.load(folder, manifest).to(self.device)
        self.dim = network.spec.dim
        self.bfloat16 = config.precision == "bfloat16"
        if self.device.type == "cuda":
            self.copies = torch.cuda.Stream()
            torch.backends.cudnn.allow_tf32 = False  # what is called float32 is float32
            if self.bfloat16 and not torch.cuda.is_bf16_supported():
                raise IirError(f"{torch.cuda.get_device_name()} has no bfloat16; --set precision=float32")
        self.network: Any = network.to(memory_format=torch.channels_last)
        if config.compile:
            self.network = torch.compile(self.network)
        self.turn = threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of `decode.BATCH_FIELDS` to its images' rows, each with a vector or an error."""
        batch = table.to_pylist()[0]
        n = len(batch["row"])
        vectors = np.full((n, self.dim), np.nan, np.float32)
        notes: set[str] = set()
        if not batch["error"]:
            pixels = np.frombuffer(batch["pixels"], np.uint8).reshape(batch["shape"])
            with torch.inference_mode():
                vectors = self.vectors(pixels, notes)
        lost = ~np.isfinite(vectors).all(axis=1) | (np.linalg.norm(vectors, axis=1) < 0.5)
        reasons = [(batch["error"] or "the network gave no finite, non-zero vector") if bad else None for bad in lost]
        return pa.table(
            {
                "shard": np.full(n, batch["shard"]), "total": np.full(n, batch["total"]), "row": batch["row"],
                "id": batch["id"], "name": batch["name"], "split": batch["split"],
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dim),
                "error": pa.array(reasons, pa.string()),
                "note": pa.array([" ".join(sorted(notes)) or None] * n, pa.string()),
            }
        )  # fmt: skip

    def vectors(self, pixels: np.ndarray[Any, Any], notes: set[str]) -> np.ndarray[Any, Any]:
        """(n, height, width, 3) uint8 to (n, dim) float32; in halves where memory does not hold the whole.

        Raises:
            IirError: it does not hold a single image.
        """
        try:
            return self._forward(pixels)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # Outside of the handler, whose traceback keeps the activations alive.
        n, height, width, _ = pixels.shape
        if n == 1:
            raise IirError(
                f"one image of {width} x {height} px does not fit into the memory of a worker on {self.device}; take a "
                "smaller size or fewer scales, or fewer workers (--set workers=1)"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        notes.add(
            f"{n} images of {width} x {height} px did not fit into memory and were halved; "
            f"--set batch_megapixels={n * height * width / 2e6:.2g} saves the attempts."
        )
        half = (n + 1) // 2
        return np.concatenate([self.vectors(pixels[:half], notes), self.vectors(pixels[half:], notes)])

    def _forward(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.device.type == "cpu":
            vectors: Tensor = self._network(torch.from_numpy(pixels.copy()))
            return vectors.numpy()
        with torch.cuda.stream(self.copies):
            x = torch.from_numpy(pixels.copy()).pin_memory().to(self.device, non_blocking=True)
            copied = self.copies.record_event()
        with self.turn:  # only launches are in turn; what follows waits outside, and the next launch need not
            stream = torch.cuda.current_stream()
            stream.wait_event(copied)
            x.record_stream(stream)
            vectors = self._network(x).to("cpu", non_blocking=True)
            computed = stream.record_event()
        computed.synchronize()
        return vectors.numpy()

    def _network(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            vectors: Tensor = self.network(x.permute(0, 3, 1, 2).float().div(255)).float()
        return vectors


def _out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator and oneDNN, which says only that it failed, raise a plain RuntimeError."""
    said = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)


def activation_bytes(spec: EncoderSpec, n: int, height: int, width: int) -> int:
    """What the layers of one forward pass hold at a time, at most: the largest input and output of a layer, and as much
    again for what waits beside (the shortcut and both ends of a batch norm in ResNet-50). Computed without data or
    weights; 1.1 to 1.9 times what is measured.
    """
    largest = 0

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        held = sum(t.numel() * t.element_size() for t in (*inputs, output) if isinstance(t, Tensor))
        largest = max(largest, held)

    with torch.device("meta"), torch.inference_mode(), _hooked(Encoder(spec).eval(), look) as network:
        network(torch.empty(n, 3, height, width))
    return 2 * largest


@contextlib.contextmanager
def _hooked(network: nn.Module, look: Any) -> Iterator[nn.Module]:
    for module in network.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(look)
    yield network
