"""Finished evaluations over the same queries: reading, the table of their figures, curves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from iir_dist import artifact, metrics
from iir_dist.artifact import Manifest
from iir_dist.errors import MismatchError
from iir_dist.report.page import MARKERS, Figure, figure
from iir_dist.report.published import TITLES, Published, beside, set_of
from iir_dist.storage import Folder

NAMES = {"map": "mAP", "micro_ap": "µAP"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One finished evaluation under its label; `result` is its `metrics.json`."""

    label: str
    folder: Folder
    result: dict[str, Any]
    manifest: Manifest | None = None
    source: str | None = None
    """Label of the evaluation whose rankings were re-ranked into those of this one."""

    @property
    def protocol(self) -> dict[str, Any]:
        """All that the figures depend on."""
        value: dict[str, Any] = self.result["protocol"]
        return value

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of `per_query.parquet` or `top.parquet`."""
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(self.folder.read(name))).to_pylist()
        return rows

    def average_precisions(self, level: str) -> dict[str, float]:
        """AP of the queries that count at a level, by name."""
        rows = self.table("per_query.parquet")
        return {r["query"]: r["ap"] for r in rows if r["level"] == level and r["ap"] is not None}


def read(labels: Sequence[str], sources: Sequence[tuple[Folder, Manifest]]) -> list[Evaluation]:
    """Evaluations in the order given, those of re-ranked rankings behind what they were re-ranked from.

    Raises:
        MismatchError: they are not of one ground truth, protocol and figure.
        CorruptError: a file is not the one that was written.
    """
    label_of: dict[str, str] = {}
    for label, (_, manifest) in zip(labels, sources, strict=True):
        label_of.setdefault(manifest.inputs["rankings"].fingerprint, label)
    found = []
    for label, (folder, manifest) in zip(labels, sources, strict=True):
        for name in ("metrics.json", "per_query.parquet", "top.parquet"):
            artifact.check_file(folder, name, manifest.files[name])
        source = label_of.get(manifest.info.get("reranked_from") or "")
        found.append(Evaluation(label, folder, json.loads(folder.read("metrics.json")), manifest, source))
    _check(found)
    placed = [e for e in found if e.source is None]
    while len(placed) < len(found):  # what was re-ranked twice comes behind what was re-ranked once
        for evaluation in found:
            if evaluation not in placed and any(e.label == evaluation.source for e in placed):
                behind = [i for i, e in enumerate(placed) if evaluation.source in (e.label, e.source)]
                placed.insert(behind[-1] + 1, evaluation)
    return placed


def _check(evaluations: Sequence[Evaluation]) -> None:
    remedy = "a report compares runs over the same queries, so make one report for each"
    for other in evaluations[1:]:
        one, two = evaluations[0].protocol, other.protocol
        where = evaluations[0].folder.uri, other.folder.uri
        if (one["name"], one["figure"]) != (two["name"], two["figure"]):
            raise MismatchError(
                f"{where[0]} is of the {one['name']} protocol ({one['figure']}), {where[1]} of the {two['name']} "
                f"({two['figure']}); {remedy}"
            )
        prints = [p["ground_truth"]["fingerprint"] for p in (one, two)]
        if prints[0] != prints[1]:
            raise MismatchError(
                f"{where[0]} and {where[1]} were evaluated with different ground truths ({prints[0][:12]} and "
                f"{prints[1][:12]}); {remedy}"
            )


# ------------------------------------------------------------------------------------------------ table


def table_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row for each evaluation and level; the best of each level and database is marked."""
    rows = []
    for evaluation in evaluations:
        protocol = evaluation.protocol
        for level, m in evaluation.result["metrics"].items():
            if m["num_queries"]:
                search = "unknown" if not protocol["verified"] else "exact" if protocol["search"]["exact"] else "index"
                intervals = {"mAP": m["map_interval"]}
                intervals |= {_name(key): value for key, value in m.get("intervals", {}).items()}
                rows.append(
                    {
                        "label": evaluation.label, "level": level, "interval": m["map_interval"], "intervals": intervals,
                        "scores": {_name(key): m.get(key) for key in m if _is_figure(key)},
                        "figure": protocol["figure"], "differs_in": m["differs_in"], "num_queries": m["num_queries"],
                        "database": protocol["database_rows"] or "unknown", "search": search,
                        "synthetic": protocol["synthetic_distractors"] or 0, "source": evaluation.source,
                        "gain": _gain(evaluations[0], evaluation, level) if evaluation is not evaluations[0] else None,
                    }
                )  # fmt: skip
    for row in rows:
        rivals = [r for r in rows if (r["level"], r["database"]) == (row["level"], row["database"])]
        row["best"] = {
            name: len(rivals) > 1 and score is not None and score == max(r["scores"].get(name) or 0 for r in rivals)
            for name, score in row["scores"].items()
        }
    return rows


