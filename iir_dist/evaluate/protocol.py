"""All choices that a figure depends on, and those of them that are not what the published protocol says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from iir_dist import metrics
from iir_dist.artifact import Manifest
from iir_dist.config import fingerprint
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.evaluate import lineage
from iir_dist.evaluate.config import EvaluateConfig
from iir_dist.evaluate.rankings import Rankings
from iir_dist.provenance import versions

TRAPEZOIDS = "trapezoids, ignored images removed before ranks are counted"
CROPPED = "to the ground truth's box"
NO_BOX = "none, the ground truth has no boxes"
NOT_CROPPED = "not cropped"
UNKNOWN = "unknown"
PUBLISHED_DISTRACTORS = {"revisited": 1_001_001, "original": 100_071}
"""Of the sets +R1M, and Oxford105k and Paris106k."""


def describe(
    truth: GroundTruth,
    rankings: Rankings,
    manifest: Manifest | None,
    whitening_set: str,
    found: Collection[str],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """The protocol, as far as the rankings' manifest knows it.

    Args:
        found: names of the ground truth that are in a list.
    """
    info = dict(manifest.info) if manifest else {}
    depths = [len(ranked) for ranked in rankings.lists.values()]
    rows = info.get("database_rows")
    behind = lineage.database(manifest)
    expected = {n for q in truth.queries for names in q.labels.values() for n in names} | set(truth.database or ())
    value = {
        "name": truth.protocol,
        "title": _title(truth, behind),
        "figure": f"mAP@{config.k}" if truth.protocol == "custom" else "mAP",
        "levels": {
            level: {"positive": list(positive), "ignored": list(ignored)}
            for level, (positive, ignored) in truth.levels().items()
        },
        "average_precision": TRAPEZOIDS,
        "ground_truth": {
            "fingerprint": fingerprint(truth.to_json()), "queries": len(truth.queries),
            "images": len(expected), "images_in_lists": len(expected & set(found)),
        },
        "query_crop": _crop(truth, manifest),
        "lists_beside": len(rankings.lists) - len(truth.queries),
        "list_depth": {"min": min(depths), "max": max(depths)},
        "database_rows": rows,
        "distractors": behind.distractors if behind else None,
        "synthetic_distractors": behind.synthetic if behind else None,
        "complete_lists": min(depths) == rows,
        "missing_rows": sum(stop - start for start, stop in info.get("missing") or ()),
        "ties": {"images": rankings.ties.images, "lists": rankings.ties.lists, "broken_by": rankings.ties.broken_by}
        if rankings.ties
        else None,
        "lists_with_rising_scores": len(rankings.rising),
        "search": {
            "exact": info.get("exact"), **(info.get("search") or (manifest.config if manifest else {})),
            **{key: info[key] for key in ("nprobe", "refine", "recall") if info.get(key) is not None},
        },
        "searched_part": bool(manifest and "only" in manifest.inputs),
        "rerank": info.get("rerank"),
        "whitening_set": whitening_set,
        "encoder_fingerprint": info.get("encoder_fingerprint"),
        "encoder": info.get("encoder"),
        "verified": manifest is not None,
        "versions": manifest.versions if manifest else versions(),
    }  # fmt: skip
    if truth.protocol == "custom":
        value |= {
            "k": config.k,
            "average_precision": f"precisions at the positives among the first {config.k}, summed, over min(positives, "
            f"{config.k}); ignored images and the query's own removed before ranks are counted",
            "recall": "share of a query's positives among the first k",
            "micro_ap": f"all pairs of the first {config.k} of each list in order of their scores, equal scores together",
        }
    else:
        value["precision"] = f"mP@k, k = {metrics.KS}: over the first min(k, last positive) images"
    value["differences"] = differences(value)
    return value


def _title(truth: GroundTruth, behind: lineage.Database | None) -> str:
    if not behind or not behind.distractors:
        return truth.protocol
    synthetic = f", {behind.synthetic:,} of them synthetic" if behind.synthetic else ""
    return f"{truth.protocol} among {behind.distractors:,} distractors{synthetic}"


def _crop(truth: GroundTruth, manifest: Manifest | None) -> str:
    if not any(q.box for q in truth.queries):
        return NO_BOX
    cropped = lineage.query_crop(manifest, fingerprint(truth.to_json()))
    return UNKNOWN if cropped is None else CROPPED if cropped else NOT_CROPPED


# ------------------------------------------------------------------------------------------------ differences


def differences(protocol: Mapping[str, Any]) -> list[dict[str, str]]:
    """Choices that are not the published ones: what was chosen, what is published, what it is here.

    To be shown beside a figure: with any of them it must not be put beside a published one as its equal.
    """
    found: list[dict[str, str]] = []

    def differ(choice: str, published: str, here: str) -> None:
        found.append({"choice": choice, "published": published, "here": here})

    if not protocol["verified"]:
        differ("rankings", "made and recorded by this program", "made elsewhere; how is not known")
    elif protocol["query_crop"] in (NOT_CROPPED, UNKNOWN):
        differ("query crop", CROPPED, protocol["query_crop"])
    _lists(protocol, differ)
    _search(protocol, differ)
    whitening = protocol["whitening_set"]
    if whitening in (lineage.EVALUATED_SET, lineage.EVALUATED_DISTRACTORS) or lineage.NOT_KNOWN in whitening:
        differ("whitening", "learnt on another set", f"learnt on {whitening}")
    standard = PUBLISHED_DISTRACTORS.get(protocol["name"])
    if standard and protocol["distractors"] not in (None, 0, standard):
        differ("distractors", f"none or {standard:,}", f"{protocol['distractors']:,}")
    if protocol["synthetic_distractors"]:
        differ("synthetic", "photos only", f"{protocol['synthetic_distractors']:,} distractors are synthetic vectors")
    truth = protocol["ground_truth"]
    if protocol["complete_lists"] and truth["images_in_lists"] < truth["images"]:
        lost = truth["images"] - truth["images_in_lists"]
        differ(
            "database", "every image of the ground truth", f"{lost:,} of them are not there and count as never found"
        )
    return found


def _lists(protocol: Mapping[str, Any], differ: Any) -> None:
    depth, rows = protocol["list_depth"], protocol["database_rows"]
    wanted = protocol.get("k") or rows
    if rows is not None and depth["min"] < min(wanted, rows):
        whole = f"the first {wanted:,}" if "k" in protocol else "the whole database"
        here = f"{depth['min']:,}" if depth["min"] == depth["max"] else f"{depth['min']:,} to {depth['max']:,}"
        differ("list depth", whole, f"the first {here} of {rows:,}, so that figures are lower bounds")
    if protocol["lists_with_rising_scores"]:
        lists = protocol["lists_with_rising_scores"]
        differ("scores", "falling along a list", f"rise in {lists} lists, which keep the order of their ranks")


def _search(protocol: Mapping[str, Any], differ: Any) -> None:
    search = protocol["search"]
    if search["exact"] is False:
        words = [f"{key} {search[key]}" for key in ("nprobe", "refine") if key in search]
        recall = search.get("recall")
        words.append(f"recall@10 {min(recall.values()):.3f}" if isinstance(recall, Mapping) else "recall not recorded")
        differ("search", "exact", f"an index, {', '.join(words)}")
    if protocol["missing_rows"]:
        differ("missing", "the whole database", f"{protocol['missing_rows']:,} rows were lost and not searched")
    if protocol["searched_part"] or search.get("splits"):
        part = f"only rows of split {', '.join(search['splits'])}" if search.get("splits") else "only rows of a list"
        differ("searched", "the whole database", part)
    if protocol["rerank"]:
        settings = ", ".join(f"{k} {v}" for k, v in protocol["rerank"].items() if k != "name")
        differ("re-ranking", "none", f"{protocol['rerank'].get('name', 'unnamed')} ({settings})")
