"""Small finished artifacts for pages, written by hand: photos, evaluations of made-up rankings, a made-up benchmark."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from iir_dist import artifact, evaluate
from iir_dist.artifact import InputRef
from iir_dist.config import StageConfig
from iir_dist.evaluate import EvaluateConfig

QUERIES = [f"tower_{q}" for q in range(4)]
IMAGES = [f"view_{i:02d}" for i in range(24)]


def truth(folder: Path) -> str:
    """Query q: images 4q to 4q + 2 are easy, 4q + 3 is hard, 16 + q is junk."""
    gnd = [
        {"bbx": [4, 4, 60, 44], "easy": [4 * q, 4 * q + 1, 4 * q + 2], "hard": [4 * q + 3], "junk": [16 + q]}
        for q in range(len(QUERIES))
    ]
    path = folder / "truth.json"
    path.write_text(json.dumps({"imlist": IMAGES, "qimlist": QUERIES, "gnd": gnd}))
    return str(path)


def lists(seed: int) -> list[list[int]]:
    """A list of all images for each query; positives tend to the front."""
    rng = np.random.default_rng(seed)
    noise = rng.random((len(QUERIES), len(IMAGES)))
    for q in range(len(QUERIES)):
        noise[q, 4 * q : 4 * q + 4] *= 0.1 + 0.3 * q
    return [row.tolist() for row in np.argsort(noise, axis=1)]


def evaluated(
    folder: Path, truth_uri: str, ranked: Sequence[Sequence[int]], source: Path | None = None, **settings: Any
) -> Path:
    """Metrics of rankings that look like those of search, or of a re-ranking of what is at `source`."""
    stage = "rerank" if source else "search"
    nothing = InputRef(uri="nothing", fingerprint="0" * 64)
    inputs = {"database": nothing, "queries": nothing}
    if source:
        inputs["rankings"] = artifact.reference(*artifact.require(source, "search", "rerank"))
    rows = [(QUERIES[q], rank, i, IMAGES[i]) for q, row in enumerate(ranked) for rank, i in enumerate(row)]
    queries, ranks, ids, names = zip(*rows, strict=True)
    scores = pa.array([1 - 0.01 * rank for rank in ranks], pa.float32())
    table = pa.table({"query": queries, "rank": ranks, "id": ids, "name": names, "score": scores})
    with artifact.begin(folder / "r", stage, StageConfig(), inputs) as work:
        with work.folder.publish("shard-00000.parquet") as file:
            pq.write_table(table, file.path)
        artifact.commit(work.folder, 0, {"shard-00000.parquet": artifact.entry_of(file)})
        info = {"exact": True, "database_rows": len(IMAGES), "missing": []}
        info |= {"rerank": {"name": "qe"}, "search": {}} if source else {}
        work.publish({"queries": len(QUERIES)}, info=info)
    evaluate.run(str(folder / "r"), truth_uri, str(folder / "m"), EvaluateConfig.model_validate(settings))
    return folder / "m"


def photos(folder: Path, names: Sequence[str] = IMAGES, queries: Sequence[str] = QUERIES) -> Path:
    """An images artifact; the photo of an image has a colour of its own."""
    columns: dict[str, list[Any]] = {name: [] for name in ("name", "split", "box", "bytes")}
    for split, group in (("db", names), ("query", queries)):
        for name in group:
            out = io.BytesIO()
            colour = tuple(hashlib.sha256(name.encode()).digest()[:3])
            Image.new("RGB", (64, 48), colour).save(out, "JPEG")  # type: ignore[arg-type]
            columns["name"].append(name)
            columns["split"].append(split)
            columns["box"].append([4, 4, 60, 44] if split == "query" else None)
            columns["bytes"].append(out.getvalue())
    kinds = {"name": pa.string(), "split": pa.string(), "box": pa.list_(pa.float32(), 4), "bytes": pa.binary()}
    with artifact.begin(folder, "ingest", StageConfig(), {}) as work:
        with work.folder.publish("shard-00000.parquet") as file:
            pq.write_table(pa.table({k: pa.array(v, kinds[k]) for k, v in columns.items()}), file.path)
        artifact.commit(work.folder, 0, {"shard-00000.parquet": artifact.entry_of(file)})
        work.publish({"out": len(columns["name"])})
    return folder


# ------------------------------------------------------------------------------------------------ distractors


def benchmarked(counts: Sequence[int] = (0, 1_000, 10_000, 1_000_000), real: int = 2_000) -> dict[str, Any]:
    """A made-up `bench.json`: mAP falls by 0.05 a step, the index loses 0.004 of it."""

    def value(mean: float) -> dict[str, Any]:
        return {"mean": mean, "interval": [mean - 0.05, mean + 0.06]}

    def levels(mean: float, lost: float) -> dict[str, Any]:
        return {"medium": {**value(mean - lost), "loss": {"mean": lost, "interval": [lost - 0.002, lost + 0.003]}}}

    steps = []
    for number, count in enumerate(counts):
        exact, rows = 0.7 - 0.05 * number, 1_104 + count
        points = [
            {
                "name": name, "nprobe": 4 + number, "refine": refine, "recall@10": recall, "reached": recall != 0.97,
                "levels": levels(exact, lost), "queries_per_sec": 3e4 / (1 + number + refine), "long_list_ms": 12.5,
                "latency_ms": {"p50": 0.4 + number, "p95": 0.6 + number, "p99": 0.9 + number},
            }
            for name, refine, recall, lost in (
                ("default", 4, 0.953, 0.004), ("default, codes only", 0, None, 0.02), ("recall 0.99", 8, 0.97, 0.001),
            )
        ]  # fmt: skip
        reranked = [
            {"name": name, "settings": {"n": 400}, "levels": levels(exact, -gain), "ms_per_query": 4.2}
            for name, gain in (("qe", 0.05), ("superglobal", 0.08))
        ]
        memory = {"search": 140 * rows, "search_planned": 140 * rows, "build": 2**29, "build_planned": 2**29}
        index = {
            "factory": "IVF16,PQ256x4fsr", "build_seconds": 1.5, "measure_seconds": 2.5, "memory_bytes": memory,
            "bytes": 1200 * rows,
        }  # fmt: skip
        steps.append(
            {
                "distractors": count, "synthetic": max(0, count - real), "rows": rows, "exact": {"medium": value(exact)},
                "points": points, "reranked": reranked, "index": index, "peak_bytes": 2**30,
                "seconds": {"exact": 0.1, "points": 1.0, "rerank": 2.0},
            }
        )  # fmt: skip
    share = np.hanning(40) / np.hanning(40).sum()
    kinds = {
        kind: {"percentiles": np.linspace(at, at + 0.4, 7).round(3).tolist(), "share": np.roll(share, 3 * i).tolist()}
        for i, (kind, at) in enumerate((("real", 0.3), ("synthetic", 0.33)))
    }
    names = ("to the nearest neighbour", "of a query to its nearest distractor", "to the nearest real one")
    similarity = {name: {"distance_edges": np.linspace(0.5, 1.2, 41).tolist(), **kinds} for name in names}
    nearest = {"percentiles": [1, 5, 25, 50, 75, 95, 99], "vectors": real, "similarity": similarity}
    protocol = {
        "name": "revisited", "queries": 55, "list_depth": 10_000, "timed_depth": 100, "dimension": 512, "encoder": None,
        "real_distractors": real, "operating_points": "chosen", "synthetic": "vectors of a mixture",
    }  # fmt: skip
    return {"protocol": protocol, "steps": steps, "nearest": nearest if steps[-1]["synthetic"] else None}


def bench_folder(folder: Path, found: Mapping[str, Any]) -> Path:
    """A finished benchmark that holds it."""
    with artifact.begin(folder, "bench", StageConfig(), {}) as work:
        with work.folder.publish("bench.json") as file:
            file.path.write_text(json.dumps(found))
        work.publish({"steps": len(found["steps"])}, {"bench.json": artifact.entry_of(file)})
    return folder
