"""From the number and dimension of the vectors to the index's parameters; pure arithmetic, printed before the build."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from pydantic import Field

from iir_dist.config import StageConfig
from iir_dist.errors import ConfigError

MIN_POINTS_PER_CENTROID = 39
"""Fewer training vectors a centroid make k-means unreliable (faiss's own bound for its warning)."""
EXACT_BELOW = 1024
"""Smaller sets are scanned exactly: too few vectors to train a product quantizer, and nothing to gain."""


class IndexConfig(StageConfig):
    """`[index]`."""

    shards: int = Field(2, ge=1)
    """Index shards: units of build, retry, checksum and search."""
    factory: str | None = None
    """A faiss factory string in place of the planned one; an IVF index, optionally behind one OPQ or PCA."""
    nprobe: int | None = Field(None, ge=1)
    """Lists visited for a query where the search names none; planned where not set."""
    refine: int = Field(4, ge=0)
    """The best refine * k candidates are rescored from float16 vectors; 0 keeps the codes' scores."""
    train_size: int = Field(262_144, ge=256)
    """Vectors that the index is trained on, sampled over all rows."""
    seed: int = 0
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """Parameters of one index. `ranges` are the database rows [start, stop) of each shard."""

    factory: str
    nlist: int
    nprobe: int
    code_bytes: int
    train_size: int
    ranges: tuple[tuple[int, int], ...]

    def summary(self, num_rows: int, dim: int) -> str:
        """One line for the log, with bytes a vector on disk (code + 8 for the id, and float16 for refinement)."""
        return (
            f"{self.factory} over {num_rows} x {dim}: {len(self.ranges)} shards, {self.code_bytes} + 8 B a vector in the "
            f"index and {2 * dim} B for refinement, trained on {self.train_size}, nprobe {self.nprobe}"
        )


def plan(num_rows: int, dim: int, config: IndexConfig) -> IndexPlan:
    """Choose factory, nlist, nprobe and the rows of each shard.

    nlist is the power of two next to 4 sqrt(n), as long as the training sample has 39 vectors a centroid. Codes take
    one byte for 4 dimensions, at most 64 bytes; OPQ reduces to 4 dimensions a byte. `np` turns polysemous training
    off, which costs twenty times the rest of the training and is not used.

    >>> plan(1_000_000, 2048, IndexConfig()).factory
    'OPQ64_256,IVF4096,PQ64np'
    >>> plan(500, 256, IndexConfig()).factory
    'IVF1,Flat'
    """
    train_size = min(num_rows, config.train_size)
    if config.factory is not None:
        factory, nlist = config.factory, _nlist_of(config.factory)
        code_bytes = _code_bytes(config.factory, dim)
    elif num_rows < EXACT_BELOW or dim < 4:
        factory, nlist, code_bytes = "IVF1,Flat", 1, 4 * dim
    else:
        nlist = 2 ** round(math.log2(4 * math.sqrt(num_rows)))
        while nlist * MIN_POINTS_PER_CENTROID > train_size:
            nlist //= 2
        code_bytes = 2 ** int(math.log2(min(64, dim // 4)))
        factory = f"OPQ{code_bytes}_{4 * code_bytes},IVF{nlist},PQ{code_bytes}np"
    nprobe = min(nlist, config.nprobe or max(8, nlist // 8))
    shards = min(config.shards, num_rows)
    cuts = [num_rows * i // shards for i in range(shards + 1)]
    return IndexPlan(factory, nlist, nprobe, code_bytes, train_size, tuple(pairwise(cuts)))


def _nlist_of(factory: str) -> int:
    found = re.search(r"(?:^|,)IVF(\d+)", factory)
    if not found:
        raise ConfigError(f"index.factory = {factory!r}: expected an IVF index, for example OPQ32_128,IVF1024,PQ32np")
    return int(found[1])


def _code_bytes(factory: str, dim: int) -> int:
    found = re.search(r",PQ(\d+)", factory)
    return int(found[1]) if found else 4 * dim
