"""Each image's nearest neighbours, by the network as it was when a round began: the table, and batches drawn from it.

`iir_dist.mine.neighbours` makes the table, with the embed and search stages; a training is given it by its caller.
Images are known by their numbers in `data.cache.Photos`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist.data.sampling import epoch_batch
from iir_dist.storage import split_uri
from iir_dist.vectors import F32, I64


class Finder(Protocol):
    """What pretraining asks for, and `iir_dist.mine.neighbours` does."""

    def __call__(
        self, images: Sequence[str], encoder: str, work: str, *, candidates: int, exact_rows: int, seed: int
    ) -> str:
        """Images artifacts, an encoder and a folder of this round -> Parquet file of `schema`."""
        ...


def schema(candidates: int, dim: int) -> pa.Schema:
    """Schema of the table: row r is image r, its neighbours nearest first and without itself, their cosines, its vector.

    A list that is shorter (of an index) is filled up with -1 and NaN.
    """
    return pa.schema(
        [
            ("name", pa.string()), ("candidates", pa.list_(pa.int32(), candidates)),
            ("scores", pa.list_(pa.float32(), candidates)), ("embedding", pa.list_(pa.float32(), dim)),
        ]
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a round begins with.

    Args:
        candidates: (n, k) int32, as in `schema`.
        vectors: (n, D) float32, unit, of the images as they are.
        first_step: of the round.
    """

    candidates: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    vectors: F32
    first_step: int = 0

    @classmethod
    def read(cls, uri: str, first_step: int) -> Neighbours:
        """From the table at `uri`."""
        folder, name = split_uri(uri)
        with folder.open(name) as file:
            parquet = pq.ParquetFile(file)
            n, fields = parquet.metadata.num_rows, parquet.schema_arrow
            candidates = np.empty((n, fields.field("candidates").type.list_size), np.int32)
            vectors = np.empty((n, fields.field("embedding").type.list_size), np.float32)
            start = 0
            for batch in parquet.iter_batches(columns=["candidates", "embedding"]):  # what is held grows by one batch
                rows = slice(start, start + len(batch))
                candidates[rows] = batch["candidates"].flatten().to_numpy().reshape(len(batch), -1)
                vectors[rows] = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
                start = rows.stop
        return cls(candidates, vectors, first_step)


class NeighbourSampler:
    """Groups of an anchor and its nearest neighbours; a function of (seed, step, table). A `data.sampling.Sampler`.

    Every image is an anchor once in an epoch. An image that the batch has already is passed over for the next neighbour;
    what is still missing, where lists are short or the batch is no multiple of a group, is filled with any others.

    Args:
        neighbours: of the round.
        batch_size: images of a batch, all different.
        nearest: neighbours of each anchor.
    """

    def __init__(self, neighbours: Neighbours, batch_size: int, nearest: int, seed: int) -> None:
        self.neighbours, self.batch_size, self.nearest, self.seed = neighbours, batch_size, nearest, seed
        self._drawn = functools.lru_cache(maxsize=16)(self._draw)  # asked for several times a step

    def batch(self, step: int) -> I64:
        """Image numbers of one step, group by group."""
        return self._drawn(step)

    def _draw(self, step: int) -> I64:
        candidates, first = self.neighbours.candidates, self.neighbours.first_step
        anchors = epoch_batch(len(candidates), max(1, self.batch_size // (1 + self.nearest)), step - first, self.seed)
        taken = set(anchors.tolist())
        found = list[int]()
        for anchor in anchors.tolist():
            free = [n for n in candidates[anchor].tolist() if n >= 0 and n not in taken][: self.nearest]
            taken.update(free)
            found += [anchor, *free]
        missing = self.batch_size - len(found)
        if missing > 0:
            others = np.setdiff1d(np.arange(len(candidates)), found)
            found += np.random.default_rng([self.seed, step]).choice(others, missing, replace=False).tolist()
        return np.array(found[: self.batch_size], np.int64)
