"""Scoring of long lists against the loop of the annotation's compute_ap: python benchmarks/evaluate.py

70 lists of 1,000,000 images by ROxford's numbers of labels, at Easy, Medium and Hard. The loop goes over names as the published
code does; it is timed on --slow lists and scaled to all. Both are given lists in memory, so that reading is told apart;
`iir evaluate` as a whole, checksums and reading included, runs in a process of its own, of which the peak memory is told.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from iir_dist import artifact
from iir_dist.artifact import InputRef
from iir_dist.data import groundtruth
from iir_dist.evaluate import EvaluateConfig, numbers_of, run, score
from iir_dist.evaluate.rankings import open_rankings
from iir_dist.index.search import RankingsWriter, SearchConfig

LABELLED = {"easy": 43, "hard": 36, "junk": 47}
BENCHMARK = 4_993
GROUP = 4
"""Lists in a shard, as search writes them."""


def make(root: Path, nq: int, n: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"all_souls_{i:06d}" if i < BENCHMARK else f"revisitop1m/{i % 1000:03d}/{i:09d}" for i in range(n)]
    queries = [f"query_{i:06d}" for i in range(nq)]
    gnd = []
    for _ in queries:
        picked = rng.permutation(BENCHMARK)[: sum(LABELLED.values())]
        parts = np.split(picked, np.cumsum([*LABELLED.values()])[:-1])
        gnd.append({"bbx": [0, 0, 9, 9], **{k: part.tolist() for k, part in zip(LABELLED, parts, strict=True)}})
    (root / "gnd.json").write_text(json.dumps({"imlist": names[:BENCHMARK], "qimlist": queries, "gnd": gnd}))
    table = pa.table({"id": np.arange(n), "name": names})
    nothing = InputRef(uri="nothing", fingerprint="0")
    with artifact.begin(root / "r", "search", SearchConfig(), {"database": nothing, "queries": nothing}) as work:
        writer = RankingsWriter(work.folder, queries, table)
        for number, start in enumerate(range(0, nq, GROUP)):
            group = slice(start, min(start + GROUP, nq))
            noise = rng.random((group.stop - start, n), dtype=np.float32)
            for q, labels in enumerate(gnd[group]):  # positives come early, as in a good ranking
                noise[q, [*labels["easy"], *labels["hard"]]] **= 8
            rows = np.argsort(noise, axis=1)
            writer.write(number, group, 1 - np.take_along_axis(noise, rows, axis=1), rows, [])
        work.publish({"queries": nq}, info={"exact": True, "depth": n, "database_rows": n, "missing": []})


def slow_ap(ranked: Sequence[str], positive: set[str], ignored: set[str]) -> float:
    old_recall, old_precision, ap = 0.0, 1.0, 0.0
    hits = seen = 0
    for name in ranked:
        if name in ignored:
            continue
        if name in positive:
            hits += 1
        recall, precision = hits / len(positive), hits / (seen + 1.0)
        ap += (recall - old_recall) * (old_precision + precision) / 2.0
        old_recall, old_precision = recall, precision
        seen += 1
    return ap


def child(root: Path) -> None:
    """`iir evaluate`, and what it took."""
    start = time.perf_counter()
    run(str(root / "r"), str(root / "gnd.json"), str(root / "m"), EvaluateConfig())
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=70)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--slow", type=int, default=3, help="lists that the loop is timed on")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    with tempfile.TemporaryDirectory(prefix="iir-evaluate-") as scratch:
        root = Path(scratch)
        make(root, arguments.queries, arguments.images)
        size = sum(path.stat().st_size for path in (root / "r").glob("*.parquet"))
        print(f"{arguments.queries} lists of {arguments.images:,}, {size / 2**20:.0f} MB of Parquet")
        done = subprocess.run([sys.executable, __file__, "--child", scratch], check=True, stdout=subprocess.PIPE)
        seconds, peak = json.loads(done.stdout)
        print(f"iir evaluate, all of it        {seconds:8.2f} s, peak {peak:.2f} GB")
        start = time.perf_counter()
        rankings, _, _ = open_rankings(root / "r")
        print(f"  of it checksums and reading  {time.perf_counter() - start:8.2f} s")
        truth = groundtruth.read(root / "gnd.json")
        start = time.perf_counter()
        numbers = numbers_of(rankings, truth)
        matched = time.perf_counter()
        found = score(rankings, truth, numbers)
        fast = time.perf_counter() - matched
        print(f"  of it matching of names      {matched - start:8.2f} s")
        print(f"  of it scoring                {fast:8.2f} s")
        slow, worst = 0.0, 0.0
        for i, query in enumerate(truth.queries[: arguments.slow]):
            ranked = rankings.names.take(pa.array(rankings.lists[query.name])).to_pylist()
            for level, groups in truth.levels().items():
                positive, ignored = ({n for label in g for n in query.labels[label]} for g in groups)
                start = time.perf_counter()
                ap = slow_ap(ranked, positive, ignored)
                slow += time.perf_counter() - start
                worst = max(worst, abs(ap - found[level][i].score.ap))
        slow *= len(truth.queries) / arguments.slow
        print(f"the loop, {arguments.slow} lists, scaled        {slow:8.2f} s: {slow / fast:.0f} x the scoring")
        print(f"largest difference of an AP    {worst:.1e}")


if __name__ == "__main__":
    main()
