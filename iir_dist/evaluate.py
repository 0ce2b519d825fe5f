"""Rankings and ground truth to `metrics.json`: the numbers, and the whole protocol that they hold under."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact, metrics
from iir_dist.artifact import InputRef, Manifest, read_manifest, versions
from iir_dist.config import StageConfig, fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.errors import GroundTruthError, InputError
from iir_dist.metrics import QueryScore
from iir_dist.storage import Folder, open_folder

KS = (1, 5, 10)
RANKING_COLUMNS = ("query", "rank", "name")


class EvaluateConfig(StageConfig):
    """`[evaluate]`."""

    protocol: Literal["revisited", "original"] | None = None
    """Insist on one; the ground truth says which where not set."""
    seed: int = 0
    """Of the bootstrap over queries."""
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Rankings:
    """All lists, as codes into `names`: query -> codes, best first."""

    lists: dict[str, np.ndarray[Any, Any]]
    names: list[str]


def read_rankings(folder: Folder, shards: list[str]) -> Rankings:
    """Read rankings, ours or anybody's, checked: ranks from 0 without holes, no image twice in a list.

    Raises:
        InputError: they are not.
    """
    tables = []
    for shard in shards:
        with folder.open(shard) as file:
            parquet = pq.ParquetFile(file)
            missing = [c for c in RANKING_COLUMNS if c not in parquet.schema_arrow.names]
            if missing:
                raise InputError(f"{folder.address(shard)} has no column {', '.join(missing)}; rankings have {RANKING_COLUMNS}")
            tables.append(parquet.read(columns=list(RANKING_COLUMNS)))
    table = pa.concat_tables(tables)
    dictionary = pc.dictionary_encode(table.column("name").combine_chunks())
    queries = pc.dictionary_encode(table.column("query").combine_chunks())
    codes, ranks = dictionary.indices.to_numpy(), table.column("rank").to_numpy()
    order = np.lexsort((ranks, queries.indices.to_numpy()))
    bounds = np.searchsorted(queries.indices.to_numpy()[order], np.arange(len(queries.dictionary) + 1))
    lists = {}
    for number, query in enumerate(queries.dictionary.to_pylist()):
        rows = order[bounds[number] : bounds[number + 1]]
        if not np.array_equal(ranks[rows], np.arange(len(rows))):
            raise InputError(f"{folder.uri}: ranks of query {query!r} are not 0, 1, 2, …; expected each once")
        lists[query] = codes[rows]
        if len(np.unique(lists[query])) != len(rows):
            raise InputError(f"{folder.uri}: the list of query {query!r} names an image twice; expected each once")
    return Rankings(lists, dictionary.dictionary.to_pylist())


def score(rankings: Rankings, truth: GroundTruth) -> dict[str, list[QueryScore]]:
    """Score every query at every level of the protocol.

    Raises:
        GroundTruthError: a query has no list, or a list holds what the protocol keeps out of the database.
    """
    queries = _lists_of(rankings, truth)
    codes = {name: code for code, name in enumerate(rankings.names)}
    found = groundtruth.match(truth.images() | {q.image for q in truth.queries}, rankings.names)
    if truth.protocol == "revisited":
        inside = [q.image for q in truth.queries if q.image not in (truth.database or ()) and q.image in found]
        if inside:
            raise GroundTruthError(
                f"the rankings list {len(inside)} query images (first {inside[0]!r}), which the revisited protocol keeps "
                "out of the database; ingest with this ground truth (iir ingest --groundtruth), then embed and search again"
            )

    def numbers(query: groundtruth.Query, labels: tuple[str, ...]) -> np.ndarray[Any, Any]:
        names = [name for label in labels for name in query.labels[label]]
        # A labelled image that is in no list keeps a number of its own: it counts as a positive never found.
        return np.unique([codes[found[n]] if n in found else -1 - hash_code(n) for n in names]).astype(np.int64)

    unknown: dict[str, int] = {}

    def hash_code(name: str) -> int:
        return unknown.setdefault(name, len(unknown))

    return {
        level: [
            metrics.score_query(ranked, numbers(q, positive), numbers(q, ignored), KS)
            for q, ranked in zip(truth.queries, queries, strict=True)
        ]
        for level, (positive, ignored) in truth.levels().items()
    }


def _lists_of(rankings: Rankings, truth: GroundTruth) -> list[np.ndarray[Any, Any]]:
    """The list of each query, found by the query's name or by its image's."""
    by_name = groundtruth.match([q.name for q in truth.queries], rankings.lists)
    by_image = groundtruth.match([q.image for q in truth.queries], rankings.lists)
    lists, missing = [], []
    for query in truth.queries:
        key = by_name.get(query.name) or by_image.get(query.image)
        if key is None:
            missing.append(query.name)
        else:
            lists.append(rankings.lists[key])
    if missing:
        raise GroundTruthError(
            f"{len(missing)} of {len(truth.queries)} queries of the ground truth have no list (first {missing[0]!r}); "
            f"the rankings are of {', '.join(list(rankings.lists)[:3])}, …"
        )
    return lists


def run(rankings_uri: str, truth_uri: str, out: str, config: EvaluateConfig, *, force: bool = False) -> Manifest:
    """Evaluate rankings against a ground truth.

    Raises:
        GroundTruthError: the two do not fit, or the protocol is another one than asked for.
    """
    folder = open_folder(rankings_uri)
    manifest = read_manifest(folder)
    if manifest is not None:
        artifact.require(rankings_uri, "search")
        shards, ref = manifest.shards(), artifact.reference(folder, manifest)
        for shard in shards:
            artifact.check_file(folder, shard, manifest.files[shard])
    else:
        shards = [e.name for e in folder.list() if e.name.endswith(".parquet")]
        if not shards:
            artifact.require(rankings_uri, "search")
        entries = [[e.name, e.size, e.version] for e in folder.list()]
        ref = InputRef(uri=folder.uri, fingerprint=fingerprint(entries), verified=False)
    truth = groundtruth.read(truth_uri)
    if config.protocol is not None and config.protocol != truth.protocol:
        raise GroundTruthError(f"--protocol {config.protocol}: {truth_uri} is a ground truth of the {truth.protocol} protocol")
    truth_ref = InputRef(uri=str(Path(truth_uri)) if "://" not in truth_uri else truth_uri, fingerprint=fingerprint(truth.to_json()))
    with artifact.begin(out, "evaluate", config, {"rankings": ref, "groundtruth": truth_ref}, force=force) as work:
        if work.finished:
            return work.finished
        rankings = read_rankings(folder, shards)
        scores = score(rankings, truth)
        result = {
            "protocol": _protocol(truth, rankings, manifest),
            "metrics": {level: metrics.summarize(s, KS, seed=config.seed) for level, s in scores.items()},
        }
        files = {
            "metrics.json": _publish_json(work.folder, result),
            "per_query.parquet": _publish_queries(work.folder, truth, scores),
        }
        return work.publish({"queries": len(truth.queries)}, files, result)


def _protocol(truth: GroundTruth, rankings: Rankings, manifest: Manifest | None) -> dict[str, Any]:
    """All choices that a figure depends on, as far as the rankings' manifest knows them."""
    info = dict(manifest.info) if manifest else {}
    depths = [len(ranked) for ranked in rankings.lists.values()]
    return {
        "name": truth.protocol,
        "levels": {
            level: {"positive": list(positive), "ignored": list(ignored)} for level, (positive, ignored) in truth.levels().items()
        },
        "average_precision": "trapezoids, ignored images removed before ranks are counted",
        "query_crop": "to the ground truth's box" if any(q.box for q in truth.queries) else "none",
        "list_depth": {"min": min(depths), "max": max(depths)},
        "database_rows": info.get("database_rows"),
        "complete_lists": min(depths) == info.get("database_rows"),
        "search": {"exact": info.get("exact"), **(manifest.config if manifest else {})},
        "encoder_fingerprint": info.get("encoder_fingerprint"),
        "encoder": info.get("encoder"),
        "verified": manifest is not None,
        "versions": manifest.versions if manifest else versions(),
    }


def _publish_json(folder: Folder, value: dict[str, Any]) -> artifact.FileEntry:
    with folder.publish("metrics.json") as file:
        file.path.write_text(json.dumps(value, indent=2))
    return artifact.entry_of(file)


def _publish_queries(folder: Folder, truth: GroundTruth, scores: dict[str, list[QueryScore]]) -> artifact.FileEntry:
    rows = [
        {
            "query": query.name, "level": level, "ap": s.ap if s.num_positive else None, "num_positive": s.num_positive,
            "num_found": s.num_found, **{f"p@{k}": p if s.num_positive else None for k, p in zip(KS, s.precision, strict=True)},
        }
        for level, column in scores.items()
        for query, s in zip(truth.queries, column, strict=True)
    ]  # fmt: skip
    with folder.publish("per_query.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows), file.path)
    return artifact.entry_of(file)
