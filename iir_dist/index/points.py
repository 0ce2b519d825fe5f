"""Operating points: what recall costs, measured on the finished index with queries that it does not hold.

Two kinds of queries, because they differ much: rows of the database, each searched for without itself, and queries of
another distribution (crops, other photos) where there are some. The recall of a point is that of the kind that comes
off worse.

Recall@k is the share of the true k nearest (by the float16 vectors, all rows) among the best refine * k by code, which
is what search returns, since these are rescored exactly. So one scan by code gives the recall for every refine.

The choice has to be the same on every machine, else its rankings would differ: points are ordered by the cost that the
plan computes, and what was timed is told beside it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, Manifest
from iir_dist.data.collection import query_rows
from iir_dist.data.embeddings import Embeddings
from iir_dist.errors import ConfigError
from iir_dist.index.engine import Index
from iir_dist.index.plan import IndexConfig, parse
from iir_dist.index.shard import TEMPLATE, Bits, Shard, ShardInfo, stored_vectors
from iir_dist.index.train import hashes, sample_rows
from iir_dist.storage import Folder
from iir_dist.vectors import F32, I64, merge_top_k, top_k

log = logging.getLogger(__name__)

POINTS = "operating_points.json"
K = 10
"""The k of recall@k that targets are for."""
DEPTHS = (1, 10, 100)
"""Recall is told for these."""
QUERIES = 512
"""Of each kind, at most."""
TIMED = 100
"""Single queries that are timed."""
REFINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GAIN = 0.004
"""Recall by which a dearer point must be better to be kept."""
ENOUGH = 0.999
"""Recall from which on more is not sought: the last lists cost as much as all before them."""
BLOCK = 2**12
"""Rows that are compared at a time when the truth is computed."""
DATABASE, OTHER = "database", "queries"
GENERATION, MEASURED = "generation", "measured"
"""In the manifest: the number of the last change of the index, and of the one that last measured it."""


class Latency(BaseModel):
    """Milliseconds of single queries, k = 10, one after the other."""

    p50: float
    p95: float
    p99: float


class Point(BaseModel):
    """One setting of search. `recall` is by kind of query, then by k; `cost_ms` is what the plan computes."""

    nprobe: int
    refine: int
    recall: dict[str, dict[int, float]]
    cost_ms: float
    latency_ms: Latency
    queries_per_sec: float
    """Of all queries in one batch, k = 10."""

    @property
    def worst(self) -> float:
        """Recall@10 of the kind of queries that comes off worse; 1 where none could ask (an index of one row)."""
        return min((recall[K] for recall in self.recall.values()), default=1.0)


class OperatingPoints(BaseModel):
    """`operating_points.json`: points that no other beats in both recall and cost, cheapest first."""

    model_config = ConfigDict(frozen=True)
    queries: dict[str, int]
    """How many there were of each kind."""
    rows: int
    """Of the database that they were measured on."""
    threads: int
    """That a batch was searched with."""
    memory_bytes: dict[str, int]
    """Codes with ids and template, which search holds; float16 vectors, of which it reads what it rescores."""
    points: list[Point]

    def reaching(self, recall: float) -> Point:
        """The cheapest point that reaches `recall`; the best one where none does."""
        return next((p for p in self.points if p.worst >= recall), self.points[-1])


def read_points(folder: Folder, manifest: Manifest) -> OperatingPoints:
    """The points of an index.

    Raises:
        ConfigError: they were never measured.
        CorruptError: the file is not the one that was written.
    """
    name = manifest.info.get("points", POINTS)
    if name not in manifest.files:
        raise ConfigError(
            f"{folder.uri} has no operating points; measure them: iir index --out {folder.uri} --measure, or give "
            "search.nprobe and search.refine instead of search.recall"
        )
    with artifact.verified(folder, name, manifest.files[name]) as path:
        return OperatingPoints.model_validate_json(path.read_bytes())


def stale(manifest: Manifest) -> bool:
    """Whether the rows have changed since the points were measured."""
    return bool(manifest.info.get(GENERATION, 0) != manifest.info.get(MEASURED, 0))


def recall_of(folder: Folder, manifest: Manifest, nprobe: int, refine: int) -> dict[str, float]:
    """Recall@10 of a setting by kind of query; empty where it was not measured, or not since the rows have changed."""
    if stale(manifest) or manifest.info.get("points", POINTS) not in manifest.files:
        return {}
    measured = {(point.nprobe, point.refine): point.recall for point in read_points(folder, manifest).points}
    return {kind: recall[K] for kind, recall in measured.get((nprobe, refine), {}).items()}


def write_points(folder: Folder, found: OperatingPoints, name: str = POINTS) -> dict[str, FileEntry]:
    """Write the file; its entry in the manifest."""
    with folder.publish(name) as file:
        file.path.write_text(found.model_dump_json(indent=1))
    return {name: artifact.entry_of(file)}


# ------------------------------------------------------------------------------------------------ queries


def other_queries(sources: Sequence[Embeddings], dim: int, seed: int) -> F32:
    """Up to QUERIES vectors (nq, d) of the rows of split `query`, chosen by a hash of their numbers.

    Folders without splits hold none: their rows are the database.
    """
    places: list[tuple[int, str, int]] = []
    for number, source in enumerate(sources):
        for shard in source.shards:
            places.append((number, shard, source.count_queries(shard)))
    chosen = sample_rows(sum(count for *_, count in places), QUERIES, seed)
    found, first = [], 0
    for number, shard, count in places:
        mine = chosen[(chosen >= first) & (chosen < first + count)] - first
        first += count
        if len(mine):
            x = query_rows(sources[number].read(shard)).vectors
            assert x is not None
            found.append(x[mine])
    return np.concatenate(found) if found else np.empty((0, dim), np.float32)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Queries of one kind, the rows that they are themselves (-1 for none), and the true nearest (nq, at most 100)."""

    name: str
    xq: F32
    itself: I64
    truth: I64

    def places(self, candidates: I64, k: int) -> I64:
        """Where each of the true k nearest stands among candidates (nq, m): (nq, k), m where it does not."""
        true = self.truth[:, :k]
        nq, m = candidates.shape
        line = (1 + max(int(candidates.max(initial=0)), int(true.max(initial=0)))) * np.arange(nq)[:, None]
        held = np.where(candidates < 0, -1, candidates + line).ravel()
        order = np.argsort(held)
        at = np.minimum(np.searchsorted(held, true + line, sorter=order), held.size - 1)
        found = order[at]
        return np.asarray(np.where(held[found] == true + line, found % m, m))


