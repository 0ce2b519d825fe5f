"""The distractor benchmark as a stage: at every step one index, exact ranks, and mAP at several settings of search.

Steps are nested: each has all distractors of the one before. Subsets and indexes are artifacts of their own below the
output folder, so that a run that was killed goes on, and so that they can be searched by hand.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow.compute as pc
from pydantic import Field, field_validator

from iir_dist import artifact, metrics
from iir_dist.artifact import InputRef, Manifest
from iir_dist.bench.mixture import comparison, fit
from iir_dist.bench.ranks import exact_ranks
from iir_dist.bench.subsets import Distractors, SubsetConfig, write_subset
from iir_dist.config import StageConfig, fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.collection import Collection, check_same_space, open_collection
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.errors import GroundTruthError, InputError
from iir_dist.index import build
from iir_dist.index.engine import Index, open_index
from iir_dist.index.plan import IndexConfig
from iir_dist.index.points import K, read_points, recall_of
from iir_dist.index.search import open_queries
from iir_dist.progress import Progress
from iir_dist.report.distractors import CODES_ONLY, page
from iir_dist.rerank.augmentation import Augmentation
from iir_dist.rerank.diffusion import Diffusion
from iir_dist.rerank.expansion import QueryExpansion
from iir_dist.rerank.interface import RerankConfig, rerank
from iir_dist.rerank.sources import IndexSource
from iir_dist.rerank.superglobal import SuperGlobal
from iir_dist.vectors import F32, I64

log = logging.getLogger(__name__)

TIMED_DEPTH = 100
"""k of the searches that are timed."""
TIMED = 200


class BenchConfig(StageConfig):
    """`[distractors]`."""

    steps: tuple[int, ...] = (0, 1_000, 10_000, 100_000, 1_000_000)
    """Numbers of distractors, ascending. What real ones do not reach is filled up with synthetic vectors."""
    depth: int = Field(10_000, ge=1)
    """Length of the lists that an index gives; mAP counts what is behind it as never found. Exact ranks are complete."""
    recalls: tuple[float, ...] = (0.8, 0.99)
    """Operating points by their recall@10, beside the index's own."""
    rerank: tuple[RerankConfig, ...] = (QueryExpansion(), Augmentation(n=400), Diffusion(n=400), SuperGlobal(n=400))
    """Re-rankers of what the index's own operating point finds."""
    index: IndexConfig = IndexConfig()
    seed: int = 0
    """Of the order of distractors, of the synthetic ones, and of the bootstrap."""
    execution: ClassVar[frozenset[str]] = frozenset()

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or min(steps) < 0 or list(steps) != sorted(set(steps)):
            raise ValueError(f"{list(steps)} are not ascending numbers of distractors, for example 0,1000,10000")
        return steps


@dataclass(frozen=True, slots=True)
class Labels:
    """Rows of the positives and of the ignored images of each query, by level; `missing` positives are in no row."""

    positive: Mapping[str, Sequence[I64]]
    ignored: Mapping[str, Sequence[I64]]
    missing: Mapping[str, Sequence[int]]

    def rows(self, q: int) -> I64:
        """All labelled rows of a query."""
        return np.unique(np.concatenate([rows[q] for kind in (self.positive, self.ignored) for rows in kind.values()]))


