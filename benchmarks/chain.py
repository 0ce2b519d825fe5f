"""Seconds and peak memory of every stage of the demo: python benchmarks/chain.py [--data DIR] [--out DIR]

Runs `iir demo` into an empty folder as one process, samples the memory of it and of all that it starts (PSS: shared
pages count once) twice a second, and takes each stage's time span from its manifest. Start-up time of the command
line is compared with importing click alone, medians of nine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

GB = 2**30


def tree_pss(root: psutil.Process) -> int:
    """Proportional memory of a process and its descendants, in bytes."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended while we looked
            continue
    return total


def run_demo(out: Path, data: str | None) -> tuple[float, list[tuple[float, int]]]:
    """Seconds of the whole run, and samples (wall clock, bytes)."""
    command = [sys.executable, "-m", "iir_dist", "demo", "--out", str(out)] + (["--data", data] if data else [])
    start = time.monotonic()
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    samples: list[tuple[float, int]] = []
    while process.poll() is None:
        samples.append((time.time(), tree_pss(root)))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - start, samples


def stages(out: Path) -> list[tuple[float, float, str, str]]:
    """(end, seconds, stage, folder) of every artifact, in the order in which they were finished."""
    found = []
    for path in out.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        folder = path.parent.relative_to(out).as_posix()
        found.append((path.stat().st_mtime, manifest["info"]["seconds"], manifest["stage"], folder))
    return sorted(found)


def startup_ratio() -> tuple[float, float]:
    """Median seconds of `iir --help` and of importing click."""

    def median(*arguments: str) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return median("-m", "iir_dist", "--help"), median("-c", "import click")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="real photos; the procedural world where not given")
    parser.add_argument("--out", help="empty folder to work in; a temporary one where not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(arguments.out or scratch) / "demo"
        seconds, samples = run_demo(out, arguments.data)
        print("\n| stage | output | seconds | peak GB |\n|---|---|---:|---:|")
        for end, took, stage, folder in stages(out):
            inside = [size for at, size in samples if end - took - 0.5 <= at <= end + 0.5]
            peak = f"{max(inside) / GB:.2f}" if inside else "?"
            print(f"| {stage} | {folder} | {took:.1f} | {peak} |")
        print(f"| **all** | | **{seconds:.0f}** | **{max(size for _, size in samples) / GB:.2f}** |")
    help_seconds, click_seconds = startup_ratio()
    print(
        f"\n`iir --help` {help_seconds:.3f} s, `import click` {click_seconds:.3f} s: {help_seconds / click_seconds:.2f} times"
    )


if __name__ == "__main__":
    main()