def _recall(places: I64, k: int, refine: int) -> float:
    """Recall@k where the best refine * k are rescored."""
    return float((places[:, :k] < k * max(1, refine)).mean())


def _without(rows: I64, itself: I64) -> I64:
    """(nq, m) to (nq, m - 1): without the row that the query is, else without the last."""
    hit = (rows == itself[:, None]) & (rows >= 0)
    hit[~hit.any(axis=1), -1] = True
    return np.asarray(rows[~hit].reshape(len(rows), -1))


def truth_part(
    folder: Folder, info: ShardInfo, dim: int, files: Mapping[str, FileEntry], xq: F32, alive: Bits, k: int
) -> tuple[F32, I64]:
    """The k nearest of a shard's rows that were not deleted, from its float16 vectors: scores and rows, best first."""
    shard = Shard(folder, info, dim, files)
    vectors, rows = shard.open_vectors(), shard.rows()
    kept = np.unpackbits(alive, bitorder="little")[rows].astype(bool)
    best: tuple[F32, I64] = np.empty((len(xq), 0), np.float32), np.empty((len(xq), 0), np.int64)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        if kept[part].any():
            scores = xq @ vectors[part][kept[part]].astype(np.float32).T
            found = top_k(scores, rows[part][kept[part]], k, larger_is_better=True)
            best = merge_top_k([best, found], k, larger_is_better=True)
    return best