def _is_figure(key: str) -> bool:
    return key in NAMES or key.startswith(("mp@", "recall@"))


def _name(key: str) -> str:
    return NAMES.get(key, key.replace("mp@", "mP@"))


def _gain(first: Evaluation, other: Evaluation, level: str) -> dict[str, Any] | None:
    """Mean difference of AP to the first evaluation, paired by query, with its 95 % interval."""
    one, two = first.average_precisions(level), other.average_precisions(level)
    if not one or one.keys() != two.keys():
        return None
    difference = np.array([two[q] - one[q] for q in one])
    low, high = metrics.bootstrap_interval(difference)
    return {"mean": float(difference.mean()), "interval": None if np.isnan(low) else (low, high)}


def beside_published(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each level and size of database: our runs that are as published, and the published figures, best first."""
    groups: dict[tuple[str, int, int], dict[str, Any]] = {}
    for evaluation in evaluations:
        protocol = evaluation.protocol
        for level, m in evaluation.result["metrics"].items():
            published = beside(protocol, level) if m["num_queries"] else []
            if published:
                key = (level, protocol["distractors"], published[0].stages)
                title = f"{TITLES[set_of(protocol) or '']}, {level}"
                title += f", among {key[1]:,} distractors" if key[1] else ""
                title += ", with re-ranking" if key[2] == 2 else ""
                group = groups.setdefault(key, {"title": title, "rows": [_published(p) for p in published]})
                ours = {"name": evaluation.label, "ours": True, "source": "this report"}
                group["rows"].append({**ours, "map": m["map"], "interval": m["map_interval"]})
    for group in groups.values():
        group["rows"].sort(key=lambda row: -row["map"])
    return list(groups.values())


def _published(p: Published) -> dict[str, Any]:
    name = f"{p.method}, {p.descriptor}, {p.trained_on}"
    return {"name": name, "ours": False, "map": p.map, "interval": None, "source": p.source}


# ------------------------------------------------------------------------------------------------ words and curves


def summary(evaluations: Sequence[Evaluation], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in sentences."""
    protocol = evaluations[0].protocol
    title = TITLES.get(set_of(protocol) or "", "")
    count = len(evaluations)
    said = [
        f"{count} run{'s' * (count > 1)} over the same {protocol['ground_truth']['queries']} queries, "
        f"{protocol['name']} protocol{' of ' + title if title else ''}."
    ]
    for level in dict.fromkeys(row["level"] for row in rows):
        here = [row for row in rows if row["level"] == level]
        best = max(here, key=lambda row: row["scores"]["mAP"])
        between = f" ({_percent(best['interval'])})" if best["interval"] else ""
        said.append(
            f"{level.capitalize()}: {best['label']} has the best {best['figure']}, {best['scores']['mAP']:.3f}{between}."
        )
    differing = len({row["label"] for row in rows if row["differs_in"]})
    if differing:
        said.append(
            f"{differing} of {count} differ{'s' * (differing == 1)} from the published protocol: below the table in what."
        )
    if any(row["synthetic"] for row in rows):
        said.append("Rows marked * were searched among synthetic vectors, which are no photo's.")
    return said


def _percent(interval: Sequence[float]) -> str:
    return f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}"


def curves(evaluations: Sequence[Evaluation]) -> list[Figure]:
    """Precision over recall at each level."""
    found = []
    for level in dict.fromkeys(level for e in evaluations for level in e.result["curves"]):
        shown = [(e.label, e.result["curves"].get(level)) for e in evaluations if e.result["curves"].get(level)]

        def draw(axes: Any, shown: Sequence[tuple[str, list[float]]] = shown) -> None:
            for number, (label, curve) in enumerate(shown):
                style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "markevery": 2}
                axes.plot(np.linspace(0, 1, len(curve)), curve, label=label, **style)
            axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))

        if shown:
            words = "; ".join(f"{label}: precision {c[len(c) // 2]:.2f} at recall 0.5" for label, c in shown)
            found.append(figure(f"Precision over recall, {level}", words, draw))
    return found
