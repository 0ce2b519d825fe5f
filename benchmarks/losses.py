"""Seconds and memory of the losses, value and gradient: python benchmarks/losses.py [--pml FOLDER] [--batch BxK...] [LOSS...]

z is B x 2048 float32, K vectors a class around a centre. Each figure is from a process of its own: the median of --repeat
calls after one on a small batch, and the most memory above that in use before the first. With --pml, a folder that holds
pytorch-metric-learning 2.9.0 (pip install --target FOLDER --no-deps), its FastAPLoss and SmoothAPLoss run beside ours,
under a limit of --limit GB of address space.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import torch.nn.functional as F

DIM = 2048
OURS = (
    "quantized_ap", "tie_aware_ap", "fast_ap", "smooth_ap", "sup_ap", "recall_at_k", "contrastive", "triplet", "multi_similarity",
    "arcface",
)  # fmt: skip
PEERS = {"fast_ap": "FastAPLoss", "smooth_ap": "SmoothAPLoss"}
Step = Callable[[torch.Tensor, torch.Tensor], Any]


def vectors(size: int, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) // per_class
    centres = torch.randn(size // per_class, DIM, generator=generator)
    return F.normalize(centres[labels] + 1.2 * torch.randn(size, DIM, generator=generator), dim=1), labels


def ours(name: str, num_classes: int) -> Step:
    from pydantic import TypeAdapter

    from iir_dist.train.objectives import LossConfig, build

    return build(TypeAdapter(LossConfig).validate_python({"name": name}), num_classes, DIM, 0)


def theirs(name: str, folder: str) -> Step:
    sys.path.insert(0, folder)
    from pytorch_metric_learning import losses  # type: ignore[import-not-found]

    loss = getattr(losses, PEERS[name])()

    def step(z: torch.Tensor, labels: torch.Tensor) -> Any:
        leaf = z.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        return float(value.detach()), leaf.grad

    return step


def memory(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS, or VmHWM, the most since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, folder: str, size: str, per_class: str, repeat: str, limit: str) -> dict[str, Any]:
    """In a process of its own."""
    z, labels = vectors(int(size), int(per_class))
    step = theirs(name, folder) if folder else ours(name, int(size) // int(per_class))
    step(z[:64], labels[:64])
    if folder:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit) << 30, int(limit) << 30))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, seconds = memory("VmRSS"), []
    for _ in range(int(repeat)):
        start = time.perf_counter()
        try:
            value, _gradient = step(z, labels)
        except (RuntimeError, MemoryError):  # torch's allocator raises the first
            return {"limit": int(limit)}
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "extra": memory("VmHWM") - before, "value": value}


def child(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "measure", *map(str, arguments)], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(size: int, per_class: int, name: str, found: dict[str, Any], ratio: str = "") -> None:
    if "limit" in found:
        cells = ("", f"more than {found['limit']:,} GB", "", "")
    else:
        cells = (f"{found['seconds']:.3f}", f"{found['extra'] / 2**20:,.0f}", f"{found['value']:.4f}", ratio)
    print(f"| {size:,} | {per_class} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pml", default="", metavar="FOLDER", help="folder with pytorch-metric-learning 2.9.0")
    parser.add_argument("--batch", nargs="+", default=["256x4", "512x4", "1024x4", "4096x4", "4096x64"], metavar="BxK")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=int, default=12, help="GB that the other library may take")
    parser.add_argument("losses", nargs="*", choices=[[], *OURS], help="all where none is named")
    arguments = parser.parse_args()
    print("| B | K | loss | seconds | extra memory, MB | value | times ours |\n|---:|---:|---|---:|---:|---:|---:|")
    for batch in arguments.batch:
        size, per_class = map(int, batch.split("x"))
        for name in arguments.losses or OURS:
            rest = (size, per_class, arguments.repeat, arguments.limit)
            mine = child(name, "", *rest)
            row(size, per_class, name, mine)
            if arguments.pml and name in PEERS:
                other = child(name, arguments.pml, *rest)
                ratio = f"{other['seconds'] / mine['seconds']:.1f}" if "seconds" in other else ""
                row(size, per_class, f"pytorch-metric-learning {PEERS[name]}", other, ratio)


if __name__ == "__main__":
    main()