def _truth(index: Index, xq: F32, alive: Bits, k: int) -> I64:
    ray = session.connect()
    task = ray.remote(truth_part)
    queries, bits = ray.put(xq), ray.put(alive)
    refs = [
        task.remote(index.folder, s, index.dim, {f: index.manifest.files[f] for f in s.files}, queries, bits, k)
        for s in index.shards
    ]
    parts: list[Any] = [session.result_of(ref) for ref in refs]
    return merge_top_k(parts, k, larger_is_better=True)[1]


def _kinds(index: Index, others: F32, seed: int) -> list[_Kind]:
    alive = index.alive
    living = np.flatnonzero(alive)
    # Not by the seed of the training sample, which would choose from that.
    keys = hashes(living, seed + 1)
    rows = np.sort(living[np.argpartition(keys, QUERIES)[:QUERIES]] if len(keys) > QUERIES else living)
    bits = np.packbits(alive, bitorder="little")
    depth = min(max(DEPTHS), len(living))
    shards = [Shard(index.folder, info, index.dim, index.manifest.files) for info in index.shards]
    xq = np.concatenate([stored_vectors(shards, rows, index.dim)[0], others.astype(np.float32)])
    truth = _truth(index, xq, bits, min(depth + 1, len(living)))
    kinds = []
    if truth.shape[1] > 1:
        kinds.append(_Kind(DATABASE, xq[: len(rows)], rows, _without(truth[: len(rows)], rows)))
    if len(others):
        kinds.append(_Kind(OTHER, xq[len(rows) :], np.full(len(others), -1), truth[len(rows) :, :depth]))
    return kinds


# ------------------------------------------------------------------------------------------------ measuring


