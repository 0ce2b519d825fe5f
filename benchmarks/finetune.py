"""Fine-tuning: python benchmarks/finetune.py [--data DIR] [--repeat N] [PART...]

step    seconds of a step of three-stage backpropagation against its arithmetic, two forward passes and one backward pass of
        the bare network over the same chunks; ResNet-18, 96 px, chunks of 32, 256 images; and what decoding adds
memory  peak memory of the process at batches of 256 and of 4,096 images, the same network and chunks
gain    exact search on wonders11 with EfficientNet-Lite0 before and after fine-tuning on train19, three seeds, without and
        with PCA whitening; needs --data, takes a while (--config FILE, --seeds N)
losses  the same, 224 px, after an equal budget of images at 128 px: loss by batch size, one seed; needs --data

What is timed alternates, medians are given. Batches of `step` and `memory` are synthetic photos, read, decoded and augmented
as in any training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ingest import MB, write_tar
from PIL import Image

SIZE, CHUNK, CLASSES = 96, 32, 64
ARMS: dict[str, dict[str, Any]] = {
    "quantized AP, 20 bins on [-1, 1]": {"name": "quantized_ap", "num_bins": 20, "low": -1.0, "high": 1.0},
    "quantized AP, 25 bins on [0, 1]": {"name": "quantized_ap", "num_bins": 25, "low": 0.0, "high": 1.0},
    "Smooth-AP": {"name": "smooth_ap"},
    "SupAP + calibration": {"name": "sup_ap"},
    "FastAP": {"name": "fast_ap"},
    "Recall@k": {"name": "recall_at_k"},
    "contrastive": {"name": "contrastive"},
    "triplet": {"name": "triplet"},
    "multi-similarity": {"name": "multi_similarity"},
    "ArcFace": {"name": "arcface"},
}


def photos_of(folder: Path, count: int) -> Any:
    """`count` synthetic JPEG photos of CLASSES classes, ingested."""
    from iir_dist import artifact, ingest
    from iir_dist.data.cache import Photos

    os.environ["IIR_CACHE"] = str(folder / "cache")
    images = folder / f"images-{count}"
    if not (images / "manifest.json").exists():

        def files() -> Iterator[tuple[str, bytes]]:
            rng = np.random.default_rng(0)
            for number in range(count):
                small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                data = io.BytesIO()
                small.resize((160, 120), Image.Resampling.BICUBIC).save(data, "JPEG")
                yield f"class{number % CLASSES:02d}/{number:05d}.jpg", data.getvalue()

        write_tar(folder / f"{count}.tar", files())
        ingest.run([str(folder / f"{count}.tar")], str(images), ingest.IngestConfig(split="train"))
    return Photos([artifact.require(images, "ingest")])


def task_of(photos: Any, batch: int) -> Any:
    from iir_dist.models.encoder import EncoderConfig, create
    from iir_dist.train.finetune_config import FinetuneConfig
    from iir_dist.train.finetune_task import FinetuneTask

    encoder = create(EncoderConfig(backbone="resnet18", weights="random", size=SIZE))
    config = {
        "projection": None, "size": SIZE, "chunk": CHUNK, "steps": 100,
        "batches": {"name": "classes", "classes": CLASSES, "per_class": batch // CLASSES}, "pixels_gb": 0.02,
    }  # fmt: skip
    return FinetuneTask(photos, encoder, FinetuneConfig.model_validate(config))


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def step(folder: Path, repeat: int) -> None:
    import torch

    from iir_dist.train.backprop import three_stage
    from iir_dist.train.views import to_device

    torch.set_num_threads(os.cpu_count() or 1)
    task = task_of(photos_of(folder, 1024), 256)
    batch = task.sampler.batch(0)
    chunks = list(task.stream.chunks(0))
    labels = torch.from_numpy(task.labels[batch])
    cpu = torch.device("cpu")

    def bare() -> None:
        with torch.no_grad():
            for chunk in chunks:
                task.encoder.describe(to_device(chunk, cpu))
        for chunk in chunks:
            z = task.encoder.describe(to_device(chunk, cpu))
            z.backward(torch.ones_like(z))

    def ours() -> None:
        three_stage(
            task._embed,
            lambda: (to_device(c, cpu) for c in chunks),
            labels,
            lambda z, y: task.loss(z, y),
            task.encoder.spec.dim,
        )

    bare(), ours()
    times: dict[str, list[float]] = {"bare": [], "ours": [], "decoding": []}
    for _ in range(repeat):
        task.model.zero_grad(set_to_none=True)
        times["bare"].append(seconds_of(bare))
        task.model.zero_grad(set_to_none=True)
        times["ours"].append(seconds_of(ours))
        task.stream._step = None
        times["decoding"].append(seconds_of(lambda: list(task.stream.chunks(0))))
    bare_s, ours_s, decoding = (statistics.median(times[name]) for name in ("bare", "ours", "decoding"))
    print("\n| 256 images | s | ratio |\n|---|---:|---:|")
    print(f"| two forward passes, one backward | {bare_s:.2f} | 1 |")
    print(f"| three-stage step | {ours_s:.2f} | {ours_s / bare_s:.2f} |")
    print(f"| decoding and augmenting them, one process | {decoding:.2f} | |")


def peak(folder: Path, batch: int) -> None:
    """In a process of its own: two steps at this batch."""
    import torch

    from iir_dist.train.optim import Optimization, build_optimizer

    torch.set_num_threads(os.cpu_count() or 1)
    task = task_of(photos_of(folder, 4096), batch)
    optimizer = build_optimizer(task.model, Optimization())
    for number in range(2):
        task.step(number, 1.0)
        optimizer.step()
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def memory(folder: Path) -> None:
    photos_of(folder, 4096)
    print("\n| images in a batch | peak memory MB | ratio |\n|---:|---:|---:|")
    first = 0.0
    for batch in (256, 4096):
        command = [sys.executable, __file__, "peak", str(folder), str(batch)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found = float(done.stdout.splitlines()[-1])
        first = first or found
        print(f"| {batch} | {found / MB:.0f} | {found / first:.2f} |", flush=True)


class Chain:
    """The stages on the real photos, each done once."""

    def __init__(self, folder: Path, data: Path, size: int) -> None:
        self.folder, self.size = folder, size
        os.environ["IIR_CACHE"] = str(folder / "cache")
        self.iir("ingest", data / "wonders11.tar", "--groundtruth", data / "groundtruth/wonders11/gnd_wonders11.pkl",
                 out="images/bench")  # fmt: skip
        self.iir("ingest", data / "train19.tar", "--split", "train", out="images/train")
        self.iir("encoder", out="encoder/lite0", size=size)

    def iir(self, *words: object, out: str, **settings: object) -> str:
        """One command; its output folder."""
        target = str(self.folder / out)
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        command = [str(Path(sys.executable).with_name("iir")), *map(str, words), "--out", target, *sets]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return target

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def finetune(self, name: str, *config: object, **settings: object) -> None:
        self.iir("finetune", self.at("images/train"), "--init", self.at("encoder/lite0"), *config,
                 "--test", self.at("images/bench"), out=f"encoder/{name}", **settings)  # fmt: skip

    def measure(self, name: str, whitened: bool) -> str:
        """Exact search of wonders11 with the encoder; the folder of its metrics."""
        encoder = f"encoder/{name}"
        if whitened:
            self.iir("embed", self.at("images/train"), "--encoder", self.at(encoder), out=f"embeddings/train-{name}")
            self.iir("whiten", self.at(f"embeddings/train-{name}"), "--encoder", self.at(encoder),
                     out=f"{encoder}-white", dim=512)  # fmt: skip
            encoder, name = f"{encoder}-white", f"{name}-white"
        vectors = self.iir(
            "embed", self.at("images/bench"), "--encoder", self.at(encoder), out=f"embeddings/bench-{name}"
        )
        found = self.iir("search", vectors, "--queries", vectors, out=f"rankings/{name}")
        return self.iir("evaluate", found, "--groundtruth", self.at("images/bench"), out=f"metrics/{name}")


def map_of(metrics: str) -> float:
    levels = json.loads((Path(metrics) / "metrics.json").read_text())["metrics"]
    return float(next(iter(levels.values()))["map"])


def gain(folder: Path, data: Path, config: Path, seeds: int, size: int) -> None:
    from iir_dist import compare

    chain = Chain(folder, data, size)
    print(f"\n{config.name}, embedded at {size} px\n")
    print("| whitening | seed | before | after | difference (95 %) |\n|---|---:|---:|---:|---|")
    for seed in range(seeds):
        chain.finetune(f"ap-{seed}", "--config", config, seed=seed)
    for whitened in (False, True):
        before = chain.measure("lite0", whitened)
        for seed in range(seeds):
            after = chain.measure(f"ap-{seed}", whitened)
            level = compare.run(before, after).levels[0]
            low, high = level.interval or (float("nan"), float("nan"))
            print(f"| {'PCA, 512-d' if whitened else 'none'} | {seed} | {level.a:.3f} | {level.b:.3f} | "
                  f"{level.difference:+.3f} ({low:+.3f} to {high:+.3f}) |", flush=True)  # fmt: skip


def losses(folder: Path, data: Path, images: int) -> None:
    """The rate grows with the square root of the batch, as is usual for Adam; all else is equal."""
    chain = Chain(folder, data, 224)
    print(f"\n{images} images each; mAP before: {map_of(chain.measure('lite0', False)):.3f}\n")
    batches = (36, 72, 288)
    print("| loss | " + " | ".join(f"{b} a batch" for b in batches) + " |\n|---|" + "---:|" * len(batches))
    for title, loss in ARMS.items():
        row = []
        for batch in batches:
            name = f"{title}-{batch}".replace(" ", "").replace(",", "").replace("+", "")
            settings = {f"loss.{key}": value for key, value in loss.items()}
            settings |= {
                "batches.classes": 18, "batches.per_class": batch // 18, "steps": images // batch, "size": 128,
                "projection": 1280, "chunk": 18, "optim.lr": 1e-4 * (batch / 72) ** 0.5,
            }  # fmt: skip
            chain.finetune(name, **settings)
            row.append(f"{map_of(chain.measure(name, False)):.3f}")
        print(f"| {title} | " + " | ".join(row) + " |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        return peak(Path(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["step", "memory"])
    parser.add_argument("--data", type=Path, help="folder with wonders11.tar and train19.tar")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "jobs/configs/ap_lite0_cpu.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2592, help="of losses: images that each training sees")
    parser.add_argument("--size", type=int, default=320, help="of gain: px at which wonders11 is embedded")
    parser.add_argument("--work", type=Path, help="folder for what is made; it is kept and used again")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for part in options.parts:
            if part in ("gain", "losses") and options.data is None:
                parser.error(f"{part} needs --data")
            match part:
                case "step":
                    step(folder, options.repeat)
                case "memory":
                    memory(folder)
                case "gain":
                    gain(folder, options.data, options.config, options.seeds, options.size)
                case "losses":
                    losses(folder, options.data, options.images)
                case _:
                    parser.error(f"{part!r} is none of step, memory, gain, losses")


if __name__ == "__main__":
    main()
