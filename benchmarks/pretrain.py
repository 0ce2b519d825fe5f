"""Pretraining: python benchmarks/pretrain.py [--data DIR] [--lightly PYTHON] [--repeat N] [PART...]

speed    images/s of our SimCLR against a bare PyTorch loop with the same network, views and batch, and, with --lightly (the
         python of an environment of its own: pip install lightly==1.6.0), against that library's SimCLR recipe; ResNet-18, 96 px
memory   peak memory of a SimCLR step by its batch: all activations kept, and chunk by chunk with a second forward pass
scaling  images/s of two workers with one thread each against one worker with two
curve    wonders11 while SimCLR and MoCo v2 train on unlabelled3k and train19 with the configs of jobs/configs, half an hour
         each on two cores, against the random network; needs --data; writes pretrain.svg beside this file

What is timed alternates, medians are given. Without --data the photos are synthetic.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH, SIZE, WARM, TIMED = 128, 96, 2, 4
CONFIGS = Path(__file__).parent.parent / "jobs/configs"
MB = 2**20


def photos_of(folder: Path, data: Path | None) -> Path:
    """An images artifact: unlabelled3k, or 3,000 synthetic photos."""
    os.environ["IIR_CACHE"] = str(folder / "cache")
    images = folder / "images" / "unlabelled"
    if not (images / "manifest.json").exists():
        from iir_dist import ingest

        if data is not None:
            ingest.run([str(data / "unlabelled3k.tar")], str(images), ingest.IngestConfig(split="train"))
        else:
            from finetune import photos_of as synthetic

            synthetic(folder, 3000)
            (folder / "images").mkdir(exist_ok=True)
            (folder / "images-3000").rename(images)
    return images


def opened(images: Path) -> Any:
    from iir_dist import artifact
    from iir_dist.data.cache import Photos

    return Photos([artifact.require(images, "ingest")])


def config_of(**changes: Any) -> Any:
    from iir_dist.train.pretrain_config import PretrainConfig

    return PretrainConfig.model_validate(
        {
            "encoder": {"backbone": "resnet18", "weights": "random", "size": SIZE},
            "crop": SIZE,
            "batch": BATCH,
            "steps": 1000,
            "optim": {"optimizer": "sgd", "lr": 0.06},
            **changes,
        }
    )


def task_of(images: Path, **changes: Any) -> Any:
    from iir_dist.models.encoder import create
    from iir_dist.train.pretrain_task import PretrainTask

    config = config_of(**changes)
    return PretrainTask(opened(images), create(config.encoder), config)


def ours(images: Path) -> Iterator[float]:
    """Seconds of each step of our loop: reading, decoding, views, network, loss, optimizer, log."""
    from iir_dist.storage import open_folder
    from iir_dist.train.loop import Run, train

    config = config_of()
    task, stop = task_of(images), 0
    with tempfile.TemporaryDirectory() as out:
        while True:
            seconds: list[float] = []
            clock = [time.perf_counter()]

            def on_step(step: int, note: str, seconds: list[float] = seconds, clock: list[float] = clock) -> None:
                seconds.append(time.perf_counter() - clock[0])
                clock[0] = time.perf_counter()

            stop += 1
            train(task, Run(config.steps, config.optim, 10**6, 0, stop=stop), open_folder(out), on_step)
            yield seconds[-1]


def bare(images: Path) -> Iterator[float]:
    """The same work as a script would do it: two views a photo, torchvision's ResNet-18, cross entropy over all pairs."""
    import torch
    import torch.nn.functional as F
    import torchvision
    from PIL import Image
    from torch import nn

    from iir_dist.data.augment import SIMCLR, seed_of, view_of

    photos = opened(images)
    view = view_of(SIMCLR.model_copy(update={"size": SIZE}))
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Sequential(
        nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 128, bias=False),
        nn.BatchNorm1d(128),
    )  # fmt: skip
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.06, momentum=0.9, weight_decay=1e-4)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    class Pairs(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
        def __len__(self) -> int:
            return len(photos)

        def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            image = Image.open(io.BytesIO(photos[number].data)).convert("RGB")
            return view(image, seed_of(number, 0)), view(image, seed_of(number, 1))

    while True:
        clock = time.perf_counter()
        for a, b in torch.utils.data.DataLoader(Pairs(), batch_size=BATCH, shuffle=True, drop_last=True):
            x = torch.cat([a, b]).to(memory_format=torch.channels_last).float().div_(255)
            z = F.normalize(net((x - mean) / std), dim=1)
            scores = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
            loss = F.cross_entropy(scores, torch.arange(2 * BATCH).roll(BATCH))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            float(loss)
            yield time.perf_counter() - clock
            clock = time.perf_counter()


def lightly(images: Path) -> Iterator[float]:
    """The SimCLR recipe of lightly's documentation, on the same photos as files, in memory; in its own environment."""
    import torch
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    files = sorted(images.iterdir())
    transform = SimCLRTransform(input_size=SIZE)
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None)
    backbone, head = torch.nn.Sequential(*list(net.children())[:-1]), SimCLRProjectionHead(512, 512, 128)
    criterion = NTXentLoss(temperature=0.1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.06, momentum=0.9, weight_decay=1e-4)

    class Views(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> Any:
            return transform(Image.open(files[number]).convert("RGB"))

    while True:
        clock = time.perf_counter()
        for a, b in torch.utils.data.DataLoader(Views(), batch_size=BATCH, shuffle=True, drop_last=True):
            za, zb = (head(backbone(x).flatten(1)) for x in (a, b))
            loss = criterion(za, zb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield time.perf_counter() - clock
            clock = time.perf_counter()


def timed(steps: Iterator[float]) -> float:
    """Median seconds of a step, the first ones left out."""
    found = [next(steps) for _ in range(WARM + TIMED)]
    return statistics.median(found[WARM:])


def speed(folder: Path, data: Path | None, python: str | None, repeat: int) -> None:
    images = photos_of(folder, data)
    arms = {"bare loop": [sys.executable], "ours": [sys.executable]}
    if python:
        arms["lightly"] = [python]
        files = folder / "files"
        if not files.exists():
            files.mkdir()
            photos = opened(images)
            for number in range(len(photos)):
                (files / f"{number:05d}.jpg").write_bytes(photos[number].data)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeat):
        for name, command in arms.items():
            where = folder / "files" if name == "lightly" else images
            done = subprocess.run(
                [*command, __file__, "arm", name, str(where)], check=True, stdout=subprocess.PIPE, env=environment()
            )
            times[name].append(float(done.stdout.splitlines()[-1]))
    base = statistics.median(times["bare loop"])
    print(
        f"\n| SimCLR, ResNet-18, {SIZE} px, {BATCH} photos | s a step | images/s | to the bare loop |\n|---|---:|---:|---:|"
    )
    for name, found in times.items():
        s = statistics.median(found)
        print(f"| {name} | {s:.2f} ({min(found):.2f} to {max(found):.2f}) | {BATCH / s:.1f} | {base / s:.2f} |")


def environment() -> dict[str, str]:
    """As workers have it, for all alike: freed memory is kept, which is worth more than any of the differences here."""
    return {
        **os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(512 * MB),
    }  # fmt: skip


def arm(name: str, images: Path) -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    steps = {"ours": ours, "bare loop": bare, "lightly": lightly}[name](images)
    print(timed(steps))


def peak(images: Path, batch: int, recompute: bool) -> None:
    """In a process of its own: two steps at this batch."""
    import torch

    from iir_dist.train.optim import build_optimizer

    torch.set_num_threads(os.cpu_count() or 1)
    changes: dict[str, Any] = {"chunk": 32, "recompute": True} if recompute else {}
    task = task_of(images, batch=batch, **changes)
    optimizer = build_optimizer(task.model, config_of(batch=batch).optim)
    clock = time.perf_counter()
    for number in range(2):
        task.step(number, 1.0)
        optimizer.step()
    seconds = (time.perf_counter() - clock) / 2
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds]))


