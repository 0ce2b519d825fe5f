"""Rankings and ground truth to `metrics.json`: the numbers, and the whole protocol that they hold under."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact, metrics
from iir_dist.artifact import InputRef, Manifest, read_manifest
from iir_dist.config import StageConfig, fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth, Query
from iir_dist.data.rankings import Rankings, open_rankings
from iir_dist.errors import CorruptError, GroundTruthError, MismatchError, StorageError
from iir_dist.metrics import QueryScore
from iir_dist.provenance import versions
from iir_dist.storage import open_folder

KS = (1, 5, 10)
TOP = 20
"""Images of each list that are kept with their verdict, for reports."""


class EvaluateConfig(StageConfig):
    """`[evaluate]`."""

    protocol: Literal["revisited", "original"] | None = None
    """Insist on one; the ground truth says which where not set."""
    seed: int = 0
    """Of the bootstrap over queries."""
    allow_whitening_on_test: bool = False
    """Score also where the whitening was learnt on the images that are evaluated; the protocol then says so."""
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Scored:
    """One query at one level: its list, positives and ignored images as codes, the positives' ranks, the score."""

    ranked: np.ndarray[Any, Any]
    positive: np.ndarray[Any, Any]
    ignored: np.ndarray[Any, Any]
    ranks: np.ndarray[Any, Any]
    score: QueryScore


