"""Mining of hard negatives by the stages themselves: draw, embed, search, choose.

A round is a small retrieval experiment on the training images, so it is made of the same stages: the drawn images are
copied into an images artifact, `embed` embeds them, `search` ranks them for every query, exactly or, where they are
many, by an index. All of them go on after an interruption; the last, the table of tuples, is written when the others
are done, and then these are deleted. Copying costs reading and writing the drawn images once, beside which embedding
all images of the set to use a part of them would cost most.

Fine-tuning is given `mine` by its caller, because stages do not import each other.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact, embed, session
from iir_dist.artifact import FileEntry, InputRef, Manifest, shard_name
from iir_dist.config import StageConfig
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.data.stored import Stored
from iir_dist.errors import InputError
from iir_dist.index import build, search
from iir_dist.index.plan import IndexConfig
from iir_dist.progress import Progress
from iir_dist.storage import Folder, open_folder
from iir_dist.train.mining import Drawn, MiningConfig, depth, draw, nearest_of_other_classes, random_positives
from iir_dist.vectors import F32, I64

log = logging.getLogger(__name__)

FILE = "tuples.parquet"
POOL, EMBEDDINGS, QUERIES, INDEX, RANKINGS = "pool", "embeddings", "queries", "index", "rankings"
"""Folders of a round that are deleted when it is done."""


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
    sources = [artifact.require(uri, "ingest") for uri in images]
    refs = {
        "images": artifact.combine(artifact.reference(*source) for source in sources),
        "encoder": artifact.reference(*artifact.require(encoder, *artifact.ENCODERS)),
    }
    folder = open_folder(work)
    settings = _Round(
        round=round_number, without=tuple(sorted(without)), embedding=embedding.resolved(), **config.model_dump()
    )  # fmt: skip
    with artifact.begin(folder.child("tuples").uri, "mine", settings, refs) as job:
        if job.finished is None:
            _round(job, folder, sources, encoder, settings, embedding)
    for name in (POOL, EMBEDDINGS, QUERIES, INDEX, RANKINGS):
        folder.delete_all(f"{name}/")
    return job.folder.address(FILE)


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

    def at(name: str) -> str:
        return folder.child(name).uri

    _write_pool(at(POOL), job.inputs["images"], stored, drawn.searched, config)
    embed.run(at(POOL), encoder, at(EMBEDDINGS), embedding)
    vectors = open_embeddings(at(EMBEDDINGS))
    queries, xq = _write_queries(folder.child(QUERIES), vectors, drawn.queries)
    database = at(EMBEDDINGS)
    if len(drawn.searched) > config.exact_rows:
        build.run([database], at(INDEX), IndexConfig(seed=config.seed))
        database = at(INDEX)
    search.run([database], [at(QUERIES)], at(RANKINGS), search.SearchConfig(k=depth(drawn, config.negatives)))
    positives = dict(
        zip(drawn.queries.tolist(), random_positives(drawn, config.round, config.seed).tolist(), strict=True)
    )
    if config.positive == "hardest":
        positives |= _hardest(vectors, queries, xq, drawn.classes)
    table = _tuples(at(RANKINGS), drawn, positives, stored.names, config.negatives)
    lost = len(drawn.queries) - len(table)
    if not len(table):
        raise InputError(
            f"none of {lost} queries has {config.negatives} negatives; ask for fewer, or for a larger mining.pool"
        )
    if lost:
        log.warning(
            "mine: %d of %d queries gave no tuple: not embedded, or too few neighbours", lost, len(drawn.queries)
        )
    mean = float(np.mean(table["negative_scores"].combine_chunks().flatten().to_numpy()))
    log.info("mine: %d tuples, mean cosine of a negative %.3f", len(table), mean)
    with job.folder.publish(FILE) as file:
        pq.write_table(table, file.path, compression="zstd")
    counts = {"tuples": len(table), "searched": len(drawn.searched), "lost": lost}
    job.publish(counts, {FILE: artifact.entry_of(file)}, {"negative_cosine": round(mean, 6)})


# ------------------------------------------------------------------------------------------------ images of a round


def _write_pool(out: str, images: InputRef, stored: Stored, searched: I64, config: _Round) -> None:
    """The drawn images as an images artifact, a shard for each shard they come from; ids and names are their numbers."""
    settings = _Drawing(
        round=config.round, queries=config.queries, pool=config.pool, seed=config.seed, without=config.without
    )  # fmt: skip
    with artifact.begin(out, "ingest", settings, {"images": images}) as work:
        if work.finished:
            return
        parts = []
        for folder, shard, entry, first, rows in stored.shards:
            low, high = np.searchsorted(searched, [first, first + len(rows)])
            if low < high:
                numbers = searched[low:high]
                parts.append((folder, shard, entry, rows[numbers - first], numbers))
        done = work.done()
        ray = session.connect()
        copy = ray.remote(_copy)
        with Progress("mine", len(searched), "images", done=sum(m.counts["rows"] for m in done.values())) as progress:
            tasks = {
                copy.remote(*part, work.folder, n): len(part[-1]) for n, part in enumerate(parts) if n not in done
            }  # fmt: skip
            try:
                while tasks:
                    for ref in ray.wait(list(tasks), num_returns=1)[0]:
                        session.result_of(ref)
                        progress.advance(tasks.pop(ref))
            finally:  # without the lock they would write into the next run
                for ref in tasks:
                    ray.cancel(ref, force=True)
                if tasks:
                    ray.wait(list(tasks), num_returns=len(tasks))
        work.publish({"rows": len(searched), "queries": 0}, info={"split": "train"}, shards=len(parts))


def _copy(source: Folder, shard: str, entry: FileEntry, rows: I64, numbers: I64, target: Folder, number: int) -> None:
    """Copy rows (ascending) of a shard, a row group at a time."""
    name = shard_name(number)
    with artifact.verified(source, shard, entry) as path, target.publish(name) as file:
        with (
            pq.ParquetFile(path, memory_map=True, pre_buffer=False) as parquet,
            pq.ParquetWriter(file.path, parquet.schema_arrow, compression="none", use_dictionary=["label", "split"],
                             write_statistics=["id", "name"]) as writer,
        ):  # fmt: skip
            first = 0
            for group in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(group).num_rows
                low, high = np.searchsorted(rows, [first, last])
                if low < high:
                    table = parquet.read_row_group(group, use_threads=False).take(pa.array(rows[low:high] - first))
                    writer.write_table(_renamed(table, numbers[low:high]))
                first = last
    artifact.commit(target, number, {name: artifact.entry_of(file)}, {"rows": len(rows)})


def _renamed(table: pa.Table, numbers: I64) -> pa.Table:
    """Their numbers as ids and names: names of several artifacts may be the same."""
    names = pa.array([str(n) for n in numbers])
    for column, values in (("id", pa.array(numbers)), ("name", names), ("split", pa.repeat("train", len(numbers)))):
        at = table.schema.get_field_index(column)
        table = table.set_column(at, table.schema.field(at), values)
    return table


def _write_queries(folder: Folder, vectors: Embeddings, queries: I64) -> tuple[I64, F32]:
    """The queries' vectors as an embeddings folder of their own, since they are searched too; numbers and vectors (nq, d)."""
    blocks = [block.take(np.isin(block.ids, queries)) for block in vectors.blocks()]
    numbers = np.concatenate([b.ids for b in blocks])
    xq = np.concatenate([b.vectors for b in blocks if b.vectors is not None])
    if not len(numbers):
        raise InputError(
            f"none of {len(queries)} queries could be embedded; see {vectors.folder.address('rejected.parquet')}"
        )
    columns = {
        "id": numbers, "name": [str(n) for n in numbers],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(xq.ravel()), xq.shape[1]),
    }  # fmt: skip
    with folder.publish("queries.parquet") as file:
        pq.write_table(pa.table(columns), file.path)
    return numbers, xq


# ------------------------------------------------------------------------------------------------ tuples


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
    folder, manifest = artifact.require(rankings, "search")
    lines = []
    for shard in manifest.shards():
        with artifact.verified(folder, shard, manifest.files[shard]) as path:
            table = pq.read_table(path, columns=["query", "id", "score"])
        asked = table["query"].cast(pa.int64()).to_numpy()
        ids, scores = table["id"].to_numpy(), table["score"].to_numpy()
        starts = np.flatnonzero(np.diff(asked, prepend=-1))  # lists are contiguous, best first
        for start, stop in zip(starts, [*starts[1:], len(asked)], strict=True):
            query = int(asked[start])
            at = start + nearest_of_other_classes(drawn.classes[ids[start:stop]], drawn.classes[query], negatives)
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
