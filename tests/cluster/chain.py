"""The chain on a tiny procedural world, as command lines of `iir`; one CPU a worker, so that every machine has the same bits."""

from __future__ import annotations

from pathlib import Path

from iir_dist.artifact import Manifest, read_manifest
from iir_dist.storage import open_folder

TRAINING = (
    "projection=16", "size=48", "batches.classes=4", "batches.per_class=3", "chunk=3", "steps=12", "checkpoint_every=2",
    "loss.name=smooth_ap", "workers=2",
)  # fmt: skip


def lines(photos: str, root: str) -> dict[str, list[str]]:
    """The steps in order, from the archives below `photos` to metrics below `root`."""

    def sets(*settings: str) -> list[str]:
        return [word for setting in settings for word in ("--set", setting)]

    def out(name: str) -> list[str]:
        return ["--out", f"{root}/{name}"]

    truth = ["--groundtruth", f"{photos}/groundtruth.json"]
    return {
        "train": ["ingest", f"{photos}/train.tar", "--split", "train", *out("train"), *sets("shard_mb=0.03")],
        "images": ["ingest", f"{photos}/benchmark.tar", *truth, *out("images"), *sets("shard_mb=0.03")],
        "encoder": ["encoder", *out("encoder"), *sets("backbone=resnet18", "weights=random", "size=64")],
        "tuned": ["finetune", f"{root}/train", "--init", f"{root}/encoder", *out("tuned"), *sets(*TRAINING)],
        "vectors": ["embed", f"{root}/images", "--encoder", f"{root}/tuned", *out("vectors")],
        "index": ["index", f"{root}/vectors", *out("index"), *sets("shards=2", "factory=IVF4,PQ4x4np")],
        "rankings": [
            "search", f"{root}/index", "--queries", f"{root}/vectors", "-k", "20", *out("rankings"), *sets("nprobe=4"),
        ],
        "metrics": ["evaluate", f"{root}/rankings", "--groundtruth", f"{root}/images", *out("metrics")],
    }  # fmt: skip


def manifest(root: str, step: str) -> Manifest:
    """Of a finished step."""
    found = read_manifest(open_folder(f"{root}/{step}"))
    assert found is not None, f"{root}/{step} is not finished"
    return found


def contents(root: str) -> dict[str, str]:
    """Fingerprints of what the steps wrote; they depend on the bytes alone, not on where or by whom these were made."""
    return {step: manifest(root, step).fingerprint for step in lines("", root)}


def left_over(root: str) -> list[str]:
    """What is below `root` and in no manifest: half-written files, markers, locks."""
    finished = {f"{step}/{name}" for step in lines("", root) for name in (*manifest(root, step).files, "manifest.json")}
    return sorted(entry.name for entry in open_folder(root).list() if entry.name not in finished)


def upload(folder: Path, uri: str) -> str:
    """Copy the world to the store."""
    target = open_folder(uri)
    for path in sorted(folder.iterdir()):
        target.write(path.name, path.read_bytes())
    return uri
