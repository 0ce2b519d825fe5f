"""The demo on a cluster that loses a node: python tests/cluster/demo.py [--data DIR] [--out DIR] (make cluster-demo).

A head, two workers and SeaweedFS on this machine, nothing shared but the store. The demo is submitted as a job; while it
fine-tunes, a worker node is killed and another one comes. At the end the same demo runs without a cluster, and every figure
of the two is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nodes import Cluster, namespaces
from submission import Submission

from iir_dist.storage import Folder, open_folder

sys.path.append(str(Path(__file__).parents[1]))
from store import seaweed

log = logging.getLogger("cluster-demo")
TOLERANCE = 5e-4
"""Of mAP. Training, embedding and exact search have the same bits; k-means of an index has as many threads as its node."""
PHOTOS = (
    "wonders11.tar",
    "groundtruth/wonders11/gnd_wonders11.pkl",
    "train19.tar",
    "unlabelled3k.tar",
    "distractors2k.tar",
)
KILL_AT = "encoders/contrastive-ap/checkpoints/"
"""A node is killed once this is there."""


def main() -> int:
    """Exit code 0 where the figures are the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the development photos; the procedural world where not given")
    parser.add_argument("--out", type=Path, default=Path("cluster-demo"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if namespaces() is None:
        log.error("this machine gives no mount namespaces (Linux; root or unprivileged user namespaces)")
        return 1
    out = options.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    (out / "store").mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="iir-nodes-") as nodes, seaweed(out / "store") as variables:
        os.environ.update(variables)
        with Cluster(Path(nodes)) as cluster:
            on_cluster(cluster, options.data)
        found = figures("s3://test/demo")
    log.info("the same on this machine alone")
    data = ["--data", str(options.data)] if options.data else []
    subprocess.run([sys.executable, "-m", "iir_dist", "demo", "--out", str(out / "alone"), *data], check=True)
    return compare(found, figures(str(out / "alone")))


def on_cluster(cluster: Cluster, data: Path | None) -> None:
    """Submit the demo; kill a node on the way. Raises `SystemExit` where the job fails."""
    cluster.start_head()
    for name in ("a", "b"):
        cluster.add(name, wait=False)
    cluster.await_nodes()
    log.info("a head and two workers at %s", cluster.url)
    line = ["demo", "--out", "s3://test/demo"]
    if data is not None:
        photos = open_folder("s3://test/photos")
        for name in PHOTOS:
            with photos.publish(name) as file:
                shutil.copyfile(data / name, file.path)
        line += ["--data", "s3://test/photos"]
    job = Submission(cluster, line, show=True)
    folder = open_folder("s3://test/demo")
    while not any(True for _ in folder.list(KILL_AT)):
        if job.process.poll() is not None:
            raise SystemExit(f"the demo ended with exit code {job.process.returncode} before a node could be killed")
        time.sleep(1)
    log.info("node a is killed")
    cluster.kill("a")
    cluster.add("c", wait=False)
    code, _ = job.wait(7200)
    if code:
        raise SystemExit(f"the demo on the cluster ended with exit code {code}")


def figures(root: str) -> dict[str, float]:
    """mAP of every evaluation of a demo."""
    folder: Folder = open_folder(f"{root}/metrics")
    found = {}
    for entry in folder.list():
        name, _, file = entry.name.partition("/")
        if file == "metrics.json":
            metrics = json.loads(folder.read(entry.name))["metrics"]
            found |= {f"{name}, {level}": m["map"] for level, m in metrics.items() if m["map"] is not None}
    return found


def compare(cluster: dict[str, float], alone: dict[str, float]) -> int:
    """Show both; 1 where they differ."""
    log.info("%-55s %9s %9s", "mAP", "cluster", "alone")
    for name, value in alone.items():
        log.info("%-55s %9.4f %9.4f", name, cluster.get(name, float("nan")), value)
    same = cluster.keys() == alone.keys() and all(
        abs(cluster[name] - value) <= TOLERANCE for name, value in alone.items()
    )
    log.info("the figures are the same" if same else "THE FIGURES DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
