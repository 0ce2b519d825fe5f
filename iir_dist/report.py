"""Finished evaluations to one self-contained HTML file. It reads; no stage knows of it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.images import thumbnail
from iir_dist.errors import ImageError, InputError
from iir_dist.storage import Folder

COLUMNS = {"map": "mAP", "mp@1": "mP@1", "mp@5": "mP@5", "mp@10": "mP@10"}


class ReportConfig(StageConfig):
    """`[report]`."""

    title: str = "Retrieval report"
    labels: tuple[str, ...] = ()
    """Names of the runs, in order; folder names where not given."""
    queries: int = Field(6, ge=0)
    """Queries shown with their lists."""
    depth: int = Field(8, ge=1, le=20)
    """Images shown of each list."""
    thumbnail_px: int = Field(160, ge=32, le=512)
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One finished evaluation under its label."""

    label: str
    folder: Folder
    result: dict[str, Any]

    def table(self, name: str) -> list[dict[str, Any]]:
        with self.folder.open(name) as file:
            rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        return rows


class Thumbnails:
    """Small images by name out of images artifacts, read only where a report shows them."""

    def __init__(self, sources: Sequence[tuple[Folder, Manifest]], side: int) -> None:
        self._side = side
        self._where: dict[tuple[str, bool], tuple[Folder, str, int]] = {}
        for folder, manifest in sources:
            for shard in manifest.shards():
                with folder.open(shard) as file:
                    table = pq.ParquetFile(file).read(columns=["name", "split"])
                names, splits = table.column("name").to_pylist(), table.column("split").to_pylist()
                for row, (name, split) in enumerate(zip(names, splits, strict=True)):
                    self._where.setdefault((name, split == "query"), (folder, shard, row))

    def load(self, wanted: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], str]:
        """data: URLs of (name, is query) pairs; those that no artifact holds are left out."""
        by_shard: dict[tuple[str, str], list[tuple[tuple[str, bool], int]]] = {}
        folders: dict[str, Folder] = {}
        for key in dict.fromkeys(wanted):
            if key in self._where:
                folder, shard, row = self._where[key]
                folders[folder.uri] = folder
                by_shard.setdefault((folder.uri, shard), []).append((key, row))
        found = {}
        for (uri, shard), keys in by_shard.items():
            with folders[uri].open(shard) as file:
                table = pq.ParquetFile(file).read(columns=["bytes", "box"]).take([row for _, row in keys])
            for (key, _), item in zip(keys, table.to_pylist(), strict=True):
                try:
                    jpeg = thumbnail(item["bytes"], self._side, item["box"])
                except ImageError:
                    continue
                found[key] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        return found


def run(
    metrics: Sequence[str], images: Sequence[str], out: str, config: ReportConfig, *, force: bool = False
) -> Manifest:
    """Write `index.html` for one or more evaluations.

    Args:
        metrics: evaluation folders, the first being the one that queries are chosen by.
        images: images artifacts to take thumbnails from; without any, names stand in their place.
    """
    if not metrics:
        raise InputError("no evaluation given; expected one or more metrics folders")
    if config.labels and len(config.labels) != len(metrics):
        raise InputError(f"report.labels has {len(config.labels)} names for {len(metrics)} evaluations")
    sources = [artifact.require(uri, "evaluate") for uri in metrics]
    photos = [artifact.require(uri, "ingest") for uri in images]
    refs = {"metrics": artifact.combine(artifact.reference(*s) for s in sources)}
    if photos:
        refs["images"] = artifact.combine(artifact.reference(*s) for s in photos)
    with artifact.begin(out, "report", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        labels = config.labels or tuple(Path(uri.rstrip("/")).name for uri in metrics)
        evaluations = [
            Evaluation(label, folder, json.loads(folder.read("metrics.json")))
            for label, (folder, _) in zip(labels, sources, strict=True)
        ]
        with work.folder.publish("index.html") as file:
            file.path.write_text(_render(evaluations, Thumbnails(photos, config.thumbnail_px), config))
        return work.publish({"evaluations": len(evaluations)}, {"index.html": artifact.entry_of(file)})


def _render(evaluations: Sequence[Evaluation], thumbnails: Thumbnails, config: ReportConfig) -> str:
    import jinja2

    # Names come from other people's files, so everything is escaped.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(resources.files("iir_dist").joinpath("report.html.j2").read_text())
    return template.render(
        title=config.title,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        columns=list(COLUMNS.values()),
        rows=table_rows(evaluations),
        plots=_plots(evaluations),
        strips=_strips(evaluations, thumbnails, config),
        protocols=[(e.label, json.dumps(e.result["protocol"], indent=2)) for e in evaluations],
    )


def table_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row for each evaluation and level; the best of each level is marked."""
    rows = []
    for evaluation in evaluations:
        protocol = evaluation.result["protocol"]
        for level, m in evaluation.result["metrics"].items():
            if m["num_queries"]:
                search = "unknown" if not protocol["verified"] else "exact" if protocol["search"]["exact"] else "index"
                rows.append(
                    {
                        "label": evaluation.label, "level": level, "interval": m["map_interval"],
                        "scores": {name: m.get(key) for key, name in COLUMNS.items()}, "figure": protocol["figure"],
                        "differs_in": m["differs_in"], "num_queries": m["num_queries"],
                        "database": protocol["database_rows"] or "unknown", "search": search,
                    }
                )  # fmt: skip
    for row in rows:
        rivals = [r for r in rows if (r["level"], r["database"]) == (row["level"], row["database"])]
        row["best"] = {
            c: len(rivals) > 1 and row["scores"][c] == max((r["scores"][c] or 0 for r in rivals), default=0)
            for c in COLUMNS.values()
        }
    return rows


def _plots(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    from matplotlib.figure import Figure

    levels = list(dict.fromkeys(level for e in evaluations for level in e.result["curves"]))
    plots = []
    for level in levels:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for evaluation in evaluations:
            curve = evaluation.result["curves"].get(level)
            if curve:
                axes.plot(np.linspace(0, 1, len(curve)), curve, marker=".", label=evaluation.label)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plots.append((level, out.getvalue()[out.getvalue().index("<svg") :]))
    return plots


def _strips(evaluations: Sequence[Evaluation], thumbnails: Thumbnails, config: ReportConfig) -> list[dict[str, Any]]:
    if not config.queries:
        return []
    tops = [_by_query(e.table("top.parquet")) for e in evaluations]
    levels = [next(iter(top.values()))[0]["level"] for top in tops]
    aps = [
        {r["query"]: r["ap"] for r in e.table("per_query.parquet") if r["level"] == level}
        for e, level in zip(evaluations, levels, strict=True)
    ]
    ranked = sorted((q for q, ap in aps[0].items() if ap is not None), key=lambda q: -aps[0][q])
    picks = np.unique(np.linspace(0, len(ranked) - 1, min(config.queries, len(ranked))).round().astype(int))
    chosen = [ranked[i] for i in picks]
    lists = {(i, q): top.get(q, [])[: config.depth] for i, top in enumerate(tops) for q in chosen}
    wanted = [(q, True) for q in chosen] + [(item["name"], False) for items in lists.values() for item in items]
    urls = thumbnails.load(wanted)
    return [
        {
            "query": query,
            "image": urls.get((query, True)),
            "runs": [
                {
                    "label": e.label, "ap": aps[i].get(query),
                    "top": [{**item, "image": urls.get((item["name"], False))} for item in lists[i, query]],
                }
                for i, e in enumerate(evaluations)
            ],
        }
        for query in chosen
    ]  # fmt: skip


def _by_query(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["query"], []).append(dict(row))
    return found
