"""A set of images cut into parts by shards, so that a node which trains on it need hold no more than a part of it.

All of it is a function of the shards' counts: whoever computes it, and however many workers there are, the parts are the
same, so that copies which a node has made stay of use. Numbers of photos are those of `data.cache.Photos` of the whole set.
"""

from __future__ import annotations

import heapq
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist.artifact import Manifest
from iir_dist.errors import CorruptError, InputError
from iir_dist.storage import Folder
from iir_dist.vectors import I64

SHARDS_AT_ONCE = 16


def photo_counts(sources: Sequence[tuple[Folder, Manifest]]) -> list[int]:
    """Photos of each shard of several images artifacts, in order, queries left out; a few kB of each shard are read.

    Raises:
        CorruptError: a shard is no Parquet file.
    """
    shards = [(folder, name) for folder, manifest in sources for name in manifest.shards()]
    with ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="iir-count") as pool:
        return list(pool.map(lambda shard: _count(*shard), shards))


def _count(folder: Folder, name: str) -> int:
    with folder.open(name) as file:
        # Not through the buffer: of a remote shard it reads megabytes ahead for every page of a few bytes.
        raw = cast(io.BufferedReader, file).raw
        try:
            split = pq.read_table(pa.PythonFile(raw, "r"), columns=["split"], use_threads=False)["split"]
        except pa.ArrowInvalid as error:
            raise CorruptError(
                f"{folder.address(name)} cannot be read ({error}); run iir verify {folder.uri}"
            ) from error
    return pc.sum(pc.not_equal(split, "query")).as_py() or 0


def deal(counts: Sequence[int], parts: int) -> list[list[int]]:
    """The shards of each part, ascending; parts differ by no more photos than the largest shard has.

    Shards go, the largest first, to the part that has the fewest photos so far; so those of one size go round, and a set
    that lies in order of its classes is spread over all parts.

    Raises:
        InputError: there are fewer shards than parts.

    >>> deal([4, 4, 4, 4, 3], 2)
    [[0, 2, 4], [1, 3]]
    """
    if len(counts) < parts:
        raise InputError(
            f"the images lie in {len(counts)} shards, which cannot make {parts} parts; ask for fewer, or ingest with a "
            "smaller ingest.shard_mb"
        )
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sizes = [(0, part) for part in range(parts)]  # a heap
    for shard in sorted(range(len(counts)), key=lambda shard: -counts[shard]):
        size, part = sizes[0]
        dealt[part].append(shard)
        heapq.heapreplace(sizes, (size + counts[shard], part))
    return [sorted(shards) for shards in dealt]


def numbers(counts: Sequence[int], shards: Sequence[int]) -> I64:
    """Numbers of the photos of some shards.

    >>> numbers([2, 3, 1], [0, 2]).tolist()
    [0, 1, 5]
    """
    starts = np.cumsum([0, *counts])
    return np.concatenate([np.arange(starts[s], starts[s + 1], dtype=np.int64) for s in shards])


def slots(batch: int, parts: int) -> list[tuple[int, int]]:
    """Positions [start, stop) of a global batch that each part fills; uneven ones differ by one.

    >>> slots(5, 2)
    [(0, 2), (2, 5)]
    """
    return [(batch * part // parts, batch * (part + 1) // parts) for part in range(parts)]
