"""kill -9 of a worker or of the driver of a training, and what a training ends with."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from iir_dist.train.checkpoints import LOG

EVERY = 3
"""Steps between two checkpoints."""


def result(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Weights and loss curve, without what tells of time."""
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_sec")} for line in lines]
    return {n: v.tolist() for n, v in load_file(out / "weights.safetensors").items()}, curve


def with_a_worker_killed(command: list[str], out: Path, seed: int) -> Any:
    """Ray starts the group of two again; the run goes on from its checkpoint by itself."""
    rng = random.Random(seed)
    process = _started(command, out, rng)
    workers = _workers_of(process)
    assert len(workers) == 2
    rng.choice(sorted(workers, key=lambda p: p.pid)).send_signal(signal.SIGKILL)
    assert process.wait(timeout=400) == 0
    return result(out)


def with_the_driver_killed(command: list[str], out: Path, seed: int) -> Any:
    """The same command once more ends what was begun."""
    process = _started(command, out, random.Random(seed))
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=60)  # a local Ray ends with its driver
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, timeout=400)
    return result(out)


def _started(command: list[str], out: Path, rng: random.Random) -> subprocess.Popen[bytes]:
    """The command, some moment after one of its first checkpoints."""
    first = out / f"checkpoints/{EVERY * rng.randint(1, 5):08d}.pt"
    process = subprocess.Popen(command)
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(rng.random())
    return process


def _workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