def memory(folder: Path) -> None:
    """Synthetic photos: more are needed than unlabelled3k has."""
    os.environ["IIR_CACHE"] = str(folder / "cache")
    from finetune import photos_of as synthetic

    synthetic(folder, 4096)
    print("\n| batch | activations | peak memory MB | s a step |\n|---:|---|---:|---:|")
    for batch, recompute in ((64, False), (128, False), (256, False), (256, True), (4096, True)):
        command = [sys.executable, __file__, "peak", str(folder / "images-4096"), str(batch), str(int(recompute))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found, seconds = json.loads(done.stdout.splitlines()[-1])
        kind = "of a chunk of 32" if recompute else "of all"
        print(f"| {batch:,} | {kind} | {found / MB:,.0f} | {seconds:.1f} |", flush=True)


def worker(images: Path, rank: int, world: int, meet: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    from iir_dist.train import collectives
    from iir_dist.train.optim import build_optimizer

    task = task_of(images, chunk=BATCH // 2)
    optimizer = build_optimizer(task.model, config_of().optim)
    found = []
    for number in range(WARM + TIMED):
        clock = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        task.step(number, 1.0)
        collectives.sum_gradients(task.model.parameters())
        optimizer.step()
        found.append(time.perf_counter() - clock)
    if rank == 0:
        print(statistics.median(found[WARM:]))
    dist.destroy_process_group()


def scaling(folder: Path, data: Path | None, repeat: int) -> None:
    images = photos_of(folder, data)
    times: dict[int, list[float]] = {1: [], 2: []}
    for number in range(repeat):
        for world in times:
            meet = folder / f"meet-{number}-{world}"
            parts = [
                subprocess.Popen(
                    [sys.executable, __file__, "worker", str(images), str(rank), str(world), str(meet)],
                    stdout=subprocess.PIPE, env=environment(),
                )
                for rank in range(world)
            ]  # fmt: skip
            outputs = [part.communicate()[0] for part in parts]
            assert all(part.returncode == 0 for part in parts)
            times[world].append(float(outputs[0].splitlines()[-1]))
    base = statistics.median(times[1])
    print("\n| workers x threads | images/s | efficiency |\n|---|---:|---:|")
    cores = os.cpu_count() or 1
    for world, found in times.items():
        s = statistics.median(found)
        print(f"| {world} x {max(1, cores // world)} | {BATCH / s:.1f} | {base / s:.2f} |")


class Chain:
    """Stages on the real photos, each done once."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        os.environ["IIR_CACHE"] = str(folder / "cache")
        truth = data / "groundtruth/wonders11/gnd_wonders11.pkl"
        self.iir("ingest", data / "wonders11.tar", "--groundtruth", truth, out="images/bench")
        for name, source in (("unlabelled", "unlabelled3k"), ("train", "train19")):
            self.iir("ingest", data / f"{source}.tar", "--split", "train", out=f"images/{name}")

    def iir(self, *words: object, out: str) -> Path:
        target = self.folder / out
        command = [str(Path(sys.executable).with_name("iir")), *map(str, words), "--out", str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return target

    def score(self, encoder: Path) -> dict[str, Any]:
        """mAP of exact search with its interval."""
        name, bench = encoder.name, self.folder / "images/bench"
        vectors = self.iir("embed", bench, "--encoder", encoder, out=f"embeddings/{name}")
        found = self.iir("search", vectors, "--queries", vectors, out=f"rankings/{name}")
        metrics = self.iir("evaluate", found, "--groundtruth", bench, out=f"metrics/{name}")
        levels = json.loads((metrics / "metrics.json").read_text())["metrics"]
        return dict(next(iter(levels.values())))


def curve(folder: Path, data: Path) -> None:
    from iir_dist import compare

    chain = Chain(folder, data)
    random = chain.iir(
        "encoder", "--set=backbone=resnet18", "--set=weights=random", "--set=size=192", out="encoder/random"
    )
    base = chain.score(random)
    print(
        "\n| network | minutes | photos seen | mAP | times random | difference (95 %) |\n|---|---:|---:|---:|---:|---|"
    )
    print(f"| random | 0 | 0 | {base['map']:.3f} | 1 | |")
    series = {}
    for title, config in (("SimCLR", "simclr_resnet18_cpu"), ("MoCo v2", "moco_v2_resnet18_cpu")):
        images = [chain.folder / "images/unlabelled", chain.folder / "images/train"]
        encoder = chain.iir(
            "pretrain", *images, "--probe", chain.folder / "images/bench", "--config", CONFIGS / f"{config}.toml",
            out=f"encoder/{config}",
        )  # fmt: skip
        found = chain.score(encoder)
        lines = [json.loads(line) for line in (encoder / "training.jsonl").read_text().splitlines()]
        minutes = sum(line["seconds"] for line in lines) / 60
        seen = round(sum(line["seconds"] * line["images_per_sec"] for line in lines))
        level = compare.run(str(chain.folder / "metrics/random"), str(chain.folder / f"metrics/{config}")).levels[0]
        low, high = level.interval or (float("nan"), float("nan"))
        print(f"| {title} | {minutes:.0f} | {seen:,} | {found['map']:.3f} | {found['map'] / base['map']:.2f} | "
              f"{level.difference:+.3f} ({low:+.3f} to {high:+.3f}) |", flush=True)  # fmt: skip
        batch = json.loads((encoder / "manifest.json").read_text())["config"]["batch"]
        series[title] = [(batch * (line["step"] + 1), line) for line in lines if "val_map" in line]
    for title, points in series.items():
        print(f"\n{title}\n\n| photos seen | loss | mAP | spread | effective rank |\n|---:|---:|---:|---:|---:|")
        for seen, line in points:
            print(f"| {seen:,} | {line['loss']:.2f} | {line['val_map']:.3f} | {line['val_spread']:.2f} | "
                  f"{line['val_effective_rank']:.0f} |")  # fmt: skip
    plot({t: [(s / 1000, line["val_map"]) for s, line in points] for t, points in series.items()}, base["map"])


def plot(series: dict[str, list[tuple[float, float]]], random: float) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "pretrain", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(6.4, 3.6))
        for title, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=title)
        axes.axhline(random, linestyle="--", color="grey", label="random network")
        axes.axhline(1.5 * random, linestyle=":", color="grey", label="1.5 times")
        axes.set(xlabel="thousand photos seen", ylabel="wonders11 mAP, exact search", ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(Path(__file__).with_name("pretrain.svg"), metadata={"Date": None})


def main() -> None:
    match sys.argv[1:]:
        case ["arm", name, images]:
            return arm(name, Path(images))
        case ["peak", images, batch, recompute]:
            return peak(Path(images), int(batch), recompute == "1")
        case ["worker", images, rank, world, meet]:
            return worker(Path(images), int(rank), int(world), meet)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speed", "scaling", "memory"])
    parser.add_argument("--data", type=Path, help="folder with unlabelled3k.tar, train19.tar and wonders11.tar")
    parser.add_argument("--lightly", metavar="PYTHON", help="python of an environment that has lightly")
    parser.add_argument("--work", type=Path, help="folder for what is made; it is kept and used again")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        data = options.data and options.data.absolute()
        for part in options.parts:
            match part:
                case "speed":
                    speed(folder, data, options.lightly, options.repeat)
                case "memory":
                    memory(folder)
                case "scaling":
                    scaling(folder, data, options.repeat)
                case "curve":
                    if data is None:
                        parser.error("curve needs --data")
                    curve(folder, data)
                case _:
                    parser.error(f"{part!r} is none of speed, memory, scaling, curve")


if __name__ == "__main__":
    main()
