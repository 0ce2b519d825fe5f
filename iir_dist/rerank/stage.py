"""Re-ranking as a stage: rankings that search wrote, re-ranked with the vectors of the database that was searched.

A shard of the rankings is a shard of the result, so that a run that was killed goes on with the shards that are left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import Manifest, read_manifest
from iir_dist.config import fingerprint
from iir_dist.data.collection import open_collection
from iir_dist.errors import InputError, MismatchError
from iir_dist.index.engine import opened
from iir_dist.index.rows import read_list
from iir_dist.index.search import RankingsWriter, allowed_rows, open_queries
from iir_dist.progress import Progress
from iir_dist.rerank.expansion import QueryExpansion
from iir_dist.rerank.interface import expand, rerank
from iir_dist.rerank.method import Method
from iir_dist.rerank.sources import CollectionSource, IndexSource
from iir_dist.storage import Folder, open_folder
from iir_dist.vectors import F32, I64


def run(
    rankings: str, database: Sequence[str], queries: Sequence[str], out: str, config: Method, *, force: bool = False
) -> Manifest:
    """Re-rank every list.

    Args:
        rankings: what search wrote.
        database: the index, or the embeddings folders, that were searched.
        queries: the embeddings of the queries that were searched with.
        config: the method; a second search has the settings of the first.

    Raises:
        InputError: one of them is not what it should be.
        MismatchError: the rankings are of another database or of other queries.
        CorruptError: a file is not the one that was written.
    """
    folder, searched = artifact.require(rankings, "search")
    sources, query_names, xq = open_queries(queries)
    found = _Database(database)
    refs = {
        "rankings": artifact.reference(folder, searched), "database": found.ref,
        "queries": artifact.combine(s.ref for s in sources),
    }  # fmt: skip
    if "only" in searched.inputs:
        refs["only"] = searched.inputs["only"]
    for role in ("database", "queries"):
        if refs[role].fingerprint != searched.inputs[role].fingerprint:
            raise MismatchError(
                f"{rankings} was searched with {role} {searched.inputs[role].uri} "
                f"({searched.inputs[role].fingerprint[:12]}), {refs[role].uri} is {refs[role].fingerprint[:12]}; give the "
                "same, or search again"
            )
    with artifact.begin(out, "rerank", config, refs, force=force) as work, contextlib.ExitStack() as stack:
        if work.finished:
            return work.finished
        source, names = found.open(stack, searched)
        lists = _Lists(folder, searched, query_names, names)
        writer = RankingsWriter(work.folder, query_names, names)
        done = work.done()
        pending = {number: group for number, group in enumerate(lists.groups) if number not in done}
        if isinstance(source, IndexSource):
            source.open(codes=_again(config) is not None)
        clock = _Clock(lists)
        with Progress("rerank", len(xq), "queries", done=sum(m.counts["queries"] for m in done.values())) as progress:
            for number, scores, rows in _reranked(config, xq, lists, source, pending):
                seconds = clock.stop()
                writer.write(number, lists.groups[number], scores, rows, source.missing, rerank_seconds=seconds)
                progress.advance(len(scores))
                clock.start()
        markers = work.done().values()
        missing = {tuple(r) for r in (*searched.info["missing"], *(r for m in markers for r in m.info["missing"]))}
        seconds = sum(m.info["rerank_seconds"] for m in markers)
        info = {
            **searched.info, "missing": [list(r) for r in sorted(missing)], "search": searched.config,
            "rerank": config.model_dump(mode="json"),
            "rerank_ms_per_query": round(1e3 * seconds / len(xq), 3),
        }  # fmt: skip
        counts = {key: sum(m.counts[key] for m in markers) for key in ("queries", "rows")}
        return work.publish(counts, info=info, shards=len(lists.groups))


def _again(config: Method) -> QueryExpansion | None:
    """The config of a method that searches again."""
    return config if isinstance(config, QueryExpansion) and config.again == "search" else None


def _reranked(
    config: Method, xq: F32, lists: _Lists, source: IndexSource | CollectionSource, groups: Mapping[int, slice]
) -> Iterator[tuple[int, F32, I64]]:
    """A group's number, scores and rows."""
    if isinstance(source, CollectionSource):
        top = [np.unique(lists.read(number)[:, : config.taken]) for number in groups]
        wanted = np.unique(np.concatenate(top)) if top else np.zeros(0, np.int64)
        source.keep(wanted[wanted >= 0])
    if expansion := _again(config):
        expanded = np.empty_like(xq)
        for number, group in groups.items():
            expanded[group] = expand(expansion, xq[group], lists.read(number), source.fetch)
        yield from source.rank(expanded, groups, lists.depth)
        return
    for number, group in groups.items():
        yield number, *rerank(config, xq[group], lists.read(number), source.fetch)


