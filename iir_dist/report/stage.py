"""The report as a stage: finished evaluations and distractor benchmarks in, `index.html` out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.errors import IirError, InputError
from iir_dist.report import distractors
from iir_dist.report.evaluations import Evaluation, beside_published, curves, read, summary, table_rows
from iir_dist.report.page import render
from iir_dist.report.photos import Photos
from iir_dist.report.strips import strips
from iir_dist.storage import Folder

log = logging.getLogger(__name__)


class ReportConfig(StageConfig):
    """`[report]`."""

    title: str = "Retrieval report"
    labels: tuple[str, ...] = ()
    """Names of the folders, in order; their own names where not given."""
    queries: int = Field(100, ge=0)
    """Queries shown with their lists at most; 0 for none."""
    depth: int = Field(10, ge=1, le=20)
    """Images shown of each list."""
    thumbnail_px: int = Field(160, ge=32, le=512)
    execution: ClassVar[frozenset[str]] = frozenset()


def run(
    folders: Sequence[str], images: Sequence[str], out: str, config: ReportConfig, *, force: bool = False
) -> Manifest:
    """Write `index.html`.

    Args:
        folders: what `evaluate` and `bench distractors` wrote. Other evaluations are compared with the first.
        images: images artifacts to take photos from; without any, names stand in their place.

    Raises:
        InputError: one is not such a folder, or none of the photos is in `images`.
        MismatchError: evaluations are not over the same queries, protocol and figure.
        CorruptError: a file is not the one that was written.
    """
    if not folders:
        raise InputError("no folder given; expected what iir evaluate or iir bench distractors wrote, one or more")
    if config.labels and len(config.labels) != len(folders):
        raise InputError(f"report.labels has {len(config.labels)} names for {len(folders)} folders")
    if len(set(config.labels)) < len(config.labels):
        raise InputError(
            f"report.labels names two folders alike: {', '.join(config.labels)}; expected names that differ"
        )
    sources = [artifact.require(uri, "evaluate", "bench") for uri in folders]
    photos = [artifact.require(uri, "ingest") for uri in images]
    refs = {"metrics": artifact.combine(artifact.reference(*s) for s in sources)}
    if photos:
        refs["images"] = artifact.combine(artifact.reference(*s) for s in photos)
    with artifact.begin(out, "report", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        try:
            page, counts = _page(list(zip(config.labels or labels_of(folders), sources, strict=True)), photos, config)
        except IirError:
            work.folder.delete_all(artifact.WORK)  # there is nothing in it for the next run to go on with
            raise
        with work.folder.publish("index.html") as file:
            file.path.write_text(page)
        return work.publish(counts, {"index.html": artifact.entry_of(file)})


def _page(
    labelled: Sequence[tuple[str, tuple[Folder, Manifest]]],
    photos: Sequence[tuple[Folder, Manifest]],
    config: ReportConfig,
) -> tuple[str, dict[str, int]]:
    """The page, and how many evaluations and benchmarks are on it."""
    metrics = [(label, source) for label, source in labelled if source[1].stage == "evaluate"]
    benches = [
        (label, distractors.read(*source), source[1]) for label, source in labelled if source[1].stage == "bench"
    ]
    evaluations = read([label for label, _ in metrics], [source for _, source in metrics])
    counts = {"evaluations": len(evaluations), "benchmarks": len(benches)}
    return _render(evaluations, benches, Photos(photos, config.thumbnail_px), config), counts


def labels_of(uris: Sequence[str]) -> list[str]:
    """Last components, with as many before them as tell all apart.

    >>> labels_of(["a/exact/metrics", "a/index/metrics/"])
    ['exact/metrics', 'index/metrics']
    """
    parts = [uri.rstrip("/").split("/") for uri in uris]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise InputError(f"a folder is given twice: {', '.join(uris)}; give each once")


def _render(
    evaluations: Sequence[Evaluation],
    benches: Sequence[tuple[str, dict[str, Any], Manifest]],
    photos: Photos,
    config: ReportConfig,
) -> str:
    rows = table_rows(evaluations)
    shown = strips(evaluations, photos, config.queries, config.depth) if evaluations else []
    items = [item for strip in shown for run in strip["runs"] for item in run["items"]]
    lacking = sorted({item["name"] for item in items if item["photo"] is None})
    if photos.data and lacking:
        log.warning(
            "report: %d of %d images shown have no photo in the folders given (first %s); their names stand there",
            len(lacking), len({item["name"] for item in items}), lacking[0],
        )  # fmt: skip
    return render(
        "report.html.j2",
        title=config.title,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=summary(evaluations, rows) if evaluations else [],
        columns=list(dict.fromkeys(name for row in rows for name in row["scores"])),
        rows=rows,
        differences=[(e.label, d) for e in evaluations for d in e.protocol["differences"]],
        published=beside_published(evaluations),
        figures=curves(evaluations),
        strips=shown,
        lacking=lacking if photos.data else [],
        num_queries=evaluations[0].protocol["ground_truth"]["queries"] if evaluations else 0,
        photos=photos.data,
        benches=[distractors.described(found, label, manifest) for label, found, manifest in benches],
        texts=[text for e in evaluations for text in _texts(e)],
    )


def _texts(evaluation: Evaluation) -> list[tuple[str, str]]:
    found: list[tuple[str, Any]] = [(f"{evaluation.label}: protocol", evaluation.protocol)]
    if evaluation.manifest is not None:
        # Its info repeats protocol and figures.
        value = evaluation.manifest.model_dump(mode="json")
        value["info"] = {k: v for k, v in value["info"].items() if k not in ("protocol", "metrics")}
        found.append((f"{evaluation.label}: manifest", value))
    return [(title, json.dumps(value, indent=2, ensure_ascii=False)) for title, value in found]
