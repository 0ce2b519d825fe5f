"""How a global batch is cut: which positions go through the network together, and which worker takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iir_dist.data.parts import slots
from iir_dist.train.collectives import share_of


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of a batch and whose they are.

    With `chunk` they are the same for any number of workers, and none straddles two parts of the set. Without, they are the
    workers' shares. Where the number of workers is a multiple of the number of parts, no worker has photos of two parts.

    Args:
        batch: photos of a global batch.
        chunk: photos of a chunk; what is left over makes some larger. None: one chunk a worker.
        parts: of the set, each of which fills its slot of the batch (`data.parts.slots`).
        workers: that share the batch.
    """

    batch: int
    chunk: int | None
    parts: int
    workers: int

    def cuts(self) -> list[tuple[int, int]]:
        """Positions [start, stop) of every chunk, in order."""
        if self.chunk is None:
            count = min(self.batch, self.workers)
            return [share_of(self.batch, number, count) for number in range(count)]
        # As many in every part, so that parts and workers' shares end at the same chunks.
        count = max(1, self.batch // self.parts // self.chunk)
        return [
            (start + a, start + b)
            for start, stop in slots(self.batch, self.parts)
            for a, b in (share_of(stop - start, number, count) for number in range(count))
        ]

    def of(self, worker: int) -> list[tuple[int, int]]:
        """The chunks that a worker takes: whole ones, in order."""
        cuts = self.cuts()
        first, last = share_of(len(cuts), worker, self.workers)
        return cuts[first:last]

    def parts_of(self, worker: int) -> list[int]:
        """Parts of the set that a worker has photos of."""
        own = self.of(worker)
        return [
            part
            for part, (low, high) in enumerate(slots(self.batch, self.parts))
            if any(start < high and low < stop for start, stop in own)
        ]

    def dealt(self, seed: int) -> list[int]:
        """For every position another one of the same part, whose photo takes its place in a shuffled pass.

        Within the part, so that no worker needs the photos of another.
        """
        generator = torch.Generator().manual_seed(seed)
        return [
            low + place
            for low, high in slots(self.batch, self.parts)
            for place in torch.randperm(high - low, generator=generator).tolist()
        ]

    def shuffles(self) -> bool:
        """Whether dealing out brings photos into other chunks: no part's slot lies in a single one."""
        return not any(
            start <= low and high <= stop for low, high in slots(self.batch, self.parts) for start, stop in self.cuts()
        )
