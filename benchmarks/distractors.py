"""mAP and cost of search among up to a million distractors, on the development photos.

    python benchmarks/distractors.py --data DIR [--out bench-distractors] [--steps 0,1000,…]

wonders11 is the benchmark, distractors2k are the real distractors; what lies beyond are synthetic vectors, and said to be.
EfficientNet-Lite0, 224 px, whitened to 512 dimensions by Lw learnt on train19. Every stage goes on where it was stopped.
Memory is that of this process and all that it starts (PSS: shared pages count once), sampled every two seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
import time
from typing import Any

import psutil
from chain import tree_pss

MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with wonders11.tar, distractors2k.tar, train19.tar and the ground truth")
    parser.add_argument("--out", default="bench-distractors")
    parser.add_argument("--steps", default="0,1000,10000,100000,1000000")
    arguments = parser.parse_args()
    if not arguments.data:
        sys.exit("the benchmark needs real photos: make bench-distractors DATA=DIR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("iir_dist").setLevel(logging.INFO)
    samples = [0]
    threading.Thread(target=sample, args=(samples,), daemon=True).start()
    start = time.perf_counter()
    embedded(arguments.data, arguments.out)
    prepared = time.perf_counter() - start
    steps = [int(step) for step in arguments.steps.split(",")]
    found = curve(arguments.out, steps)
    seconds = time.perf_counter() - start
    points(found["steps"])
    indexes(found["steps"])
    print("\n* with synthetic distractors")
    print(f"all of it {seconds:.0f} s, of which {prepared:.0f} s until the photos were embedded and whitened")
    print(f"peak memory of all processes together: {max(samples) / MB:,.0f} MB")
    print(f"report: {arguments.out}/curve/report.html")


def sample(samples: list[int]) -> None:
    root = psutil.Process()
    while True:
        samples.append(tree_pss(root))
        time.sleep(2)


def embedded(data: str, out: str) -> None:
    """Photos to whitened embeddings."""
    from iir_dist import embed, ingest, whiten
    from iir_dist.models import encoder

    photos = {
        "bench": ("wonders11", "db"),
        "distractors": ("distractors2k", "distractor"),
        "train": ("train19", "train"),
    }
    truth = f"{data}/groundtruth/wonders11/gnd_wonders11.pkl"
    for name, (tar, split) in photos.items():
        config = ingest.IngestConfig.model_validate({"split": split, "shard_mb": 16})
        of_queries = truth if name == "bench" else None
        ingest.run([f"{data}/{tar}.tar"], f"{out}/images/{name}", config, groundtruth_uri=of_queries)
    encoder.run(f"{out}/lite0", encoder.EncoderConfig(backbone="efficientnet_lite0", size=224))
    for name in photos:
        embed.run(f"{out}/images/{name}", f"{out}/lite0", f"{out}/plain/{name}", embed.EmbedConfig())
    white = whiten.WhitenConfig.model_validate({"method": "lw", "dim": 512})
    whiten.run(f"{out}/plain/train", f"{out}/lite0", f"{out}/white", white, images_uri=f"{out}/images/train")
    for name in ("bench", "distractors"):
        embed.run(f"{out}/plain/{name}", f"{out}/white", f"{out}/embeddings/{name}", embed.EmbedConfig())


def curve(out: str, steps: list[int]) -> dict[str, Any]:
    """`bench.json` of the curve."""
    from iir_dist.bench import stage

    config = stage.BenchConfig.model_validate({"steps": steps})
    stage.run(
        f"{out}/embeddings/bench", f"{out}/images/bench", [f"{out}/embeddings/distractors"], f"{out}/curve", config
    )
    with open(f"{out}/curve/bench.json") as file:
        found: dict[str, Any] = json.load(file)
    return found


def count(step: dict[str, Any]) -> str:
    return f"{step['distractors']:,}{'*' if step['synthetic'] else ''}"


def points(steps: list[dict[str, Any]]) -> None:
    print(
        "\n| distractors | search | nprobe | refine | recall@10 | mAP | loss, points (95 % interval) | ms a query | queries/s |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for step in steps:
        for level, exact in step["exact"].items():
            print(f"| {count(step)} | exact | | | | {said(exact, 1, 4)} | | | |")
            for p in step["points"]:
                recall = "" if p["recall@10"] is None else f"{p['recall@10']:.3f}"
                name = p["name"] if p["reached"] else f"{p['name']}, not reached"
                value = p["levels"][level]
                print(
                    f"| {count(step)} | {name} | {p['nprobe']} | {p['refine']} | {recall} | {value['mean']:.4f} "
                    f"| {said(value['loss'], 100, 2)} | {p['latency_ms']['p50']:.2f} | {p['queries_per_sec']:,.0f} |"
                )
            for p in step["reranked"]:
                value = p["levels"][level]
                print(
                    f"| {count(step)} | default, then {p['name']} | | | | {value['mean']:.4f} "
                    f"| {said(value['loss'], 100, 2)} | + {p['ms_per_query']:.1f} | |"
                )


def said(value: dict[str, Any], factor: float, digits: int) -> str:
    interval = " to ".join(f"{factor * bound:.{digits}f}" for bound in value["interval"] or ())
    return f"{factor * value['mean']:.{digits}f} ({interval})"


def indexes(steps: list[dict[str, Any]]) -> None:
    print(
        "\n| distractors | of them synthetic | factory | build, s | points, s | search, MB | on disk, MB | worker, MB | exact, s |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for step in steps:
        i = step["index"]
        print(
            f"| {count(step)} | {step['synthetic']:,} | {i['factory']} | {i['build_seconds']:.1f} | {i['measure_seconds']:.1f} "
            f"| {i['memory_bytes']['search'] / MB:,.1f} | {i['bytes'] / MB:,.0f} | {i['memory_bytes']['build'] / MB:,.0f} "
            f"| {step['seconds']['exact']:.1f} |"
        )


if __name__ == "__main__":
    main()
