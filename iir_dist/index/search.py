"""Search as a stage: rank an index, or embeddings exactly, for every query.

Both run in this process on all its cores; on a cluster of several nodes an index is searched by an actor a node, and
exact search is a task for each shard of embeddings.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest, read_manifest, shard_name
from iir_dist.config import StageConfig, fingerprint
from iir_dist.data.collection import check_same_space, open_collection, query_rows
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.index.engine import Index
from iir_dist.index.exact import Exact
from iir_dist.index.fanout import opened_on, searching_actors
from iir_dist.index.points import read_points, recall_of, report, stale
from iir_dist.index.rows import read_list, rows_of
from iir_dist.progress import Progress
from iir_dist.storage import Folder, open_folder
from iir_dist.vectors import F32, I64

log = logging.getLogger(__name__)

RANKINGS = pa.schema(
    [("query", pa.string()), ("rank", pa.int32()), ("id", pa.int64()), ("name", pa.string()), ("score", pa.float32())]
)
ROWS_PER_SHARD = 4_000_000
ROWS_PER_GROUP = 2**20
"""Rows that are made into a table at a time."""
INDEX_DEPTH = 1000
"""List depth of an index search where no k is given; exact search ranks everything."""


class SearchConfig(StageConfig):
    """`[search]`."""

    k: int | None = Field(None, ge=1)
    """List depth; where not set, exact search ranks the whole database and an index gives 1,000."""
    recall: float | None = Field(None, gt=0, le=1)
    """Take the cheapest operating point of the index that reaches this recall@10, in place of `nprobe` and `refine`."""
    nprobe: int | None = Field(None, ge=1)
    """Lists visited for a query; the index's own where not set."""
    refine: int | None = Field(None, ge=0)
    """Candidates rescored, as a multiple of k; the index's own where not set."""
    splits: tuple[str, ...] = ()
    """Search only rows of these splits; all where empty."""
    allow_partial: bool = False
    """Answer also without shards that are lost, and record which rows are missing."""
    verify: bool = False
    """Check every file of an index before the search, and not each shard before its first use."""
    workers: int | None = Field(None, ge=0)
    """Searching actors, 0 for this process; where not set, one a node of a cluster of several, else this process."""
    execution: ClassVar[frozenset[str]] = frozenset({"verify", "workers"})


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


# ------------------------------------------------------------------------------------------------ the stage


