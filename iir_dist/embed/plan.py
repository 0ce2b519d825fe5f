"""Who computes, and what all of them will hold in memory; pure arithmetic, printed before a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

MB = 2**20
FORWARD_PROCESS = 600 * MB
"""A Python process with Ray and torch, before it loads a network."""
DECODE_PROCESS = 130 * MB
DRIVER_PROCESS = 620 * MB
LARGE_PHOTO = 24e6
"""Pixels; decoders are planned for one of them each, in RGB, and its resized copies."""
ROW_BYTES = 200
"""Of one row beside its vector: id, name, split, place."""
LEAST_IN_FLIGHT = 96 * MB
"""Batches of a tenth of a second need many in flight: with 12 MB of them Ray Data left half of each core idle."""


@dataclass(frozen=True, slots=True)
class EmbedPlan:
    """Workers and bytes; what is named per worker is for one of them."""

    workers: int
    threads: int
    """Of each worker."""
    worker_cpus: float
    worker_gpus: float
    decoders: int
    decoder_cpus: float
    worker_bytes: int
    """Process, network, activations; on a GPU host the last two are on the GPU."""
    decoder_bytes: int
    in_flight_bytes: int
    """Decoded batches in Ray's object store; a bound that is kept."""
    driver_bytes: int
    """Process, and vectors of the shards in flight."""
    store_bytes: int
    """What Ray's object stores hold."""

    @property
    def total_bytes(self) -> int:
        """All of it, on all nodes."""
        return (
            self.workers * self.worker_bytes
            + self.decoders * self.decoder_bytes
            + self.in_flight_bytes
            + self.driver_bytes
        )

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.workers} workers of {self.threads} threads, {_mb(self.worker_bytes)} each; {self.decoders} decoders, "
            f"{_mb(self.decoder_bytes)} each; up to {_mb(self.in_flight_bytes)} of decoded batches in flight (Ray's object "
            f"store has {_mb(self.store_bytes)}); driver {_mb(self.driver_bytes)}; {_mb(self.total_bytes)} in all"
        )

    def manifest(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def _mb(size: int) -> str:
    return f"{size / MB:,.0f} MB"


def _share(whole: float, parts: int) -> float:
    """An equal part, rounded down: Ray counts in ten-thousandths, and of six sixths rounded up the last finds no place."""
    return math.floor(1e4 * whole / parts) / 1e4


def plan(
    *,
    rows: int,
    shards: int,
    size: int,
    dim: int,
    batch_megapixels: float,
    network_bytes: int,
    forward_bytes: int,
    shard_bytes: int,
    store_bytes: int,
    cpus: int,
    node_cpus: int,
    gpus: int,
    workers: int | None = None,
) -> EmbedPlan:
    """Share CPUs and GPUs out and add up what that holds.

    Args:
        rows, shards: that are to be embedded.
        size: of the network's input, px.
        dim: of the vectors.
        network_bytes: of the weights.
        forward_bytes: of the activations of one batch.
        shard_bytes: of the largest input shard; a decoder maps one.
        store_bytes: of Ray's object stores.
        cpus, gpus: of the cluster.
        node_cpus: of its largest node; nothing that asks for more is ever started.
        workers: embedding actors, where not one a GPU, else one a CPU.

    >>> plan(rows=10**6, shards=400, size=224, dim=1280, batch_megapixels=0.41, network_bytes=14 * MB,
    ...      forward_bytes=60 * MB, shard_bytes=256 * MB, store_bytes=2400 * MB, cpus=2, node_cpus=2, gpus=0).workers
    2
    """
    batch_pixels = max(batch_megapixels * 1e6, size**2)
    # No more workers than there are batches: each costs seconds and half a gigabyte to start.
    most = max(1, math.ceil(rows * size**2 / (batch_megapixels * 1e6)))
    chosen = min(workers or gpus or cpus, most)
    if gpus:
        # A worker lies on one GPU. One more share of the CPUs than workers: at least one decoder must run beside them.
        worker_gpus, worker_cpus, threads = _share(1, math.ceil(chosen / gpus)), min(1.0, _share(cpus, chosen + 1)), 1
        decoder_cpus = worker_cpus
        decoders = int(cpus / worker_cpus) - chosen
    else:
        # The forward passes take four fifths of each core; decoding, a tenth of the work, runs in what is left.
        share = min(cpus / chosen, node_cpus)
        worker_cpus, worker_gpus, threads = _share(4 * share, 5), 0.0, max(1, int(share))
        decoder_cpus, decoders = _share(share, 5), chosen
    decoders = min(decoders, shards)
    # A worker has one batch in hand and two that wait; a decoder makes one and has made one.
    in_flight = max(LEAST_IN_FLIGHT, int((3 * chosen + 2 * decoders) * 3 * batch_pixels))
    waiting = (decoders + chosen) * math.ceil(rows / shards) * (4 * dim + ROW_BYTES)
    return EmbedPlan(
        workers=chosen, threads=threads, worker_cpus=worker_cpus, worker_gpus=worker_gpus, decoders=decoders,
        decoder_cpus=decoder_cpus,
        worker_bytes=FORWARD_PROCESS + 2 * network_bytes + forward_bytes + int(5 * 3 * batch_pixels),
        decoder_bytes=DECODE_PROCESS + shard_bytes + int(4 * LARGE_PHOTO + 3 * 3 * batch_pixels),
        in_flight_bytes=in_flight, driver_bytes=DRIVER_PROCESS + int(waiting), store_bytes=store_bytes,
    )  # fmt: skip