def _ladder(nlist: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 … nlist: two steps for each doubling."""
    n, step = 1, 1
    while n < nlist:
        yield n
        n += step
        if n >= 4 * step:
            step *= 2
    yield nlist


def measure(index: Index, others: F32, seed: int) -> OperatingPoints:
    """Measure recall and time over nprobe and refine.

    Args:
        others: (nq, d) queries of another distribution than the database; none is allowed, and said.
    """
    if not len(others):
        log.warning(
            "index: operating points are measured with rows of the database only, for want of others; queries that differ "
            "from it need more: iir index … --queries EMBEDDINGS"
        )
    kinds = _kinds(index, others, seed)
    flat = index.manifest.info["factory"].endswith(",Flat")
    cost = parse(index.manifest.info["factory"], index.dim).latency_ms
    rows = int(index.alive.sum())
    grid = [
        (p, r, recall, cost(rows, index.dim, p, r)) for p, r, recall in _grid(index, kinds, (0,) if flat else REFINES)
    ]
    points = []
    for nprobe, refine, _, ms in _pareto(grid):
        recall = {kind.name: _recalls(index, kind, nprobe, refine) for kind in kinds}
        latency, rate = _times(index, kinds, nprobe, refine)
        points.append(
            Point(nprobe=nprobe, refine=refine, recall=recall, cost_ms=ms, latency_ms=latency, queries_per_sec=rate)
        )
    files = index.manifest.files
    names = [s.files for s in index.shards]
    memory = {
        "index": files[TEMPLATE].size + sum(files[codes].size for codes, *_ in names),
        "vectors": sum(files[vectors].size for _, vectors, *_ in names),
    }
    return OperatingPoints(
        queries={kind.name: len(kind.xq) for kind in kinds}, rows=rows, threads=index.backend.threads,
        memory_bytes=memory, points=points,
    )  # fmt: skip


def _candidates(index: Index, kind: _Kind, nprobe: int, depth: int) -> I64:
    """The best by code but the query itself, (nq, depth)."""
    return _without(index.search(kind.xq, depth + 1, nprobe, 0)[1], kind.itself)


def _grid(index: Index, kinds: list[_Kind], refines: Sequence[int]) -> Iterator[tuple[int, int, float]]:
    """(nprobe, refine, recall@10 of the worse kind), until more lists find nothing more."""
    before, doubled = 0.0, 1
    for nprobe in _ladder(index.nlist):
        depth = K * max(1, refines[-1])
        found = [kind.places(_candidates(index, kind, nprobe, depth), K) for kind in kinds]
        recall = 0.0
        for refine in refines:
            recall = min((_recall(places, K, refine) for places in found), default=1.0)
            yield nprobe, refine, recall
            if recall >= ENOUGH:
                break
        if recall >= ENOUGH:
            return
        if nprobe >= 2 * doubled:
            if recall < before + GAIN / 4:
                return
            before, doubled = recall, nprobe


def _pareto(grid: list[tuple[int, int, float, float]]) -> Iterator[tuple[int, int, float, float]]:
    """By cost, those of more recall than all cheaper ones."""
    best = -1.0
    for point in sorted(grid, key=lambda p: (p[3], -p[2])):
        if point[2] >= best + GAIN or (point[2] > best and point[2] >= ENOUGH):
            best = point[2]
            yield point


def _recalls(index: Index, kind: _Kind, nprobe: int, refine: int) -> dict[int, float]:
    places = kind.places(_candidates(index, kind, nprobe, max(DEPTHS) * max(1, refine)), max(DEPTHS))
    return {k: round(_recall(places, k, refine), 4) for k in DEPTHS}


def _times(index: Index, kinds: list[_Kind], nprobe: int, refine: int) -> tuple[Latency, float]:
    if not kinds:
        return Latency(p50=0, p95=0, p99=0), 0
    xq = np.concatenate([kind.xq for kind in kinds])
    start = time.perf_counter()
    index.search(xq, K, nprobe, refine)
    rate = len(xq) / (time.perf_counter() - start)
    times = []
    for one in xq[np.linspace(0, len(xq) - 1, min(TIMED, len(xq))).astype(int)]:
        start = time.perf_counter()
        index.search(one[None], K, nprobe, refine)
        times.append(1e3 * (time.perf_counter() - start))
    p50, p95, p99 = (round(float(t), 3) for t in np.percentile(times, (50, 95, 99)))
    return Latency(p50=p50, p95=p95, p99=p99), round(rate, 1)


def choose(found: OperatingPoints, config: IndexConfig) -> dict[str, int]:
    """nprobe and refine of an index: as configured, else of the cheapest point that reaches the target."""
    chosen = found.reaching(config.recall)
    log.info("index: %s", report(found, chosen))
    if chosen.worst < config.recall:
        log.warning(
            "index: recall@10 is %.3f at most, the target %g is not reached; a factory of finer codes would (--set factory=)",
            chosen.worst, config.recall,
        )  # fmt: skip
    return {
        "nprobe": chosen.nprobe if config.nprobe is None else config.nprobe,
        "refine": chosen.refine if config.refine is None else config.refine,
    }


def report(found: OperatingPoints, chosen: Point) -> str:
    """One line for the log: what was chosen and what it reaches."""
    recalls = ", ".join(
        f"{recall[K]:.3f} for {found.queries[kind]} {_SAID[kind]}" for kind, recall in chosen.recall.items()
    )
    return (
        f"nprobe {chosen.nprobe}, refine {chosen.refine}: recall@10 {recalls or 'not measurable'}; "
        f"{chosen.latency_ms.p50:.2g} ms a query (p95 {chosen.latency_ms.p95:.2g}), {chosen.queries_per_sec:,.0f} "
        f"queries/s in a batch on {found.threads} threads"
    )


_SAID = {DATABASE: "rows of the database", OTHER: "other queries"}
