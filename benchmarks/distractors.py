"""mAP and cost of search among up to a million distractors, on the development photos.

    python benchmarks/distractors.py --data DIR [--out bench-distractors] [--steps 0,1000,…]

wonders11 is the benchmark, distractors2k are the real distractors; what lies beyond are synthetic vectors, and said to be.
EfficientNet-Lite0, 224 px, whitened to 512 dimensions by Lw learnt on train19. Every stage goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with wonders11.tar, distractors2k.tar, train19.tar and the ground truth")
    parser.add_argument("--out", default="bench-distractors")
    parser.add_argument("--steps", default="0,1000,10000,100000,1000000")
    arguments = parser.parse_args()
    if not arguments.data:
        sys.exit("the benchmark needs real photos: make bench-distractors DATA=DIR")

    from iir_dist import embed, ingest, whiten
    from iir_dist.bench import stage
    from iir_dist.models import encoder

    data, out = arguments.data, arguments.out
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

    start = time.perf_counter()
    config = stage.BenchConfig.model_validate({"steps": [int(step) for step in arguments.steps.split(",")]})
    folder = f"{out}/curve"
    stage.run(f"{out}/embeddings/bench", f"{out}/images/bench", [f"{out}/embeddings/distractors"], folder, config)
    seconds = time.perf_counter() - start
    with open(f"{folder}/bench.json") as file:
        found = json.load(file)
    print(
        "\n| distractors | search | recall@10 | mAP | loss, points (95 % interval) | ms a query |\n|---:|---|---:|---:|---:|---:|"
    )
    for step in found["steps"]:
        for level, exact in step["exact"].items():
            star = "*" if step["synthetic"] else ""
            print(f"| {step['distractors']:,}{star} | exact | | {exact['mean']:.4f} | | |")
            for point in step["points"]:
                recall = point["recall@10"]
                row(
                    point["name"],
                    "" if recall is None else f"{recall:.3f}",
                    point["levels"][level],
                    f"{point['latency_ms']['p50']:.2f}",
                )
            for method in step["reranked"]:
                row(f"default, then {method['name']}", "", method["levels"][level], f"+ {method['ms_per_query']:.1f}")
    worker = max(step["index"]["memory_bytes"]["build"] for step in found["steps"])
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\n* with synthetic distractors. The curve took {seconds:.0f} s")
    print(f"peak memory: this process {own >> 20} MB, a worker {worker >> 20} MB")
    print(f"report: {folder}/report.html")


def row(name: str, recall: str, level: dict[str, dict[str, float]], ms: str) -> None:
    loss = level["loss"]
    interval = " to ".join(f"{100 * bound:.2f}" for bound in loss["interval"] or ())
    print(f"| | {name} | {recall} | {level['mean']:.4f} | {100 * loss['mean']:.2f} ({interval}) | {ms} |")


if __name__ == "__main__":
    main()
