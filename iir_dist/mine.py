"""Mining by the stages themselves: hard negatives for fine-tuning (draw, embed, search, choose), neighbours for insclr.

A round is a small retrieval experiment on the training images, so it is made of the same stages: the drawn images are
copied into an images artifact, `embed` embeds them, `search` ranks them for every query, exactly or, where they are
many, by an index. All of them go on after an interruption; the last, the table of tuples, is written when the others
are done, and then these are deleted. Copying costs reading and writing the drawn images once, beside which embedding
all images of the set to use a part of them would cost most. For neighbours all images are embedded and searched for;
they are copied only where they are of several artifacts, whose ids would be the same.

Trainings are given `mine` and `neighbours` by their caller, because stages do not import each other.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
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
from iir_dist.train.neighbours import schema as neighbours_schema
from iir_dist.vectors import F32, I64

log = logging.getLogger(__name__)

FILE, NEIGHBOURS = "tuples.parquet", "neighbours.parquet"
POOL, EMBEDDINGS, QUERIES, INDEX, RANKINGS = "pool", "embeddings", "queries", "index", "rankings"
"""Folders of a round that are deleted when it is done."""
ROWS_PER_GROUP = 2**14
"""Of the table of neighbours."""


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

    pool = folder.child(POOL).uri
    settings = _Drawing(
        round=config.round, queries=config.queries, pool=config.pool, seed=config.seed, without=config.without
    )  # fmt: skip
    _write_pool(pool, job.inputs["images"], stored, drawn.searched, settings)
    embed.run(pool, encoder, folder.child(EMBEDDINGS).uri, embedding)
    vectors = open_embeddings(folder.child(EMBEDDINGS).uri)
    queries, xq = _write_queries(folder.child(QUERIES), vectors, drawn.queries)
    _rank(folder, depth(drawn, config.negatives), exact=len(drawn.searched) <= config.exact_rows, seed=config.seed)
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


def _rank(folder: Folder, k: int, *, exact: bool, seed: int) -> None:
    """A round's vectors, searched by its queries exactly or by an index."""
    database = folder.child(EMBEDDINGS).uri
    if not exact:
        build.run([database], folder.child(INDEX).uri, IndexConfig(seed=seed))
        database = folder.child(INDEX).uri
    queries, rankings = folder.child(QUERIES).uri, folder.child(RANKINGS).uri
    search.run([database], [queries], rankings, search.SearchConfig(k=k))


# ------------------------------------------------------------------------------------------------ neighbours of all images


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
    sources = [artifact.require(uri, "ingest") for uri in images]
    refs = {
        "images": artifact.combine(artifact.reference(*source) for source in sources),
        "encoder": artifact.reference(*artifact.require(encoder, *artifact.ENCODERS)),
    }
    folder = open_folder(work)
    settings = _Search(candidates=candidates, exact_rows=exact_rows, seed=seed, embedding=embedding.resolved())
    with artifact.begin(folder.child("neighbours").uri, "mine", settings, refs) as job:
        if job.finished is None:
            _find(job, folder, sources, encoder, settings, embedding)
    for name in (POOL, EMBEDDINGS, QUERIES, INDEX, RANKINGS):
        folder.delete_all(f"{name}/")
    return job.folder.address(NEIGHBOURS)


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
        _write_pool(pool, job.inputs["images"], stored, everything, config)
    embed.run(pool, encoder, folder.child(EMBEDDINGS).uri, embedding)
    vectors = open_embeddings(folder.child(EMBEDDINGS).uri)
    numbers, x = _write_queries(folder.child(QUERIES), vectors, everything)
    if len(numbers) < n:
        name = stored.names[np.setdiff1d(everything, numbers)[0]]
        raise InputError(f"{n - len(numbers)} of {n} images cannot be embedded, first {name!r}; ingest without them")
    _rank(folder, k + 1, exact=n <= config.exact_rows, seed=config.seed)  # one more, because each finds itself
    found, cosines = np.full((n, k), -1, np.int32), np.full((n, k), np.nan, np.float32)
    for query, ids, scores in _lists(folder.child(RANKINGS).uri):
        others = np.flatnonzero(ids != query)[:k]
        found[query, : len(others)], cosines[query, : len(others)] = ids[others], scores[others]
    with job.folder.publish(NEIGHBOURS) as file:
        _write_neighbours(file.path, stored.names, found, cosines, x[np.argsort(numbers)])
    nearest, last = float(np.nanmean(cosines[:, 0])), float(np.nanmean(cosines[:, -1]))
    log.info("mine: neighbours of %d images, mean cosine of the first %.3f, of number %d %.3f", n, nearest, k, last)
    info = {"nearest_cosine": round(nearest, 6), "last_cosine": round(last, 6)}
    job.publish({"images": n, "candidates": k}, {NEIGHBOURS: artifact.entry_of(file)}, info)


def _numbered(source: tuple[Folder, Manifest], n: int) -> bool:
    """Whether the ids of an images artifact, none of them a query, are its images' numbers."""
    folder, manifest = source
    parts = []
    for shard in manifest.shards():
        with folder.open(shard) as file:
            parts.append(pq.read_table(file, columns=["id"])["id"].to_numpy())
    return np.array_equal(np.concatenate(parts), np.arange(n))


def _write_neighbours(path: Path, names: list[str], found: np.ndarray[Any, Any], cosines: F32, x: F32) -> None:
    schema = neighbours_schema(found.shape[1], x.shape[1])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(names), ROWS_PER_GROUP):
            rows = slice(start, start + ROWS_PER_GROUP)
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(part[rows].ravel()), part.shape[1])
                for part in (found, cosines, x)
            ]
            writer.write_table(pa.table([pa.array(names[rows]), *lists], schema=schema))


# ------------------------------------------------------------------------------------------------ images of a round


def _write_pool(out: str, images: InputRef, stored: Stored, searched: I64, settings: StageConfig) -> None:
    """The drawn images as an images artifact, a shard for each shard they come from; ids and names are their numbers.

    Args:
        settings: what decides which images they are.
    """
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


def _lists(rankings: str) -> Iterator[tuple[int, I64, F32]]:
    """Each query's number with the ids and scores of its list, best first."""
    folder, manifest = artifact.require(rankings, "search")
    for shard in manifest.shards():
        with artifact.verified(folder, shard, manifest.files[shard]) as path:
            ranked = pq.read_table(path, columns=["query", "id", "score"])
        asked = ranked["query"].cast(pa.int64()).to_numpy()
        ids, scores = ranked["id"].to_numpy(), ranked["score"].to_numpy()
        starts = np.flatnonzero(np.diff(asked, prepend=-1))  # lists are contiguous
        for start, stop in zip(starts, [*starts[1:], len(asked)], strict=True):
            yield int(asked[start]), ids[start:stop], scores[start:stop]


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
    lines = []
    for query, ids, scores in _lists(rankings):
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
