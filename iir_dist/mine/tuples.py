"""A round of hard-negative mining: draw, embed, search, choose. See `iir_dist.train.mining` for what is drawn and chosen."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact, embed
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.data.stored import Stored
from iir_dist.errors import InputError
from iir_dist.mine.images import EMBEDDINGS, POOL, QUERIES, RANKINGS, lists, once, rank, write_pool, write_queries
from iir_dist.storage import Folder
from iir_dist.train.mining import Drawn, MiningConfig, depth, draw, nearest_of_other_classes, random_positives
from iir_dist.vectors import F32, I64

log = logging.getLogger(__name__)

FILE = "tuples.parquet"


def schema(negatives: int) -> pa.Schema:
    """Schema of the table of tuples: numbers in `data.cache.Photos`, names, and the cosines of the negatives."""
    return pa.schema(
        [
            ("query", pa.int64()), ("positive", pa.int64()), ("negatives", pa.list_(pa.int64(), negatives)),
            ("query_name", pa.string()), ("positive_name", pa.string()),
            ("negative_names", pa.list_(pa.string(), negatives)), ("negative_scores", pa.list_(pa.float32(), negatives)),
        ]
    )  # fmt: skip


class _Drawing(StageConfig):
    """What decides the images of a round."""

    round: int
    queries: int
    pool: int
    seed: int
    without: tuple[str, ...]
    execution: ClassVar[frozenset[str]] = frozenset()


class _Round(MiningConfig):
    """What decides its tuples."""

    round: int
    without: tuple[str, ...]
    embedding: dict[str, Any]


def mine(
    images: Sequence[str],
    encoder: str,
    work: str,
    round_number: int,
    config: MiningConfig,
    *,
    without: Collection[str] = (),
    embedding: embed.EmbedConfig | None = None,
) -> str:
    """The tuples of one round; the address of a Parquet file of `schema`, ordered by query.

    Args:
        images: images artifacts, in the order in which `data.cache.Photos` has them.
        encoder: of this round.
        work: folder of this round alone; a round that was cut off goes on there, a finished one is not done again.
        round_number: other queries and another pool are drawn in each.
        without: classes that are not trained on, such as those that are kept aside for validation.
        embedding: how to embed.

    Raises:
        InputError: the images have too few classes.
        MismatchError: the folder holds a round of another encoder, config or number.
    """
    embedding = embedding or embed.EmbedConfig()
    settings = _Round(
        round=round_number, without=tuple(sorted(without)), embedding=embedding.resolved(), **config.model_dump()
    )  # fmt: skip

    def make(job: artifact.Work, folder: Folder, sources: Sequence[tuple[Folder, Manifest]]) -> None:
        _round(job, folder, sources, encoder, settings, embedding)

    return once(images, encoder, work, FILE, settings, make)


def _round(
    job: artifact.Work,
    folder: Folder,
    sources: Sequence[tuple[Folder, Manifest]],
    encoder: str,
    config: _Round,
    embedding: embed.EmbedConfig,
) -> None:
    stored = Stored.read(sources)
    drawn = draw(stored.names, [None if x in config.without else x for x in stored.labels], config.round, config)
    log.info("mine: round %d, %d queries among %d images", config.round, len(drawn.queries), len(drawn.searched))

    pool = folder.child(POOL).uri
    settings = _Drawing(
        round=config.round, queries=config.queries, pool=config.pool, seed=config.seed, without=config.without
    )  # fmt: skip
    write_pool(pool, job.inputs["images"], stored, drawn.searched, settings)
    embed.run(pool, encoder, folder.child(EMBEDDINGS).uri, embedding)
    vectors = open_embeddings(folder.child(EMBEDDINGS).uri)
    queries, xq = write_queries(folder.child(QUERIES), vectors, drawn.queries)
    rank(folder, depth(drawn, config.negatives), exact=len(drawn.searched) <= config.exact_rows, seed=config.seed)
    positives = dict(
        zip(drawn.queries.tolist(), random_positives(drawn, config.round, config.seed).tolist(), strict=True)
    )
    if config.positive == "hardest":
        positives |= _hardest(vectors, queries, xq, drawn.classes)
    tuples = _tuples(folder.child(RANKINGS).uri, drawn, positives, stored.names, config.negatives)
    lost = len(drawn.queries) - len(tuples)
    if not len(tuples):
        raise InputError(
            f"none of {lost} queries has {config.negatives} negatives; ask for fewer, or for a larger mining.pool"
        )
    if lost:
        log.warning(
            "mine: %d of %d queries gave no tuple: not embedded, or too few neighbours", lost, len(drawn.queries)
        )
    mean = float(np.mean(tuples["negative_scores"].combine_chunks().flatten().to_numpy()))
    log.info("mine: %d tuples, mean cosine of a negative %.3f", len(tuples), mean)
    with job.folder.publish(FILE) as file:
        pq.write_table(tuples, file.path, compression="zstd")
    counts = {"tuples": len(tuples), "searched": len(drawn.searched), "lost": lost}
    job.publish(counts, {FILE: artifact.entry_of(file)}, {"negative_cosine": round(mean, 6)})


def _hardest(vectors: Embeddings, queries: I64, xq: F32, classes: I64) -> dict[int, int]:
    """The least similar image of each query's class among those that were embedded; of equal ones the first."""
    worst = np.full(len(queries), np.inf, np.float32)
    found = np.full(len(queries), -1, np.int64)
    order = np.argsort(classes[queries], kind="stable")
    sorted_classes = classes[queries][order]
    for block in vectors.blocks():
        assert block.vectors is not None
        for own in np.intersect1d(sorted_classes, classes[block.ids]):
            asking = order[slice(*np.searchsorted(sorted_classes, [own, own + 1]))]
            rows = np.flatnonzero(classes[block.ids] == own)
            scores = xq[asking] @ block.vectors[rows].T
            scores[queries[asking, None] == block.ids[rows]] = np.inf  # the query itself
            best = scores.argmin(axis=1)
            lowest = scores[np.arange(len(asking)), best]
            better = lowest < worst[asking]
            worst[asking[better]], found[asking[better]] = lowest[better], block.ids[rows[best[better]]]
    return {int(q): int(f) for q, f in zip(queries, found, strict=True) if f >= 0}


def _tuples(rankings: str, drawn: Drawn, positives: dict[int, int], names: list[str], negatives: int) -> pa.Table:
    """The table of `schema`; a query with too few other classes in its list is left out."""
    lines = []
    for query, ids, scores in lists(rankings):
        at = nearest_of_other_classes(drawn.classes[ids], drawn.classes[query], negatives)
        if len(at) == negatives:
            lines.append((query, ids[at], scores[at]))
    lines.sort(key=lambda line: line[0])
    columns = {
        "query": [q for q, _, _ in lines], "positive": [positives[q] for q, _, _ in lines],
        "negatives": [found.tolist() for _, found, _ in lines], "query_name": [names[q] for q, _, _ in lines],
        "positive_name": [names[positives[q]] for q, _, _ in lines],
        "negative_names": [[names[n] for n in found] for _, found, _ in lines],
        "negative_scores": [cosines.tolist() for _, _, cosines in lines],
    }  # fmt: skip
    return pa.table(columns, schema=schema(negatives))
