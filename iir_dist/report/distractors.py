"""`bench.json` of the distractor benchmark as tables and curves, on a page of its own or as a part of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.report.page import COLOURS, MARKERS, Figure, figure, render
from iir_dist.storage import Folder

FILE = "bench.json"
CODES_ONLY = ", codes only"
"""Ends the names of settings without refinement."""
MB = 2**20


def read(folder: Folder, manifest: Manifest) -> dict[str, Any]:
    """`bench.json` of a finished benchmark.

    Raises:
        CorruptError: the file is not the one that was written.
    """
    artifact.check_file(folder, FILE, manifest.files[FILE])
    found: dict[str, Any] = json.loads(folder.read(FILE))
    return found


def page(found: Mapping[str, Any]) -> str:
    """`bench.json` as a page of its own; it opens offline."""
    return render("bench.html.j2", title="Distractor benchmark", bench=described(found))


def described(found: Mapping[str, Any], label: str = "", manifest: Manifest | None = None) -> dict[str, Any]:
    """What the template `distractors.html.j2` shows."""
    steps = found["steps"]
    for step in steps:
        step["count"] = _count(step)
    levels = list(steps[0]["exact"])
    return {
        "label": label, "steps": steps, "levels": levels, "nearest": found["nearest"],
        "list_depth": found["protocol"]["list_depth"], "timed_depth": found["protocol"]["timed_depth"],
        "summary": [line for level in levels for line in _summary(found, level)],
        "figures": {level: _figures(found, level, label) for level in levels},
        "similarities": _similarities(found["nearest"], label) if found["nearest"] else None,
        "protocol": json.dumps(found["protocol"], indent=2),
        "manifest": json.dumps(manifest.model_dump(mode="json"), indent=2) if manifest else "",
    }  # fmt: skip


def _count(step: Mapping[str, Any]) -> str:
    return f"{step['distractors']:,}{'*' if step['synthetic'] else ''}"


def _summary(found: Mapping[str, Any], level: str) -> list[str]:
    steps = [s for s in found["steps"] if s["exact"][level]["mean"] is not None]
    if not steps:
        return [f"{level.capitalize()}: no query has a positive."]
    first, last = steps[0], steps[-1]
    said = [
        f"{level.capitalize()}: mAP of exact search is {first['exact'][level]['mean']:.3f} among {first['count']} distractors "
        f"and {last['exact'][level]['mean']:.3f} among {last['count']}."
    ]
    losses = [(100 * s["points"][0]["levels"][level]["loss"]["mean"], s["count"]) for s in steps]
    worst, best = max(losses), min(losses)
    gained = f", and gains {-best[0]:.2f} among {best[1]}, where lists that are not visited hold more distractors than positives"
    said.append(
        f"At its own operating point the index loses {worst[0]:.2f} points of mAP at most (among {worst[1]})"
        f"{gained if best[0] < 0 else ''}."
    )
    point = last["points"][0]
    said.append(
        f"Among {last['count']} a query then takes {point['latency_ms']['p50']:.1f} ms (median), and search holds "
        f"{last['index']['memory_bytes']['search'] / MB:,.0f} MB; the vectors as float32 have "
        f"{last['rows'] * 4 * found['protocol']['dimension'] / MB:,.0f} MB."
    )
    return said


# ------------------------------------------------------------------------------------------------ figures


def _figures(found: Mapping[str, Any], level: str, label: str) -> list[Figure]:
    steps = found["steps"]
    behind = f", {label}" if label else ""
    settings = list(dict.fromkeys(p["name"] for s in steps for p in s["points"]))
    refined = [name for name in settings if not name.endswith(CODES_ONLY)]
    methods = [m["name"] for m in steps[0]["reranked"]]

    def of(step: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        # A point that has no refinement is its own one of codes only.
        named = {p["name"]: p["levels"][level] for p in step["points"]}
        values: Mapping[str, Any] = named.get(name) or named[name.removesuffix(CODES_ONLY)]
        return values

    def after(step: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        values: Mapping[str, Any] = next(m for m in step["reranked"] if m["name"] == name)["levels"][level]
        return values

    def exact(axes: Any) -> None:
        counts = [s["distractors"] for s in steps]
        means = [s["exact"][level]["mean"] for s in steps]
        bounds = [s["exact"][level]["interval"] or [m, m] for s, m in zip(steps, means, strict=True)]
        axes.fill_between(counts, [b[0] for b in bounds], [b[1] for b in bounds], alpha=0.15, color=COLOURS[0], lw=0)
        axes.plot(counts, means, marker="o", color=COLOURS[0], label="exact search, 95 % interval")

    def growth(axes: Any) -> None:
        exact(axes)
        for number, name in enumerate(refined, 1):
            _line(axes, steps, [of(s, name)["mean"] for s in steps], number, f"index, {name}")
        _by_count(axes, found, "mAP")

    def reranking(axes: Any) -> None:
        exact(axes)
        for number, name in enumerate(methods, 1):
            _line(axes, steps, [after(s, name)["mean"] for s in steps], number, f"index, then {name}")
        _by_count(axes, found, "mAP")

    def loss(axes: Any) -> None:
        for number, name in enumerate(settings):
            colour = COLOURS[refined.index(name.removesuffix(CODES_ONLY)) % len(COLOURS)]
            values = [of(s, name)["loss"] for s in steps]
            means = 100 * np.array([v["mean"] for v in values])
            if name not in refined:
                axes.plot([s["distractors"] for s in steps], means, ls=":", lw=1.2, color=colour, label=name)
                continue
            bounds = 100 * np.array([v["interval"] or [v["mean"]] * 2 for v in values])
            beside = np.array([s["distractors"] for s in steps]) * (1 + 0.08 * number)
            axes.errorbar(
                beside, means, (means - bounds[:, 0], bounds[:, 1] - means), label=f"{name}, 95 % interval", capsize=3,
                lw=1.2, marker=MARKERS[number % len(MARKERS)], ms=4, color=colour,
            )  # fmt: skip
        axes.axhline(0, color="gray", lw=1)
        _by_count(axes, found, "points of mAP lost to the index")

    def cost(axes: Any) -> None:
        for number, step in enumerate(steps):
            style = {"marker": MARKERS[number % len(MARKERS)], "ms": 5, "color": COLOURS[number % len(COLOURS)]}
            for only in (False, True):
                points = [p for p in step["points"] if p["name"].endswith(CODES_ONLY) == only]
                points.sort(key=lambda p: p["latency_ms"]["p50"])
                at = [p["latency_ms"]["p50"] for p in points]
                means = [p["levels"][level]["mean"] for p in points]
                if only:
                    axes.plot(at, means, ls="", mfc="none", **style)
                else:
                    axes.plot(at, means, label=f"{step['count']} distractors", **style)
        axes.set(xscale="log", xlabel="median time of a query, ms (hollow: codes only)", ylabel="mAP")

    def memory(axes: Any) -> None:
        held = [s["index"]["memory_bytes"]["search"] / MB for s in steps]
        full = [s["rows"] * 4 * found["protocol"]["dimension"] / MB for s in steps]
        for x, y, name, number in (
            (full, [s["exact"][level]["mean"] for s in steps], "exact search, float32", 0),
            (held, [of(s, settings[0])["mean"] for s in steps], f"index, {settings[0]}", 1),
        ):
            axes.plot(x, y, marker=MARKERS[number], color=COLOURS[number], label=name)
            for step, at, value in zip(steps, x, y, strict=True):
                axes.annotate(step["count"], (at, value), (5, 4), textcoords="offset points", fontsize=8)
        axes.margins(0.12)
        axes.set(xscale="log", xlabel="memory of search, MB (numbers are distractors)", ylabel="mAP")

    def told(name: str) -> str:
        return ", ".join(f"{s['count']}: {s['exact'][level]['mean']:.3f}" for s in steps) + f"; {name}"

    found_figures = [
        figure(f"mAP by distractors, {level}{behind}", told("exact search"), growth),
        figure(f"Loss to the index, {level}{behind}", "points of mAP lost against exact search at each step", loss),
        figure(f"mAP by time of a query, {level}{behind}", "a line for each number of distractors", cost),
        figure(f"mAP by memory of search, {level}{behind}", "index against exact search", memory),
    ]
    if methods:
        found_figures.insert(1, figure(f"After re-ranking, {level}{behind}", told(", ".join(methods)), reranking))
    return found_figures


def _line(axes: Any, steps: Sequence[Mapping[str, Any]], values: Sequence[float], number: int, label: str) -> None:
    style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.2}
    axes.plot([s["distractors"] for s in steps], values, label=label, color=COLOURS[number % len(COLOURS)], **style)


def _by_count(axes: Any, found: Mapping[str, Any], what: str) -> None:
    """A logarithmic axis of distractors that holds none, too; where they are synthetic is shaded."""
    counts = [s["distractors"] for s in found["steps"]]
    axes.set_xscale("symlog", linthresh=next((c for c in counts if c), 1))
    axes.set_xticks(counts, [_short(c) for c in counts])
    axes.minorticks_off()
    axes.set(xlabel="distractors", ylabel=what)
    if found["steps"][-1]["synthetic"]:
        real = found["protocol"]["real_distractors"]
        axes.axvspan(real, axes.get_xlim()[1], alpha=0.1, color="gray", lw=0)
        axes.text(
            real, 1.0, f" beyond {real:,} photos: synthetic", fontsize=9, va="top", transform=axes.get_xaxis_transform()
        )


def _short(count: int) -> str:
    """10,000 as 10k."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if count >= unit and count % (unit // 10) == 0:
            return f"{count / unit:g}{name}"
    return str(count)


def _similarities(nearest: Mapping[str, Any], label: str) -> Figure:
    pairs = nearest["similarity"]

    def draw(axes: Any) -> None:
        for panel, (name, pair) in zip(axes, pairs.items(), strict=True):
            for number, kind in enumerate(("real", "synthetic")):
                panel.stairs(
                    pair[kind]["share"], pair["distance_edges"], color=COLOURS[number], label=kind, lw=1.6, fill=False
                )
            panel.set_title(name, fontsize=10)
            panel.set(xlabel="Euclidean distance", yticks=[])
        axes[0].set(ylabel="share of the vectors")

    at = nearest["percentiles"].index(50)
    medians = "; ".join(
        f"{name}: median similarity {pair['real']['percentiles'][at]:.3f} real, "
        f"{pair['synthetic']['percentiles'][at]:.3f} synthetic"
        for name, pair in pairs.items()
    )
    title = "Nearest neighbours of real and synthetic vectors" + (f", {label}" if label else "")
    return figure(title, medians, draw, panels=len(pairs))
