"""Evaluation as a stage: `metrics.json`, the figures of each query, and the first images of each list with a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from iir_dist import artifact, metrics
from iir_dist.artifact import InputRef, Manifest
from iir_dist.config import fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.errors import GroundTruthError, MismatchError
from iir_dist.evaluate.config import EvaluateConfig
from iir_dist.evaluate.lineage import EVALUATED_SET, images_at, whitening_set
from iir_dist.evaluate.protocol import describe
from iir_dist.evaluate.rankings import Rankings, open_rankings
from iir_dist.evaluate.score import Scored, micro_ap, micro_ap_interval, numbers_of, score

TOP = 20
"""Images of each list that are kept with their verdict, for reports."""


def run(rankings_uri: str, truth_uri: str, out: str, config: EvaluateConfig, *, force: bool = False) -> Manifest:
    """Evaluate rankings against a ground truth.

    Raises:
        GroundTruthError: the two do not fit, or the protocol is another one than asked for.
        InputError: the rankings are not in order.
        MismatchError: the whitening was learnt on the set that is evaluated, and `config` does not allow that.
    """
    rankings, manifest, ref = open_rankings(rankings_uri)
    truth = groundtruth.read(truth_uri)
    if config.protocol is not None and config.protocol != truth.protocol:
        raise GroundTruthError(
            f"--protocol {config.protocol}: {truth_uri} is a ground truth of the {truth.protocol} protocol"
        )
    whitened_on = whitening_set(manifest, images_at(truth_uri))
    if whitened_on == EVALUATED_SET and not config.allow_whitening_on_test:
        raise MismatchError(
            f"{rankings_uri}: the whitening of this encoder was learnt on the images that are evaluated, which flatters the "
            "result; learn it on a training set, or --set allow_whitening_on_test=true to score and have the protocol say so"
        )
    truth_ref = InputRef(
        uri=str(Path(truth_uri)) if "://" not in truth_uri else truth_uri, fingerprint=fingerprint(truth.to_json())
    )
    with artifact.begin(out, "evaluate", config, {"rankings": ref, "groundtruth": truth_ref}, force=force) as work:
        if work.finished:
            return work.finished
        numbers = numbers_of(rankings, truth)
        scores = score(rankings, truth, numbers, config.k)
        protocol = describe(truth, rankings, manifest, whitened_on, numbers, config)
        result = {
            "protocol": protocol,
            "metrics": {level: _summary(s, rankings, truth, protocol, config) for level, s in scores.items()},
            "curves": {level: _curve(s) for level, s in scores.items()},
        }
        per_query = _per_query(truth, scores)
        with work.folder.publish("metrics.json") as metrics_file:
            metrics_file.path.write_text(json.dumps(result, indent=2))
        with work.folder.publish("per_query.parquet") as queries_file:
            pq.write_table(per_query, queries_file.path)
        with work.folder.publish("per_query.csv") as csv_file:
            pacsv.write_csv(per_query, csv_file.path)
        with work.folder.publish("top.parquet") as top_file:
            pq.write_table(_top(truth, rankings, scores), top_file.path)
        published = {
            "metrics.json": metrics_file, "per_query.parquet": queries_file, "per_query.csv": csv_file,
            "top.parquet": top_file,
        }  # fmt: skip
        files = {name: artifact.entry_of(file) for name, file in published.items()}
        info: dict[str, Any] = {"protocol": protocol, "metrics": result["metrics"]}
        if manifest is not None and manifest.stage == "rerank":
            info["reranked_from"] = manifest.inputs["rankings"].fingerprint
        return work.publish({"queries": len(truth.queries)}, files, info)


def _summary(
    scored: Sequence[Scored],
    rankings: Rankings,
    truth: GroundTruth,
    protocol: Mapping[str, Any],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Figures of one level, their 95 % intervals over queries, and beside them what is not as published."""
    found = metrics.summarize([s.score for s in scored], seed=config.seed)
    if not found["num_queries"]:
        return {**found, "differs_in": [d["choice"] for d in protocol["differences"]]}
    counted = [s.score.figures for s in scored if s.score.num_positive]
    intervals: dict[str, tuple[float, float] | None] = {}
    for name in counted[0]:
        low, high = metrics.bootstrap_interval(np.array([figures[name] for figures in counted]), seed=config.seed)
        intervals[f"m{name}" if name.startswith("p@") else name] = None if np.isnan(low) else (low, high)
    if truth.protocol == "custom":
        found["micro_ap"] = micro_ap(scored, rankings.scores, config.k)
        intervals["micro_ap"] = micro_ap_interval(scored, rankings.scores, config.k, seed=config.seed)
    found["intervals"] = intervals
    return {**found, "differs_in": [d["choice"] for d in protocol["differences"]]}


# ------------------------------------------------------------------------------------------------ tables


def _curve(scored: Sequence[Scored]) -> list[float]:
    """Mean over queries of the interpolated precision at recall 0, 0.05, …, 1."""
    curves = [metrics.precision_at_recall(s.ranks, s.score.num_positive) for s in scored if s.score.num_positive]
    return np.mean(curves, axis=0).round(6).tolist() if curves else []


def _per_query(truth: GroundTruth, scores: Mapping[str, Sequence[Scored]]) -> pa.Table:
    rows = []
    for level, column in scores.items():
        for query, scored in zip(truth.queries, column, strict=True):
            s, counted = scored.score, scored.score.num_positive > 0
            rows.append(
                {
                    "query": query.name, "level": level, "ap": s.ap if counted else None,
                    "num_positive": s.num_positive, "num_found": s.num_found,
                    **{name: value if counted else None for name, value in s.figures.items()},
                }
            )  # fmt: skip
    floats = [name for name in rows[0] if name not in ("query", "level", "num_positive", "num_found")]
    kinds = {"query": pa.string(), "level": pa.string(), **dict.fromkeys(floats, pa.float64())}
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds.get(name, pa.int64())) for name in rows[0]]))


def _top(truth: GroundTruth, rankings: Rankings, scores: Mapping[str, Sequence[Scored]]) -> pa.Table:
    """The first images of each list with a verdict, at the level that has most positives; for reports."""
    level = max(scores, key=lambda name: sum(s.score.num_positive for s in scores[name]))
    columns: dict[str, list[Any]] = {name: [] for name in ("query", "level", "rank", "name", "verdict")}
    for query, scored in zip(truth.queries, scores[level], strict=True):
        first = scored.ranked[:TOP]
        verdicts = np.full(len(first), "wrong", object)
        for verdict, places in (("right", scored.positive_at), ("ignored", scored.ignored_at)):
            verdicts[places[places < len(first)]] = verdict
        columns["query"] += [query.name] * len(first)
        columns["level"] += [level] * len(first)
        columns["rank"] += range(len(first))
        columns["name"] += rankings.names.take(pa.array(first)).to_pylist()
        columns["verdict"] += verdicts.tolist()
    return pa.table(columns)
