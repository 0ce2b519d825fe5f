"""Embedding against a bare loop, and its memory: python benchmarks/embed.py --data DIR [--repeat N] [PART...]

speed   images/s, end to end, against one process that decodes, resizes and runs the network on all cores: EfficientNet-Lite0
        at 224 px and ResNet-18 at 480 px of the long side; and the smallest cosine between the vectors of both
memory  peak memory of driver, decoders and workers against the plan, 1,000 and 50,000 small images
gpu     images/s against the bare compiled forward pass (ResNet-50, bfloat16); needs a GPU

Rates are medians over --repeat runs that alternate. The pipeline's time has all in it but the start of Ray: workers start,
load the network, and vectors are written. The bare loop's time starts when its network is loaded.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from ingest import MB, write_tar
from PIL import Image

CONFIGS = {
    "EfficientNet-Lite0, 224 px": ({"backbone": "efficientnet_lite0"}, ("wonders11", "train19")),
    "ResNet-18, 480 px long side": (
        {"backbone": "resnet18", "weights": "random", "size": 480, "resize": "long"},
        ("wonders11",),
    ),
}


def rows_of(images: Path) -> Iterator[dict[str, Any]]:
    for shard in sorted(images.glob("shard-*.parquet")):
        yield from pq.read_table(shard, columns=["name", "box", "bytes"]).to_pylist()


def bare(images: Path, encoder: Path, out: Path) -> None:
    """What a script would do: images one after the other; in batches of eight where all have one shape."""
    import torch

    from iir_dist import artifact
    from iir_dist.data.images import decode, prepare
    from iir_dist.models.encoder import load

    torch.set_num_threads(os.cpu_count() or 1)
    network = load(*artifact.require(encoder, "encoder"))
    spec = network.spec
    size = 8 if spec.resize == "squash" else 1
    vectors: list[Any] = []
    waiting: list[Any] = []
    start = time.perf_counter()
    with torch.inference_mode():
        for row in rows_of(images):
            waiting.append(prepare(decode(row["bytes"]), spec.size, spec.resize, row["box"]))
            if len(waiting) == size:
                vectors.append(network(torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).float() / 255))
                waiting = []
        if waiting:
            vectors.append(network(torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).float() / 255))
    seconds = time.perf_counter() - start
    np.save(out, torch.cat(vectors).numpy())
    print(json.dumps(seconds))


def bare_seconds(images: Path, encoder: Path, out: Path, environment: dict[str, str]) -> float:
    command = [sys.executable, __file__, "bare", str(images), str(encoder), str(out)]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout))


def vectors_of(embeddings: Path) -> np.ndarray[Any, Any]:
    tables = [pq.read_table(shard, columns=["embedding"]) for shard in sorted(embeddings.glob("shard-*.parquet"))]
    return np.concatenate([np.stack(t.column(0).to_numpy(zero_copy_only=False)) for t in tables])


def speed(data: str, repeat: int, scratch: Path) -> None:
    from iir_dist import embed, ingest, session
    from iir_dist.models import encoder

    session.connect()
    for name in ("wonders11", "train19"):
        ingest.run([f"{data}/{name}.tar"], str(scratch / name), ingest.IngestConfig(shard_mb=16))
    print("\n| network | images | run | images/s | ratio |\n|---|---:|---|---:|---:|")
    for title, (settings, sets) in CONFIGS.items():
        images = scratch / "-".join(sets)
        if len(sets) > 1:
            ingest.run([f"{data}/{name}.tar" for name in sets], str(images), ingest.IngestConfig(shard_mb=16))
        network = scratch / title.partition(",")[0]
        encoder.run(str(network), encoder.EncoderConfig.model_validate(settings))
        seconds = defaultdict(list)
        for n in range(repeat):
            seconds["bare loop"].append(bare_seconds(images, network, scratch / "bare.npy", {}))
            seconds["bare loop, freed memory kept"].append(
                bare_seconds(images, network, scratch / "bare.npy", session.KEEP_FREED_MEMORY)
            )
            start = time.perf_counter()
            out = scratch / f"{network.name}-{n}"
            embed.run(str(images), str(network), str(out), embed.EmbedConfig())
            seconds["iir embed"].append(time.perf_counter() - start)
        medians = {run: statistics.median(values) for run, values in seconds.items()}
        ours, theirs = vectors_of(out), np.load(scratch / "bare.npy")
        for run, value in medians.items():
            print(f"| {title} | {len(ours)} | {run} | {len(ours) / value:.1f} | {medians['bare loop'] / value:.2f} |")
        print(f"\nsmallest cosine of {len(ours)}: {(ours * theirs).sum(axis=1).min():.7f}\n", flush=True)


class Sampler(threading.Thread):
    """Peak of a process's own (anonymous) memory, and by kind of Ray worker; pages of libraries do not count."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peak: dict[str, int] = defaultdict(int)
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.2):
            try:
                self._see("driver", self._root)
                for process in self._root.children(recursive=True):
                    title = " ".join(process.cmdline())
                    for kind, word in (("worker", "Embedder"), ("decoder", "decode_shard")):
                        if "ray::" in title and word in title:
                            self._see(kind, process)
            except (psutil.Error, OSError):  # it ended meanwhile
                continue

    def _see(self, kind: str, process: psutil.Process) -> None:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        kilobytes = int(rollup.partition("Anonymous:")[2].split()[0])
        self.peak[kind] = max(self.peak[kind], kilobytes * 1024)


