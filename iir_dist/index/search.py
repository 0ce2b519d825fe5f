"""Search: fan out over Ray, merge with larger-is-better.

Index: the coarse assignment is made once for each query; shards scan their codes; the best refine * k of all shards
together are rescored by the shards that own them. Candidates are cut after the merge and not in each shard, so N
shards give what one would. Exact: inner products with every database vector, block by block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact, session
from iir_dist.artifact import Manifest, read_manifest, shard_name
from iir_dist.config import StageConfig
from iir_dist.data.collection import Collection, check_same_space, open_collection, query_rows
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.index.build import NAMES_FILE, TEMPLATE
from iir_dist.index.shard import Coarse, Shard
from iir_dist.progress import Progress
from iir_dist.storage import Folder, open_folder
from iir_dist.vectors import F32, I64, merge_top_k, top_k

log = logging.getLogger(__name__)

RANKINGS = pa.schema(
    [("query", pa.string()), ("rank", pa.int32()), ("id", pa.int64()), ("name", pa.string()), ("score", pa.float32())]
)
ROWS_PER_SHARD = 4_000_000
INDEX_DEPTH = 1000
"""List depth of an index search where no k is given; exact search ranks everything."""

Search = Callable[[F32, int], tuple[F32, I64]]
"""(xq, k) -> scores and database rows, best first; row -1 where there are fewer than k."""


class SearchConfig(StageConfig):
    """`[search]`."""

    k: int | None = Field(None, ge=1)
    """List depth; where not set, exact search ranks the whole database and an index gives 1,000."""
    nprobe: int | None = Field(None, ge=1)
    """Lists visited for a query; the index's own where not set."""
    refine: int | None = Field(None, ge=0)
    """Candidates rescored, as a multiple of k; the index's own where not set."""
    execution: ClassVar[frozenset[str]] = frozenset()


def open_queries(uris: Sequence[str]) -> tuple[tuple[Embeddings, ...], list[str], F32]:
    """Sources, names and vectors (nq, d) of the queries, sorted by name.

    Raises:
        InputError: there is none, or two have one name.
    """
    sources = tuple(open_embeddings(uri) for uri in uris)
    check_same_space(sources)
    blocks = [query_rows(block) for source in sources for block in source.blocks()]
    names = np.concatenate([b.names for b in blocks])
    xq = np.concatenate([b.vectors for b in blocks if b.vectors is not None])
    if not len(names):
        raise InputError(
            f"{' '.join(uris)} holds no row of split 'query'; ingest the photos to search with by --split query or "
            "--groundtruth, or drop the column"
        )
    if len(set(names)) != len(names):
        raise InputError(f"{' '.join(uris)} holds {len(names) - len(set(names))} queries of the same name")
    order = np.argsort(names, kind="stable")
    return sources, [str(n) for n in names[order]], np.ascontiguousarray(xq[order])


# ------------------------------------------------------------------------------------------------ exact


def exact_part(collection: Collection, start: int, stop: int, xq: F32, k: int) -> tuple[F32, I64]:
    """Top k of database rows [start, stop)."""
    best: tuple[F32, I64] | None = None
    for first, xb in collection.vectors(start, stop):
        scores = np.asarray(xq @ xb.T, np.float32)
        found = top_k(scores, np.arange(first, first + len(xb)), k, larger_is_better=True)
        best = found if best is None else merge_top_k([best, found], k, larger_is_better=True)
    assert best is not None
    return best


def exact_search(collection: Collection) -> Search:
    """Search every vector, a task for each group of shards."""
    ray = session.connect()
    task = ray.remote(exact_part)
    bounds = [(s.start, s.start + s.count) for s in collection.segments]

    def search(xq: F32, k: int) -> tuple[F32, I64]:
        queries = ray.put(xq)
        refs = [task.remote(collection, start, stop, queries, k) for start, stop in bounds]
        return merge_top_k([session.result_of(ref) for ref in refs], k, larger_is_better=True)

    return search


# ------------------------------------------------------------------------------------------------ index


def ivf_search(coarse: Coarse, scan: Any, rescore: Any, nprobe: int, refine: int) -> Search:
    """Search over shards given as two functions; pure but for them.

    Args:
        scan: (xt, lists, coarse scores, k) -> a list of (scores, rows), one a shard.
        rescore: (xq, rows) -> a list of scores, one a shard, -inf where the row is another shard's.
    """

    def search(xq: F32, k: int) -> tuple[F32, I64]:
        xt, lists, centroid_scores = coarse.assign(xq, nprobe)
        depth = k * max(1, refine)
        scores, rows = merge_top_k(scan(xt, lists, centroid_scores, depth), depth, larger_is_better=True)
        if refine:
            exact = np.max(np.stack(rescore(xq, rows)), axis=0)
            scores, rows = top_k(exact, rows, k, larger_is_better=True)
        return scores[:, :k], rows[:, :k]

    return search


