"""The nearest neighbours of every image of a set, which InsCLR learns from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact, embed
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.embeddings import open_embeddings
from iir_dist.data.stored import Stored
from iir_dist.errors import InputError
from iir_dist.mine.images import EMBEDDINGS, POOL, QUERIES, RANKINGS, lists, once, rank, write_pool, write_queries
from iir_dist.storage import Folder
from iir_dist.train.neighbours import schema
from iir_dist.vectors import F32

log = logging.getLogger(__name__)

FILE = "neighbours.parquet"
ROWS_PER_GROUP = 2**14


class _Search(StageConfig):
    """What decides the neighbours."""

    candidates: int
    exact_rows: int
    seed: int
    embedding: dict[str, Any]


def neighbours(
    images: Sequence[str],
    encoder: str,
    work: str,
    *,
    candidates: int,
    exact_rows: int,
    seed: int,
    embedding: embed.EmbedConfig | None = None,
) -> str:
    """The nearest neighbours of every image; the address of a Parquet file of `train.neighbours.schema`.

    Args:
        images: images artifacts, in the order in which `data.cache.Photos` has them.
        encoder: of this round.
        work: folder of this round alone; what was cut off goes on there, what is finished is not done again.
        candidates: neighbours of each; of a smaller set, all others.
        exact_rows: up to so many images the search is exact; beyond, an index is built for it.
        embedding: how to embed.

    Raises:
        InputError: there are fewer than two images, or one cannot be embedded.
        MismatchError: the folder holds neighbours of another encoder, or others.
    """
    embedding = embedding or embed.EmbedConfig()
    settings = _Search(candidates=candidates, exact_rows=exact_rows, seed=seed, embedding=embedding.resolved())

    def make(job: artifact.Work, folder: Folder, sources: Sequence[tuple[Folder, Manifest]]) -> None:
        _find(job, folder, sources, encoder, settings, embedding)

    return once(images, encoder, work, FILE, settings, make)


def _find(
    job: artifact.Work,
    folder: Folder,
    sources: Sequence[tuple[Folder, Manifest]],
    encoder: str,
    config: _Search,
    embedding: embed.EmbedConfig,
) -> None:
    stored = Stored.read(sources)
    n = len(stored.names)
    if n < 2:
        raise InputError(f"{n} images; expected two or more, to be neighbours")
    k, everything = min(config.candidates, n - 1), np.arange(n)
    pool = sources[0][0].uri
    if len(sources) > 1 or not _numbered(sources[0], n):
        pool = folder.child(POOL).uri
        write_pool(pool, job.inputs["images"], stored, everything, config)
    embed.run(pool, encoder, folder.child(EMBEDDINGS).uri, embedding)
    vectors = open_embeddings(folder.child(EMBEDDINGS).uri)
    numbers, x = write_queries(folder.child(QUERIES), vectors, everything)
    if len(numbers) < n:
        name = stored.names[np.setdiff1d(everything, numbers)[0]]
        raise InputError(f"{n - len(numbers)} of {n} images cannot be embedded, first {name!r}; ingest without them")
    rank(folder, k + 1, exact=n <= config.exact_rows, seed=config.seed)  # one more, because each finds itself
    found, cosines = np.full((n, k), -1, np.int32), np.full((n, k), np.nan, np.float32)
    for query, ids, scores in lists(folder.child(RANKINGS).uri):
        others = np.flatnonzero(ids != query)[:k]
        found[query, : len(others)], cosines[query, : len(others)] = ids[others], scores[others]
    with job.folder.publish(FILE) as file:
        _write_neighbours(file.path, stored.names, found, cosines, x[np.argsort(numbers)])
    nearest, last = float(np.nanmean(cosines[:, 0])), float(np.nanmean(cosines[:, -1]))
    log.info("mine: neighbours of %d images, mean cosine of the first %.3f, of number %d %.3f", n, nearest, k, last)
    info = {"nearest_cosine": round(nearest, 6), "last_cosine": round(last, 6)}
    job.publish({"images": n, "candidates": k}, {FILE: artifact.entry_of(file)}, info)


def _numbered(source: tuple[Folder, Manifest], n: int) -> bool:
    """Whether the ids of an images artifact, none of them a query, are its images' numbers."""
    folder, manifest = source
    parts = []
    for shard in manifest.shards():
        with folder.open(shard) as file:
            parts.append(pq.read_table(file, columns=["id"])["id"].to_numpy())
    return np.array_equal(np.concatenate(parts), np.arange(n))


def _write_neighbours(path: Path, names: list[str], found: np.ndarray[Any, Any], cosines: F32, x: F32) -> None:
    fields = schema(found.shape[1], x.shape[1])
    with pq.ParquetWriter(path, fields, compression="zstd") as writer:
        for start in range(0, len(names), ROWS_PER_GROUP):
            rows = slice(start, start + ROWS_PER_GROUP)
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(part[rows].ravel()), part.shape[1])
                for part in (found, cosines, x)
            ]
            writer.write_table(pa.table([pa.array(names[rows]), *lists], schema=fields))