def memory(_: str, __: int, scratch: Path) -> None:
    from iir_dist.artifact import require
    from iir_dist.models import encoder

    encoder.run(
        str(scratch / "encoder"),
        encoder.EncoderConfig(backbone="resnet18", weights="random", size=32, resize="squash", seed=1),
    )
    kinds = ("driver", "decoder", "worker")
    print("\n| images | images/s | " + " | ".join(f"{kind}, peak MB (plan)" for kind in kinds) + " |")
    print("|---:|---:|---:|---:|---:|")
    for count in (1_000, 10_000, 50_000):
        rng = random.Random(0)

        def photos(count: int = count, rng: random.Random = rng) -> Iterator[tuple[str, bytes]]:
            for n in range(count):
                out = io.BytesIO()
                Image.frombytes("RGB", (48, 32), rng.randbytes(48 * 32 * 3)).save(out, "JPEG", quality=50)
                yield f"jpg/{n:06d}.jpg", out.getvalue()

        tar = scratch / f"{count}.tar"
        write_tar(tar, photos())
        images, out = scratch / f"images-{count}", scratch / f"embeddings-{count}"
        iir = [sys.executable, "-m", "iir_dist"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*iir, "ingest", str(tar), "--out", str(images), "--set", "shard_mb=2"], check=True, **quiet)
        start = time.perf_counter()
        process = subprocess.Popen(
            [*iir, "embed", str(images), "--encoder", str(scratch / "encoder"), "--out", str(out)], **quiet
        )
        sampler = Sampler(process.pid)
        sampler.start()
        code = process.wait()
        sampler.stop.set()
        seconds = time.perf_counter() - start
        assert code == 0
        plan = require(out, "embed")[1].info["memory_plan"]
        cells = [f"{sampler.peak[kind] / MB:.0f} ({plan[f'{kind}_bytes'] / MB:.0f})" for kind in kinds]
        print(f"| {count} | {count / seconds:.0f} | {' | '.join(cells)} |", flush=True)


def gpu(_: str, repeat: int, scratch: Path) -> None:
    """Random pixels for the bare pass; generated photos of 448 x 448 px for the pipeline."""
    import torch

    from iir_dist import artifact, embed, ingest, session
    from iir_dist.models import encoder

    if not torch.cuda.is_available():
        sys.exit("this part needs a GPU, and torch sees none")
    rng = np.random.default_rng(0)

    def photos() -> Iterator[tuple[str, bytes]]:
        for n in range(60_000):
            out = io.BytesIO()
            noise = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
            noise.resize((448, 448), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
            yield f"jpg/{n:05d}.jpg", out.getvalue()

    write_tar(scratch / "photos.tar", photos())
    session.connect()
    ingest.run([str(scratch / "photos.tar")], str(scratch / "images"), ingest.IngestConfig(shard_mb=64))
    encoder.run(str(scratch / "r50"), encoder.EncoderConfig(backbone="resnet50", weights="random"))
    network = encoder.load(*artifact.require(scratch / "r50", "encoder")).cuda().to(memory_format=torch.channels_last)
    fast: Any = torch.compile(network)
    x = torch.rand(256, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    rates = []
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for n in range(repeat + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(40):
                fast(x)
            torch.cuda.synchronize()
            rates += [40 * 256 / (time.perf_counter() - start)] if n else []
    bare_rate = statistics.median(rates)
    config = embed.EmbedConfig(batch_megapixels=13, precision="bfloat16", compile=True)
    start = time.perf_counter()
    embed.run(str(scratch / "images"), str(scratch / "r50"), str(scratch / "out"), config)
    rate = 60_000 / (time.perf_counter() - start)
    print(f"\nbare compiled forward {bare_rate:.0f} images/s; iir embed {rate:.0f}, ratio {rate / bare_rate:.2f}")


PARTS = {"speed": speed, "memory": memory, "gpu": gpu}


def main() -> None:
    if sys.argv[1:2] == ["bare"]:
        bare(*(Path(argument) for argument in sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with wonders11.tar and train19.tar")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="speed and memory where none is named")
    arguments = parser.parse_args()
    for part in arguments.parts or ["speed", "memory"]:
        if part == "speed" and not arguments.data:
            parser.error("speed needs --data")
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[part](arguments.data or "", arguments.repeat, Path(scratch))


if __name__ == "__main__":
    main()