def index_search(folder: Folder, manifest: Manifest, nprobe: int | None, refine: int | None) -> Search:
    """Search an index with an actor for each shard.

    Raises:
        CorruptError: a file is not the one that was written.
        MismatchError: a shard comes from another template.
    """
    ray = session.connect()
    info = manifest.info
    for number, shard in enumerate(info["shards"]):
        if shard["template"] != info["template"]:
            raise MismatchError(
                f"{folder.address(shard_name(number, '.faiss'))} was filled from template {shard['template'][:12]}, the "
                f"index's is {info['template'][:12]}; scores of the two cannot be compared: build the index again"
            )
    nprobe = nprobe or int(info["nprobe"])
    if nprobe > info["nlist"]:
        raise ConfigError(f"search.nprobe = {nprobe}: the index has {info['nlist']} lists; expected at most that")
    actor = ray.remote(num_cpus=0)(Shard)
    shards = [
        actor.remote(folder, number, tuple(shard["rows"]), info["dim"], manifest.files)
        for number, shard in enumerate(info["shards"])
    ]
    for ref in [shard.open.remote() for shard in shards]:
        session.result_of(ref)

    def scan(xt: F32, lists: I64, scores: F32, k: int) -> list[Any]:
        arguments = [ray.put(a) for a in (xt, lists, scores)]
        return [session.result_of(ref) for ref in [s.scan.remote(*arguments, k) for s in shards]]

    def rescore(xq: F32, rows: I64) -> list[Any]:
        arguments = [ray.put(a) for a in (xq, rows)]
        return [session.result_of(ref) for ref in [s.rescore.remote(*arguments) for s in shards]]

    coarse = Coarse(folder, manifest.files[TEMPLATE])
    return ivf_search(coarse, scan, rescore, nprobe, int(info["refine"]) if refine is None else refine)


# ------------------------------------------------------------------------------------------------ the stage


def run(database: list[str], queries: list[str], out: str, config: SearchConfig, *, force: bool = False) -> Manifest:
    """Rank the database for every query.

    Args:
        database: one index, or one or more embeddings folders, which means exact search.
        queries: embeddings folders; their rows of split `query`, or all where there is no such column.
    """
    sources, query_names, xq = open_queries(queries)
    index_manifest = read_manifest(open_folder(database[0]))
    if index_manifest is not None and index_manifest.stage == "index":
        if len(database) > 1:
            raise InputError(f"{len(database)} databases given; expected one index, or embeddings folders")
        folder, index_manifest = artifact.require(database[0], "index")
        artifact.check_file(folder, NAMES_FILE, index_manifest.files[NAMES_FILE])
        with folder.local(NAMES_FILE) as path:
            names = pq.read_table(path)
        database_ref = artifact.reference(folder, index_manifest)
        encoder, dim, num_rows = index_manifest.info["encoder_fingerprint"], index_manifest.info["dim"], len(names)
        depth = min(config.k or INDEX_DEPTH, num_rows)
    else:
        collection, names = open_collection(database)
        database_ref, encoder, dim, num_rows = collection.ref, collection.encoder, collection.dim, len(names)
        depth = min(config.k or num_rows, num_rows)
    _check_space(sources[0], encoder, dim, " ".join(database))
    refs = {"database": database_ref, "queries": artifact.combine(s.ref for s in sources)}
    with artifact.begin(out, "search", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        if index_manifest is not None and index_manifest.stage == "index":
            search = index_search(folder, index_manifest, config.nprobe, config.refine)
        else:
            search = exact_search(collection)
        step = max(1, min(1024, ROWS_PER_SHARD // depth))
        starts = range(0, len(xq), step)
        done = work.done()
        with Progress("search", len(xq), "queries", done=sum(m.counts["queries"] for m in done.values())) as progress:
            for number, start in enumerate(starts):
                if number in done:
                    continue
                batch = slice(start, start + step)
                scores, rows = search(xq[batch], depth)
                table = pa.concat_tables(_tables(query_names[batch], scores, rows, names))
                with work.folder.publish(shard_name(number)) as file:
                    pq.write_table(table, file.path, compression="zstd")
                counts = {"queries": len(scores), "rows": len(table)}
                artifact.commit(work.folder, number, {shard_name(number): artifact.entry_of(file)}, counts)
                progress.advance(len(scores))
        markers = work.done()
        info = {
            "exact": index_manifest is None or index_manifest.stage != "index", "depth": depth, "database_rows": num_rows,
            "encoder_fingerprint": encoder, "dim": dim,
            "encoder": sources[0].manifest.info["encoder"] if sources[0].manifest else None,
        }  # fmt: skip
        counts = {key: sum(m.counts[key] for m in markers.values()) for key in ("queries", "rows")}
        return work.publish(counts, info=info, shards=len(starts))


def _check_space(queries: Embeddings, encoder: str | None, dim: int, where: str) -> None:
    if queries.encoder and encoder and queries.encoder != encoder:
        raise MismatchError(
            f"the queries were made by encoder {queries.encoder[:12]}, {where} by {encoder[:12]}; embed both with one"
        )
    if queries.dim != dim:
        raise InputError(f"the queries have dimension {queries.dim}, {where} has {dim}; embed both with one encoder")


def _tables(queries: list[str], scores: F32, rows: I64, names: pa.Table) -> Iterator[pa.Table]:
    ids, labels = names.column("id").to_numpy(), names.column("name")
    for query, s, r in zip(queries, scores, rows, strict=True):
        r, s = r[r >= 0], s[r >= 0]
        n = len(r)
        columns = {
            "query": pa.array([query] * n, pa.string()), "rank": np.arange(n, dtype=np.int32), "id": ids[r],
            "name": labels.take(pa.array(r)), "score": s,
        }  # fmt: skip
        yield pa.table(columns, schema=RANKINGS)
