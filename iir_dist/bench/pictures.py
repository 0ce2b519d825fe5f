"""`bench.json` as one self-contained page: tables and curves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib import resources
from typing import Any


def render(found: dict[str, Any]) -> str:
    """The page; it opens offline."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(resources.files("iir_dist.bench").joinpath("report.html.j2").read_text())
    steps = found["steps"]
    levels = list(steps[0]["exact"])
    return template.render(
        levels=levels,
        steps=steps,
        plots=[plot for level in levels for plot in _plots(found, level)],
        nearest=found["nearest"],
        protocol=json.dumps(found["protocol"], indent=2),
    )


def _plots(found: dict[str, Any], level: str) -> list[tuple[str, str]]:
    steps = found["steps"]
    names = list(dict.fromkeys(p["name"] for step in steps for p in step["points"]))
    real = found["protocol"]["real_distractors"]

    def growth(axes: Any) -> None:
        counts = [max(1, s["distractors"]) for s in steps]
        means = [s["exact"][level]["mean"] for s in steps]
        bounds = [s["exact"][level]["interval"] or [m, m] for s, m in zip(steps, means, strict=True)]
        axes.fill_between(counts, [b[0] for b in bounds], [b[1] for b in bounds], alpha=0.15)
        axes.plot(counts, means, marker="o", label="exact search, 95 % interval")
        for name in names:
            values = [next(p for p in s["points"] if p["name"] == name)["levels"][level]["mean"] for s in steps]
            axes.plot(counts, values, marker=".", linestyle="--", label=f"index, {name}")
        for number, method in enumerate(steps[0]["reranked"]):
            values = [s["reranked"][number]["levels"][level]["mean"] for s in steps]
            axes.plot(counts, values, marker="x", linestyle=":", label=f"index, then {method['name']}")
        if steps[-1]["synthetic"]:
            axes.axvline(real, color="gray", linestyle=":")
            axes.text(real, axes.get_ylim()[0], " synthetic from here on", fontsize="small", va="bottom", color="gray")
        axes.set(xscale="log", xlabel="distractors (1 stands for none)", ylabel="mAP")

    def cost(axes: Any) -> None:
        for step in steps:
            points = sorted(step["points"], key=lambda p: p["latency_ms"]["p50"])
            axes.plot(
                [p["latency_ms"]["p50"] for p in points], [p["levels"][level]["mean"] for p in points], marker="o",
                label=f"{step['distractors']:,} distractors",
            )  # fmt: skip
        axes.set(xscale="log", xlabel="median time of a query, ms", ylabel="mAP")

    def memory(axes: Any) -> None:
        sizes = [s["index"]["memory_bytes"]["search"] / 2**20 for s in steps]
        axes.plot(sizes, [s["points"][0]["levels"][level]["mean"] for s in steps], marker="o", label="index, default")
        exact = [s["rows"] * 4 * found["protocol"]["dimension"] / 2**20 for s in steps]
        axes.plot(exact, [s["exact"][level]["mean"] for s in steps], marker="o", label="exact search, float32")
        axes.set(xscale="log", xlabel="memory of search, MB", ylabel="mAP")

    titles = {"mAP and number of distractors": growth, "mAP and latency": cost, "mAP and memory": memory}
    return [(f"{title}: {level}", _svg(draw)) for title, draw in titles.items()]


def _svg(draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
