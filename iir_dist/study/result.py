"""What a study found, from its finished evaluations: tables by arm, verdicts, curves. It reads; nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iir_dist import artifact
from iir_dist.metrics import bootstrap_interval
from iir_dist.report import Evaluation
from iir_dist.storage import open_folder
from iir_dist.study import verdict
from iir_dist.study.config import StudyConfig
from iir_dist.study.execute import Outcome, Place
from iir_dist.study.near import FILE as OVERLAP
from iir_dist.study.plan import Measured, Plan
from iir_dist.study.verdict import AP, Verdict


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one arm, entry or ablated arm at one level of one test.

    Args:
        spread: standard deviation of mAP over seeds; None with one.
        interval: of mAP over queries, the seeds averaged; None with fewer than two queries.
    """

    part: str
    name: str
    test: str
    level: str
    search: str
    axis: str
    value: Any
    mean: float
    spread: float | None
    interval: tuple[float, float] | None
    by_seed: dict[int, float]
    precision: float | None
    queries: int
    database: int


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that the page and `study.json` say."""

    rows: list[Row]
    verdicts: list[Verdict]
    overlap: list[dict[str, Any]]
    evaluations: dict[str, Evaluation]
    """By the key of their node."""
    missing: list[Measured] = field(default_factory=list)


def gather(config: StudyConfig, plan: Plan, place: Place) -> Found:
    """Read all evaluations that are finished; the others are `missing`."""
    evaluations: dict[str, Evaluation] = {}
    missing = []
    for m in plan.measured:
        if m.metrics not in evaluations:
            found = _read(m, place)
            if found is None:
                missing.append(m)
            else:
                evaluations[m.metrics] = found
    measured = [m for m in plan.measured if m.metrics in evaluations]
    return Found(
        list(_rows(measured, evaluations)), list(_verdicts(config, measured, evaluations)), _overlap(plan, place), evaluations,
        missing,
    )  # fmt: skip


def _read(m: Measured, place: Place) -> Evaluation | None:
    folder = open_folder(place.of(m.metrics))
    manifest = artifact.read_manifest(folder)
    if manifest is None:
        return None
    for name in ("metrics.json", "per_query.parquet", "top.parquet"):
        artifact.check_file(folder, name, manifest.files[name])
    return Evaluation(m.name, folder, json.loads(folder.read("metrics.json")), manifest)


def _rows(measured: Sequence[Measured], evaluations: Mapping[str, Evaluation]) -> list[Row]:
    groups: dict[tuple[str, ...], list[Measured]] = {}
    for m in measured:
        groups.setdefault((m.part, m.test, m.axis, m.name, json.dumps(m.value), m.search), []).append(m)
    rows = []
    for members in groups.values():
        first = members[0]
        for level, figures in evaluations[first.metrics].result["metrics"].items():
            if not figures["num_queries"]:
                continue
            ap = _by_seed(members, evaluations, level)
            # Two seeds of a network that has none of its own are one evaluation.
            distinct = len({m.metrics for m in members})
            means = {seed: float(np.mean(list(values.values()))) for seed, values in ap.items()}
            spread = float(np.std(list(means.values()), ddof=1)) if distinct > 1 else None
            by_query = np.mean([[ap[s][q] for q in sorted(ap[s])] for s in ap], axis=0)
            low, high = bootstrap_interval(by_query)
            protocol = evaluations[first.metrics].protocol
            rows.append(
                Row(
                    first.part, first.name, first.test, level, first.search, first.axis, first.value,
                    float(np.mean(list(means.values()))), spread, None if np.isnan(low) else (low, high), means,
                    _mean(evaluations[m.metrics].result["metrics"][level].get("mp@10") for m in members),
                    figures["num_queries"], int(protocol["database_rows"] or 0),
                )
            )  # fmt: skip
    return rows


def _mean(values: Any) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _by_seed(members: Sequence[Measured], evaluations: Mapping[str, Evaluation], level: str) -> AP:
    return {m.seed: evaluations[m.metrics].average_precisions(level) for m in members}


def _verdicts(
    config: StudyConfig, measured: Sequence[Measured], evaluations: Mapping[str, Evaluation]
) -> list[Verdict]:
    found = []
    for question in config.hypotheses:
        for test in config.tests:
            a, b = (
                [m for m in measured if (m.part, m.name, m.test) == ("arm", arm, test)]
                for arm in (question.a, question.b)
            )
            both = {m.seed for m in a} & {m.seed for m in b}
            if not both:
                continue
            for level, figures in evaluations[a[0].metrics].result["metrics"].items():
                if figures["num_queries"]:
                    left, right = (_distinct([m for m in arm if m.seed in both], evaluations, level) for arm in (a, b))
                    found.append(verdict.judge(question.name, (question.a, left), (question.b, right), test, level))
    return found


def _distinct(members: Sequence[Measured], evaluations: Mapping[str, Evaluation], level: str) -> AP:
    """By seed; once where all seeds are one evaluation, as of published weights that nothing trained further."""
    if len({m.metrics for m in members}) == 1:
        members = members[:1]
    return _by_seed(members, evaluations, level)


def _overlap(plan: Plan, place: Place) -> list[dict[str, Any]]:
    """What training and test photos share, by name and bytes, and which look alike."""
    found = []
    for node in plan.nodes:
        if node.stage in ("overlap", "near"):
            folder = open_folder(place.of(node.key))
            manifest = artifact.read_manifest(folder)
            if manifest is not None:
                content = json.loads(folder.read(OVERLAP))
                found.append({"what": node.stage, "photos": _stem(node.key), "counts": manifest.counts, **content})
    return found


def _stem(key: str) -> str:
    return key.partition("/")[2].rpartition("-")[0]


# ------------------------------------------------------------------------------------------------ for people and programs


def to_json(config: StudyConfig, plan: Plan, found: Found, outcome: Outcome) -> str:
    """`study.json`."""
    return json.dumps(
        {
            "title": config.title, "config": config.model_dump(mode="json"),
            "rows": [_plain(row) for row in found.rows],
            "verdicts": [v.to_json() for v in found.verdicts],
            "overlap": found.overlap,
            "protocols": {
                m.test: found.evaluations[m.metrics].protocol for m in plan.of("arm") if m.metrics in found.evaluations
            },
            "stages": [
                {"key": n.key, "stage": n.stage, "inputs": {k: list(v) for k, v in n.inputs.items()},
                 "sources": dict(n.sources), "config": dict(n.config)} for n in plan.nodes
            ],
            "failed": outcome.failed, "skipped": list(outcome.skipped),
            "missing": [m.metrics for m in found.missing],
        },
        indent=1,
    )  # fmt: skip


def _plain(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__slots__}


def table(found: Found) -> str:
    """For a terminal: arms and leaderboard, then what is asked and answered."""
    lines = []
    for part in ("arm", "distractors", "leaderboard"):
        rows = [row for row in found.rows if row.part == part]
        if rows:
            title = {"arm": "arms", "distractors": "among distractors", "leaderboard": "leaderboard"}[part]
            lines.append(
                f"{title:<32} {'test':<12} {'level':<9} {'mAP':>6} {'seeds':>13} {'mP@10':>6} {'database':>8}  search"
            )
        for row in rows:
            spread = f"± {row.spread:.3f} of {len(row.by_seed)}" if row.spread is not None else "1"
            precision = "-" if row.precision is None else f"{row.precision:.3f}"
            where = f"{row.name:<32} {row.test:<12} {row.level:<9}"
            lines.append(f"{where} {row.mean:>6.3f} {spread:>13} {precision:>6} {row.database:>8}  {row.search}")
        if rows:
            lines.append("")
    lines += [f"{v.question}: {v.sentence}" for v in found.verdicts]
    return "\n".join(lines)