def score(rankings: Rankings, truth: GroundTruth) -> dict[str, list[Scored]]:
    """Score every query at every level of the protocol.

    Raises:
        GroundTruthError: a query has no list, or a list holds what the protocol keeps out of the database.
    """
    lists = _lists_of(rankings, truth)
    codes = {name: code for code, name in enumerate(rankings.names)}
    found = groundtruth.match(truth.images(), rankings.names)
    if truth.protocol == "revisited":
        inside = sorted({q.image for q in truth.queries if q.image in found} - set(truth.database or ()))
        if inside:
            raise GroundTruthError(
                f"the rankings list {len(inside)} query images (first {inside[0]!r}), which the revisited protocol keeps "
                "out of the database; ingest with this ground truth (iir ingest --groundtruth), then embed and search again"
            )
    # A labelled image that is in no list gets a number of its own, so that it counts as a positive never found.
    numbers = {n: codes[found[n]] if n in found else -1 - i for i, n in enumerate(sorted(truth.images()))}

    def scored(query: Query, ranked: np.ndarray[Any, Any], level: tuple[tuple[str, ...], tuple[str, ...]]) -> Scored:
        positive, ignored = (
            np.unique(np.array([numbers[n] for label in labels for n in query.labels[label]], dtype=np.int64))
            for labels in level
        )
        return Scored(
            ranked, positive, ignored, metrics.positive_ranks(ranked, positive, ignored),
            metrics.score_query(ranked, positive, ignored, KS),
        )  # fmt: skip

    return {
        name: [scored(q, ranked, level) for q, ranked in zip(truth.queries, lists, strict=True)]
        for name, level in truth.levels().items()
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
        MismatchError: the whitening was learnt on the set that is evaluated, and `config` does not allow that.
    """
    rankings, manifest, ref = open_rankings(rankings_uri)
    truth = groundtruth.read(truth_uri)
    if config.protocol is not None and config.protocol != truth.protocol:
        raise GroundTruthError(
            f"--protocol {config.protocol}: {truth_uri} is a ground truth of the {truth.protocol} protocol"
        )
    whitened_on = whitening_set(manifest, _images_at(truth_uri))
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
        scores = score(rankings, truth)
        result = {
            "protocol": {**_protocol(truth, rankings, manifest), "whitening_set": whitened_on},
            "metrics": {
                level: metrics.summarize([x.score for x in s], KS, seed=config.seed) for level, s in scores.items()
            },
            "curves": {level: _curve(s) for level, s in scores.items()},
        }
        with work.folder.publish("metrics.json") as metrics_file:
            metrics_file.path.write_text(json.dumps(result, indent=2))
        with work.folder.publish("per_query.parquet") as queries_file:
            pq.write_table(_per_query(truth, scores), queries_file.path)
        with work.folder.publish("top.parquet") as top_file:
            pq.write_table(_top(truth, rankings, scores), top_file.path)
        published = {
            "metrics.json": metrics_file, "per_query.parquet": queries_file, "top.parquet": top_file
        }  # fmt: skip
        files = {name: artifact.entry_of(file) for name, file in published.items()}
        return work.publish({"queries": len(truth.queries)}, files, {k: result[k] for k in ("protocol", "metrics")})


def _protocol(truth: GroundTruth, rankings: Rankings, manifest: Manifest | None) -> dict[str, Any]:
    """All choices that a figure depends on, as far as the rankings' manifest knows them."""
    info = dict(manifest.info) if manifest else {}
    depths = [len(ranked) for ranked in rankings.lists.values()]
    return {
        "name": truth.protocol,
        "levels": {
            level: {"positive": list(positive), "ignored": list(ignored)}
            for level, (positive, ignored) in truth.levels().items()
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


# ------------------------------------------------------------------------------------------------ whitening

EVALUATED_SET = "the evaluated set"


def whitening_set(manifest: Manifest | None, truth_images: str | None) -> str:
    """What the whitening of the rankings was learnt on, that of R-MAC's regions included, for the protocol.

    The spec of the encoder names the embeddings and the images that it was learnt on by their fingerprints; these are
    looked for among all that the rankings were made from. Images that are only distractors may be among them, because
    no query asks for one; that is said.

    Args:
        manifest: of the rankings, None where they are somebody else's.
        truth_images: fingerprint of the images artifact that holds the ground truth, where it comes from one.
    """
    encoder = manifest.info.get("encoder") if manifest else None
    if manifest is None or encoder is None:
        return "unknown"
    learnt = [w for w in (encoder.get("region_whitening"), encoder["whitening"]) if w is not None]
    if not learnt:
        return "none, the vectors are not whitened"
    evaluated, missing = ancestors(manifest)
    here = [w for w in learnt if {w["learnt_on"], w.get("images")} & (evaluated | {truth_images} - {None})]
    if here:
        only_distractors = all(set(w.get("splits") or {}) == {"distractor"} for w in here)
        return "distractors of the evaluated database" if only_distractors else EVALUATED_SET
    name = " and ".join(map(_learnt_on, learnt))
    if missing:
        return f"{name}; not known whether these are evaluated, because {', '.join(missing)} cannot be read"
    return f"{name}; none of them is evaluated"


def _learnt_on(whitening: Mapping[str, Any]) -> str:
    splits = whitening.get("splits") or {}
    rows = ", ".join(f"{count} of split {split}" for split, count in splits.items()) or "an unknown number"
    regions = "regions of " if whitening.get("method") == "regions" else ""
    return f"{regions}{rows}, images {str(whitening.get('images'))[:12]}"


def ancestors(manifest: Manifest) -> tuple[set[str], list[str]]:
    """Fingerprints of the indexes, embeddings and images that rankings were made from, and the inputs that are gone.

    Encoders are not followed: what an encoder was trained on is not searched in.
    """
    found: set[str] = set()
    missing: list[str] = []
    todo = [manifest]
    while todo:
        inputs = todo.pop().inputs
        for role in ("database", "queries", "embeddings", "images"):
            if role not in inputs:
                continue
            found.add(inputs[role].fingerprint)
            if role != "images":
                parents = _manifests_of(inputs[role])
                todo += parents
                if not parents:
                    missing.append(inputs[role].uri)
    return found, missing


def _manifests_of(ref: InputRef) -> list[Manifest]:
    """The manifests of the folders that an input stands for; none if one is gone or has other content now."""
    for uris in ([ref.uri], ref.uri.split(" ")):
        try:
            manifests = [m for m in (read_manifest(open_folder(uri)) for uri in uris) if m is not None]
        except (StorageError, CorruptError):
            continue
        refs = [InputRef(uri=uri, fingerprint=m.fingerprint) for uri, m in zip(uris, manifests, strict=False)]
        if len(refs) == len(uris) and artifact.combine(refs).fingerprint == ref.fingerprint:
            return manifests
    return []


def _images_at(truth_uri: str) -> str | None:
    """Fingerprint of the images artifact that a ground truth was read from, None where it comes from elsewhere."""
    if truth_uri.endswith((".json", ".pkl", ".pickle")):
        return None
    manifest = read_manifest(open_folder(truth_uri))
    return manifest.fingerprint if manifest else None


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
            precision = {f"p@{k}": p if counted else None for k, p in zip(KS, s.precision, strict=True)}
            rows.append(
                {
                    "query": query.name, "level": level, "ap": s.ap if counted else None,
                    "num_positive": s.num_positive, "num_found": s.num_found, **precision,
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows)


def _top(truth: GroundTruth, rankings: Rankings, scores: Mapping[str, Sequence[Scored]]) -> pa.Table:
    """The first images of each list with a verdict, at the level that has most positives; for reports."""
    level = max(scores, key=lambda name: sum(s.score.num_positive for s in scores[name]))
    rows = []
    for query, scored in zip(truth.queries, scores[level], strict=True):
        for rank, code in enumerate(scored.ranked[:TOP]):
            verdict = "ignored" if code in scored.ignored else "right" if code in scored.positive else "wrong"
            rows.append(
                {"query": query.name, "level": level, "rank": rank, "name": rankings.names[code], "verdict": verdict}
            )
    return pa.Table.from_pylist(rows)
