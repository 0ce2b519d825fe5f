"""`index.html` of a study: verdicts, tables, curves of what was ablated, and the lists of the arms under each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from iir_dist import artifact
from iir_dist.report.page import COLOURS, MARKERS, Figure, figure, render
from iir_dist.report.photos import Photos
from iir_dist.report.strips import strips
from iir_dist.study.config import StudyConfig
from iir_dist.study.execute import Outcome, Place
from iir_dist.study.plan import Plan
from iir_dist.study.result import Found, Row

DEPTH = 5
"""Images of a list, as the paper's figure 3 has."""
THUMBNAIL_PX = 128


def page(config: StudyConfig, plan: Plan, found: Found, outcome: Outcome, place: Place) -> str:
    """The page; it opens offline."""
    return render(
        "study.html.j2",
        title=config.title,
        verdicts=found.verdicts,
        parts=[(title, [row for row in found.rows if row.part == part]) for part, title in PARTS.items()],
        figures=ablation_figures(found.rows),
        strips=[shown for test in config.tests if (shown := _strips(config, plan, found, place, test))],
        overlap=found.overlap,
        failed=outcome.failed,
        skipped=outcome.skipped,
        seconds=sorted(outcome.seconds.items(), key=lambda item: -item[1]),
        seeds=config.seeds,
        config=json.dumps(config.model_dump(mode="json"), indent=2),
        protocols={
            m.test: json.dumps(found.evaluations[m.metrics].protocol, indent=2)
            for m in plan.of("arm")
            if m.metrics in found.evaluations
        },
    )


PARTS = {"arm": "Arms", "distractors": "Among distractors: exact search and the index", "leaderboard": "Leaderboard"}


def ablation_figures(rows: Sequence[Row]) -> list[Figure]:
    """A figure for each axis, test and level: a line for each arm."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.part == "ablation":
            groups.setdefault((row.axis, row.test, row.level), []).append(row)
    return [_curve(axis, f"{test}, {level}", members) for (axis, test, level), members in groups.items()]


def _curve(axis: str, where: str, rows: Sequence[Row]) -> Figure:
    values = list({json.dumps(row.value): row.value for row in rows}.values())
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numeric else values
    arms = list(dict.fromkeys(row.name for row in rows))

    def draw(axes: Any) -> None:
        for number, arm in enumerate(arms):
            own = {json.dumps(row.value): row for row in rows if row.name == arm}
            points = [(value, own[json.dumps(value)]) for value in values if json.dumps(value) in own]
            at = [v if numeric else values.index(v) for v, _ in points]
            means = [row.mean for _, row in points]
            bounds = [row.interval or (row.mean, row.mean) for _, row in points]
            error = (
                [m - b[0] for m, b in zip(means, bounds, strict=True)],
                [b[1] - m for m, b in zip(means, bounds, strict=True)],
            )
            axes.errorbar(
                at, means, error, label=arm, capsize=3, lw=1.2 if numeric else 0, elinewidth=1, ms=5,
                marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)],
            )  # fmt: skip
        if not numeric:
            axes.set_xticks(range(len(values)), [in_words(v) for v in values])
            axes.margins(x=0.2)
        axes.set(xlabel=axis.replace("settings.", ""), ylabel="mAP, 95 % interval over queries")

    words = "; ".join(f"{row.name} at {in_words(row.value)}: {row.mean:.3f}" for row in rows)
    return figure(f"{axis.replace('settings.', '')}, {where}", words, draw)


def in_words(value: Any) -> str:
    """A value of an axis, short.

    >>> in_words({"method": "pca", "dim": 256, "power": None}), in_words([1.0, 0.5]), in_words(0.1)
    ('pca 256', '1, 0.5', '0.1')
    """
    if isinstance(value, Mapping):
        if value.get("method") == "none":
            return "none"
        return " ".join(in_words(v) for v in value.values() if v is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(in_words(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _strips(config: StudyConfig, plan: Plan, found: Found, place: Place, test: str) -> dict[str, Any] | None:
    """Queries of a test with the lists of all arms, of the first seed."""
    seed = config.seeds[0]
    members = [m for m in plan.of("arm") if (m.test, m.seed) == (test, seed) and m.metrics in found.evaluations]
    if not members or not config.report_queries:
        return None
    images = next(n for n in plan.nodes if n.key == members[0].metrics).inputs["groundtruth"][0]
    photos = Photos([artifact.require(place.of(images), "ingest")], THUMBNAIL_PX)
    queries = strips([found.evaluations[m.metrics] for m in members], photos, config.report_queries, DEPTH)
    return {"test": test, "queries": queries, "photos": photos.data}