class _Clock:
    """Seconds of re-ranking: of fetching vectors and searching again too, but not of reading and writing lists."""

    def __init__(self, lists: _Lists) -> None:
        self.lists = lists
        self.start()

    def start(self) -> None:
        self._started, self._read = time.perf_counter(), self.lists.seconds

    def stop(self) -> float:
        return time.perf_counter() - self._started - (self.lists.seconds - self._read)


# ------------------------------------------------------------------------------------------------ database


class _Database:
    """The index or the embeddings; opened only where there is something to do."""

    def __init__(self, uris: Sequence[str]) -> None:
        self.where = " ".join(uris)
        manifest = read_manifest(open_folder(uris[0]))
        self.index = artifact.require(uris[0], "index") if manifest and manifest.stage == "index" else None
        if self.index and len(uris) > 1:
            raise InputError(f"{len(uris)} databases given; expected one index, or embeddings folders")
        self.collection = None if self.index else open_collection(uris)
        if self.index:
            self.ref = artifact.reference(*self.index)
        elif self.collection:
            self.ref = self.collection[0].ref

    def open(self, stack: contextlib.ExitStack, searched: Manifest) -> tuple[IndexSource | CollectionSource, pa.Table]:
        """Its vectors and its search, with the settings of the first search; and its names."""
        chosen = None
        if only := searched.inputs.get("only"):
            chosen = read_list(only.uri)
            if fingerprint(chosen) != only.fingerprint:
                raise MismatchError(f"{only.uri} is not the list that was searched; search again")
        splits = searched.config["splits"]
        if self.collection:
            collection, names = self.collection
            return CollectionSource(collection, allowed_rows(names, splits, chosen, self.where)), names
        assert self.index is not None
        index = stack.enter_context(opened(*self.index, allow_partial=searched.config["allow_partial"]))
        allowed = allowed_rows(index.names, splits, chosen, self.where)
        return IndexSource(index, searched.info["nprobe"], searched.info["refine"], allowed), index.names


# ------------------------------------------------------------------------------------------------ lists


class _Lists:
    """The lists of a search, shard by shard, as database rows."""

    def __init__(self, folder: Folder, searched: Manifest, queries: Sequence[str], names: pa.Table) -> None:
        self.folder, self.manifest, self.shards = folder, searched, searched.shards()
        self.queries = pa.array(queries, pa.string())
        ids = names["id"].to_numpy()
        self._row_of = np.argsort(ids, kind="stable")
        self._ids = ids[self._row_of]
        self.depth, self.seconds = int(searched.info["depth"]), 0.0
        # A query that found nothing is in no shard; it goes with those before it, and so does a whole shard of them.
        firsts = np.minimum.accumulate([self._first(shard) for shard in self.shards[:0:-1]])[::-1].tolist()
        self.groups = [slice(a, b) for a, b in pairwise([0, *firsts, len(queries)])]

    def _first(self, shard: str) -> int:
        with self.folder.open(shard) as file:
            batch = next(pq.ParquetFile(file).iter_batches(batch_size=1, columns=["query"]), None)
        return int(pc.index(self.queries, batch["query"][0]).as_py()) if batch else len(self.queries)

    def read(self, number: int) -> I64:
        """(queries of the group, list depth) database rows; -1 for none."""
        start = time.perf_counter()
        shard, group = self.shards[number], self.groups[number]
        with artifact.verified(self.folder, shard, self.manifest.files[shard]) as path:
            table = pq.ParquetFile(path).read(["query", "rank", "id"])
        query = pc.index_in(table["query"], value_set=self.queries).to_numpy()
        rows = np.full((group.stop - group.start, self.depth), -1)
        at = np.searchsorted(self._ids, table["id"].to_numpy())
        rows[query - group.start, table["rank"].to_numpy()] = self._row_of[at]
        self.seconds += time.perf_counter() - start
        return rows