def run(
    database: list[str],
    queries: list[str],
    out: str,
    config: SearchConfig,
    *,
    only: str | None = None,
    force: bool = False,
) -> Manifest:
    """Rank the database for every query.

    Args:
        database: one index, or one or more embeddings folders, which means exact search.
        queries: embeddings folders; their rows of split `query`, or all where there is no such column.
        only: a list file (`rows.read_list`) of the names or ids to search in.

    Raises:
        InputError: the two are of different dimensions, there is no query, or no row to search in.
        MismatchError: they were made by different encoders.
        CorruptError: a file is not the one that was written.
        IirError: a shard is lost, and not `config.allow_partial`.
    """
    sources, query_names, xq = open_queries(queries)
    index_manifest = read_manifest(open_folder(database[0]))
    if index_manifest is not None and index_manifest.stage == "index":
        if len(database) > 1:
            raise InputError(f"{len(database)} databases given; expected one index, or embeddings folders")
        folder, index_manifest = artifact.require(database[0], "index")
        ref, info = artifact.reference(folder, index_manifest), index_manifest.info
        encoder, dim = info["encoder_fingerprint"], int(info["dim"])
    else:
        index_manifest = None
        collection, names = open_collection(database)
        ref, encoder, dim = collection.ref, collection.encoder, collection.dim
    _check_space(sources[0], encoder, dim, " ".join(database))
    refs = {"database": ref, "queries": artifact.combine(s.ref for s in sources)}
    chosen = read_list(only) if only else None
    if only:
        refs["only"] = InputRef(uri=only, fingerprint=fingerprint(chosen))
    with artifact.begin(out, "search", config, refs, force=force) as work, contextlib.ExitStack() as stack:
        if work.finished:
            return work.finished
        workers = searching_actors(config.workers)
        index = None
        if index_manifest is not None:
            # Of this manifest, which the rankings refer to; what is there now may have been changed meanwhile.
            index = stack.enter_context(
                opened_on(folder, index_manifest, workers, verify=config.verify, allow_partial=config.allow_partial)
            )
            names = index.names
        allowed = allowed_rows(names, config.splits, chosen, " ".join(database))
        counted = allowed if index is None else index.alive if allowed is None else allowed & index.alive
        num_rows = len(names) if counted is None else int(counted.sum())
        if num_rows == 0:
            raise InputError(f"{' '.join(database)} has no row left to search in; see --set splits= and --only")
        depth = min(config.k or (num_rows if index is None else INDEX_DEPTH), num_rows)
        step = max(1, min(1024, ROWS_PER_SHARD // depth))
        groups = {n: slice(start, min(start + step, len(xq))) for n, start in enumerate(range(0, len(xq), step))}
        done = work.done()
        pending = {n: group for n, group in groups.items() if n not in done}
        point = {} if index is None else _operating_point(index, config, everything=allowed is None)
        if index is not None:
            ranked = _ranked(index, xq, pending, depth, (point["nprobe"], point["refine"]), allowed)
        else:
            ranked = Exact(collection, on_ray=workers > 0).rank(xq, pending, depth, allowed)
        writer = RankingsWriter(work.folder, query_names, names)
        with Progress("search", len(xq), "queries", done=sum(m.counts["queries"] for m in done.values())) as progress:
            for number, scores, rows in ranked:
                writer.write(number, groups[number], scores, rows, index.missing if index is not None else [])
                progress.advance(len(scores))
        markers = work.done()
        missing = [list(r) for r in sorted({tuple(r) for m in markers.values() for r in m.info["missing"]})]
        result = {
            "exact": index is None, **point, "depth": depth, "database_rows": num_rows, "missing": missing,
            "encoder_fingerprint": encoder, "dim": dim,
            "encoder": sources[0].manifest.info["encoder"] if sources[0].manifest else None,
        }  # fmt: skip
        counts = {key: sum(m.counts[key] for m in markers.values()) for key in ("queries", "rows")}
        return work.publish(counts, info=result, shards=len(groups))


def _operating_point(index: Index, config: SearchConfig, *, everything: bool) -> dict[str, Any]:
    """nprobe, refine and, where all rows are searched and it is known, the recall@10 that was measured with them."""
    info = index.manifest.info
    if config.recall is None:
        nprobe = info["nprobe"] if config.nprobe is None else config.nprobe
        refine = info["refine"] if config.refine is None else config.refine
    else:
        nprobe, refine = _reaching(index, config)
    recall = recall_of(index.folder, index.manifest, nprobe, refine) if everything else {}
    return {"nprobe": nprobe, "refine": refine} | ({"recall": recall} if recall else {})


def _reaching(index: Index, config: SearchConfig) -> tuple[int, int]:
    """nprobe and refine of the cheapest point that reaches a recall."""
    assert config.recall is not None
    if config.nprobe is not None or config.refine is not None:
        raise ConfigError(
            f"search.recall = {config.recall:g} chooses nprobe and refine; expected either it, or search.nprobe and "
            "search.refine"
        )
    points = read_points(index.folder, index.manifest)
    point = points.reaching(config.recall)
    log.info("search: %s", report(points, point))
    if point.worst < config.recall:
        log.warning(
            "search: recall@10 %g was not reached by any operating point, the best has %.3f; build with a higher "
            "index.recall, or search exactly", config.recall, point.worst,
        )  # fmt: skip
    if stale(index.manifest):
        log.warning(
            "search: the index has changed since its recall was measured: iir index --out %s --measure",
            index.folder.uri,
        )
    return point.nprobe, point.refine


def allowed_rows(
    names: pa.Table, splits: Sequence[str], chosen: tuple[list[str], list[int]] | None, where: str
) -> npt.NDArray[np.bool_] | None:
    """The rows to search in, as a mask; None for all."""
    mask = None
    if splits:
        known = pc.unique(names["split"]).to_pylist()
        unknown = sorted(set(splits) - set(known))
        if unknown:
            raise InputError(f"{where} has no row of split {unknown[0]!r}; it has {', '.join(sorted(known))}")
        mask = pc.is_in(names["split"], value_set=pa.array(splits, pa.string())).to_numpy(zero_copy_only=False)
    if chosen is not None:
        only = np.zeros(len(names), bool)
        only[rows_of(names, *chosen, where)] = True
        mask = only if mask is None else mask & only
    return mask


def _ranked(
    index: Index,
    xq: F32,
    groups: Mapping[int, slice],
    depth: int,
    point: tuple[int, int],
    allowed: npt.NDArray[np.bool_] | None,
) -> Iterator[tuple[int, F32, I64]]:
    for number, group in groups.items():
        yield number, *index.search(xq[group], depth, *point, allowed)


def _check_space(queries: Embeddings, encoder: str | None, dim: int, where: str) -> None:
    if queries.encoder and encoder and queries.encoder != encoder:
        raise MismatchError(
            f"the queries were made by encoder {queries.encoder[:12]}, {where} by {encoder[:12]}; embed both with one"
        )
    if queries.dim != dim:
        raise InputError(f"the queries have dimension {queries.dim}, {where} has {dim}; embed both with one encoder")


class RankingsWriter:
    """Writes rankings shards; holds the names of the database once."""

    def __init__(self, folder: Folder, queries: list[str], names: pa.Table) -> None:
        self.folder = folder
        self.queries = pa.array(queries, pa.string())
        self.ids = names["id"].to_numpy()
        # In one piece, because Arrow takes rows of one piece faster; large, because that may exceed 2 GB.
        self.names = pa.concat_arrays(names["name"].cast(pa.large_string()).chunks)

    def write(self, number: int, group: slice, scores: F32, rows: I64, missing: list[list[int]], **more: Any) -> None:
        """Write and commit the lists of a group of queries; `more` goes into the marker."""
        step = max(1, ROWS_PER_GROUP // rows.shape[1])
        with self.folder.publish(shard_name(number)) as file:
            with pq.ParquetWriter(file.path, RANKINGS, compression="zstd", use_dictionary=["query"]) as writer:
                for start in range(0, len(rows), step):
                    part = slice(start, start + step)
                    writer.write_table(self._table(group.start + start, scores[part], rows[part]))
        counts = {"queries": len(rows), "rows": int((rows >= 0).sum())}
        files = {shard_name(number): artifact.entry_of(file)}
        artifact.commit(self.folder, number, files, counts, {"missing": missing, **more})

    def _table(self, first: int, scores: F32, rows: I64) -> pa.Table:
        query, rank = np.nonzero(rows >= 0)
        found = rows[query, rank]
        columns: dict[str, Any] = {
            "query": self.queries.take(pa.array(first + query)), "rank": rank.astype(np.int32), "id": self.ids[found],
            "name": self.names.take(pa.array(found)).cast(pa.string()), "score": scores[query, rank],
        }  # fmt: skip
        return pa.table(columns, schema=RANKINGS)