def run(
    database: str, truth_uri: str, distractors: Sequence[str], out: str, config: BenchConfig, *, force: bool = False
) -> Manifest:
    """Benchmark retrieval among growing numbers of distractors.

    Args:
        database: embeddings of the benchmark's images and queries (split `query`).
        truth_uri: its ground truth.
        distractors: embeddings folders of distractors.

    Raises:
        InputError, MismatchError, GroundTruthError: they do not fit together.
    """
    sources, names, xq = open_queries([database])
    extra = tuple(open_embeddings(uri) for uri in distractors)
    check_same_space((sources[0], *extra))
    if sources[0].manifest is None:
        raise InputError(f"{database} has no manifest; expected embeddings that iir embed wrote")
    truth = groundtruth.read(truth_uri)
    if truth.protocol == "custom":
        raise GroundTruthError(
            f"{truth_uri} is a ground truth of the custom protocol, whose AP@k of complete lists is not what this benchmark "
            "compares; expected the revisited or the original one"
        )
    refs = {
        "database": sources[0].ref,
        "groundtruth": InputRef(uri=truth_uri, fingerprint=fingerprint(truth.to_json())),
    }
    if extra:
        refs["distractors"] = artifact.combine(s.ref for s in extra)
    with artifact.begin(out, "bench", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        made, nearest = _distractors(extra, xq, config)
        real, subsets = len(made.names), _subsets(out, config, made, extra, sources[0].manifest, force)
        order = _order(truth, names)
        done = work.done()
        with Progress("bench", len(config.steps), "steps", done=len(done)) as progress:
            for number, count in enumerate(config.steps):
                if number not in done:
                    folders = (
                        [database, *subsets[:number]] if config.steps[0] == 0 else [database, *subsets[: number + 1]]
                    )
                    result = _step(folders, f"{out}/index-{count}", xq[order], truth, config, force)
                    result = {"distractors": count, "synthetic": max(0, count - real), **result}
                    with work.folder.publish(f"step-{number:05d}.json") as file:
                        file.path.write_text(json.dumps(result))
                    artifact.commit(work.folder, number, {file_name(number): artifact.entry_of(file)})
                    progress.advance(1)
        steps = [json.loads(work.folder.read(file_name(n))) for n in range(len(config.steps))]
        protocol = {
            "name": truth.protocol, "queries": len(truth.queries), "list_depth": config.depth, "dimension": xq.shape[1],
            "encoder": sources[0].manifest.info.get("encoder"), "real_distractors": real, "timed_depth": TIMED_DEPTH,
            "operating_points": "chosen by recall@10 against exact search, for these queries and for rows of the database",
            "synthetic": None if nearest is None else "vectors of a mixture fitted to the real distractors",
        }  # fmt: skip
        found = {"protocol": protocol, "steps": steps, "nearest": nearest}
        with work.folder.publish("bench.json") as data, work.folder.publish("report.html") as html:
            data.path.write_text(json.dumps(found, indent=1))
            html.path.write_text(page(found))
        files = {"bench.json": artifact.entry_of(data), "report.html": artifact.entry_of(html)}
        return work.publish({"steps": len(steps)}, files, shards=len(steps))


def file_name(step: int) -> str:
    """Of a step's figures."""
    return f"step-{step:05d}.json"


# ------------------------------------------------------------------------------------------------ distractors


def _distractors(
    extra: Sequence[Embeddings], xq: F32, config: BenchConfig
) -> tuple[Distractors, dict[str, Any] | None]:
    """Real distractors, with a mixture behind them where more are wanted; and how that compares."""
    made = Distractors(extra, config.seed)
    real = len(made.names)
    if config.steps[-1] <= real:
        return made, None
    if made.vectors is None:
        raise InputError(
            f"steps up to {config.steps[-1]} distractors and no real one given; expected --distractors EMBEDDINGS, from "
            "which synthetic ones are made where real ones do not reach"
        )
    log.warning(
        "bench: %d real distractors are given; those up to %d are synthetic vectors, and said to be wherever they count",
        real, config.steps[-1],
    )  # fmt: skip
    made.mixture = fit(made.vectors, config.seed)
    return made, comparison(made.mixture, made.vectors, xq, config.seed)


def _subsets(
    out: str, config: BenchConfig, made: Distractors, extra: Sequence[Embeddings], space: Manifest, force: bool
) -> list[str]:
    """Embeddings of the distractors that each step adds."""
    found = []
    for start, stop in pairwise([0, *(s for s in config.steps if s)]):
        uri = f"{out}/distractors-{stop}"
        settings = SubsetConfig(start=start, stop=stop, real=len(made.names), seed=config.seed)
        write_subset(uri, made, settings, artifact.combine(s.ref for s in extra), space, force=force)
        found.append(uri)
    return found


# ------------------------------------------------------------------------------------------------ one step


def _order(truth: GroundTruth, names: Sequence[str]) -> I64:
    """Where the vector of each query of the ground truth is."""
    rows = {name: row for row, name in enumerate(names)}
    found = groundtruth.match_queries(truth.queries, names)
    missing = [q.name for q, name in zip(truth.queries, found, strict=True) if name is None]
    if missing:
        raise GroundTruthError(
            f"{len(missing)} of {len(found)} queries of the ground truth have no embedding of split query (first "
            f"{missing[0]!r}); ingest with --groundtruth, and embed"
        )
    return np.array([rows[str(name)] for name in found])


def _labels(truth: GroundTruth, index: Index) -> Labels:
    benchmark = index.names.filter(pc.equal(index.names["source"], 0))["name"].to_pylist()
    rows = {name: row for row, name in enumerate(benchmark)}
    found = groundtruth.match(truth.images(), benchmark)
    positive: dict[str, list[I64]] = {}
    ignored: dict[str, list[I64]] = {}
    missing: dict[str, list[int]] = {}
    for level, (good, junk) in truth.levels().items():
        for query in truth.queries:
            sets = [{name for label in labels for name in query.labels.get(label, ())} for labels in (good, junk)]
            wanted = sets[0] - sets[1]
            there = [np.array(sorted(rows[found[n]] for n in s if n in found), np.int64) for s in (wanted, sets[1])]
            positive.setdefault(level, []).append(there[0])
            ignored.setdefault(level, []).append(there[1])
            missing.setdefault(level, []).append(sum(n not in found for n in wanted))
    return Labels(positive, ignored, missing)


def _step(
    folders: Sequence[str], index_uri: str, xq: F32, truth: GroundTruth, config: BenchConfig, force: bool
) -> dict[str, Any]:
    manifest = build.run(list(folders), index_uri, config.index, force=force)
    collection, _ = open_collection(list(folders))
    with open_index(index_uri) as index:
        labels = _labels(truth, index)
        times = [time.perf_counter()]
        exact = _exact(collection, xq, labels)
        times.append(time.perf_counter())
        points = [_point(index, xq, labels, exact, config, setting) for setting in _settings(index, config)]
        times.append(time.perf_counter())
        reranked = _reranked(index, xq, labels, exact, config)
        times.append(time.perf_counter())
    info = manifest.info
    return {
        "rows": index.num_rows,
        "exact": {level: _summary(ap, config.seed) for level, ap in exact.items()},
        "points": points,
        "reranked": reranked,
        "index": {
            "factory": info["factory"], "build_seconds": info["seconds_of"]["build"],
            "measure_seconds": info["seconds_of"]["measure"], "memory_bytes": info["memory_bytes"],
            "bytes": sum(entry.size for entry in manifest.files.values()),
        },
        "seconds": dict(zip(("exact", "points", "rerank"), np.diff(times).round(2).tolist(), strict=True)),
        "peak_bytes": build.peak_bytes(),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of search: its recall@10, None where it was not measured, and whether it reaches what it is named after."""

    name: str
    nprobe: int
    refine: int
    recall: float | None
    reached: bool = True


def _settings(index: Index, config: BenchConfig) -> Iterator[Setting]:
    """The index's own, those for the recalls, and all of them without refinement."""
    found = read_points(index.folder, index.manifest)
    own = (index.manifest.info["nprobe"], index.manifest.info["refine"])
    known = recall_of(index.folder, index.manifest, *own)
    settings = [Setting("default", *own, min(known.values(), default=None))]
    for recall in config.recalls:
        point = found.reaching(recall)
        settings.append(Setting(f"recall {recall:g}", point.nprobe, point.refine, point.worst, point.worst >= recall))
    for setting in settings:
        yield setting
        if setting.refine:
            yield Setting(setting.name + CODES_ONLY, setting.nprobe, 0, None)


def _exact(collection: Collection, xq: F32, labels: Labels) -> dict[str, metrics.Floats]:
    """AP of each query at each level, by ranks in the complete list; NaN without positives."""
    rows = [labels.rows(q) for q in range(len(xq))]
    ranks = exact_ranks(collection, xq, rows)
    found = {}
    for level, positive in labels.positive.items():
        ap = []
        for q in range(len(xq)):
            at = dict(zip(rows[q].tolist(), ranks[q].tolist(), strict=True))
            junk = np.sort([at[row] for row in labels.ignored[level][q].tolist()])
            right = np.sort([at[row] for row in positive[q].tolist()]).astype(np.int64)
            number = len(right) + labels.missing[level][q]
            kept = right - np.searchsorted(junk, right)
            ap.append(metrics.average_precision(kept, number) if number else np.nan)
        found[level] = np.array(ap)
    return found


def _point(
    index: Index,
    xq: F32,
    labels: Labels,
    exact: Mapping[str, metrics.Floats],
    config: BenchConfig,
    setting: Setting,
) -> dict[str, Any]:
    nprobe, refine = setting.nprobe, setting.refine
    start = time.perf_counter()
    rows = index.search(xq, min(config.depth, index.num_rows), nprobe, refine)[1]
    long_list_ms = 1e3 * (time.perf_counter() - start) / len(xq)
    times = []
    for one in (xq[i % len(xq)] for i in range(TIMED)):
        start = time.perf_counter()
        index.search(one[None], TIMED_DEPTH, nprobe, refine)
        times.append(1e3 * (time.perf_counter() - start))
    batch = np.resize(xq, (max(len(xq), TIMED), xq.shape[1]))
    start = time.perf_counter()
    index.search(batch, TIMED_DEPTH, nprobe, refine)
    rate = len(batch) / (time.perf_counter() - start)
    p50, p95, p99 = np.percentile(times, (50, 95, 99)).round(3).tolist()
    return {
        "name": setting.name, "nprobe": nprobe, "refine": refine, f"recall@{K}": setting.recall, "reached": setting.reached,
        "levels": _levels(rows, labels, exact, config), "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
        "queries_per_sec": round(rate, 1), "long_list_ms": round(long_list_ms, 2),
    }  # fmt: skip


def _reranked(
    index: Index, xq: F32, labels: Labels, exact: Mapping[str, metrics.Floats], config: BenchConfig
) -> list[dict[str, Any]]:
    """Every method on the lists of the index's own operating point; time is that beyond the search."""
    rows = index.search(xq, min(config.depth, index.num_rows))[1]
    source, found = IndexSource(index), []
    for method in config.rerank:
        start = time.perf_counter()
        again = rerank(method, xq, rows, source.fetch, source.search)[1]
        ms = 1e3 * (time.perf_counter() - start) / len(xq)
        settings = method.model_dump()
        name = settings.pop("name")
        levels = _levels(again, labels, exact, config)
        found.append({"name": name, "settings": settings, "levels": levels, "ms_per_query": round(ms, 2)})
    return found


def _levels(
    rows: I64, labels: Labels, exact: Mapping[str, metrics.Floats], config: BenchConfig
) -> dict[str, dict[str, Any]]:
    """mAP of lists (nq, depth), and what it loses against exact search."""
    levels = {}
    for level, positive in labels.positive.items():
        ap = np.full(len(rows), np.nan)
        for q in range(len(rows)):
            number = len(positive[q]) + labels.missing[level][q]
            if number:
                found = metrics.positive_ranks(rows[q][rows[q] >= 0], positive[q], labels.ignored[level][q])
                ap[q] = metrics.average_precision(found, number)
        loss = exact[level] - ap
        levels[level] = {**_summary(ap, config.seed), "loss": _summary(loss, config.seed)}
    return levels


def _summary(values: metrics.Floats, seed: int) -> dict[str, Any]:
    """Mean over the queries that count, and its bootstrap interval."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"mean": None, "interval": None}
    low, high = metrics.bootstrap_interval(values, seed=seed)
    return {"mean": float(values.mean()), "interval": None if np.isnan(low) else [low, high]}
