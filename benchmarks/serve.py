"""What the service costs beside a search in process, and how it bears load: python benchmarks/serve.py serve-demo

In one run on one machine: (1) decode + embed + search in this process, photo after photo; (2) the same photos over HTTP,
one client, then several; (3) 200 clients at once; (4) memory over many requests; (5) with --ray, `kill -9` of a replica
under load. Clients and server are processes of their own and share the cores.

`serve-demo` is what `make serve-demo` leaves: index/, images/, encoder/, queries/. --requests 20000 is what the memory
figure in benchmarks/README.md was taken with; the default is small.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil

WARM = 5


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    """Of answers with status 200."""
    statuses: Counter[str] = field(default_factory=Counter)
    took: float = 0.0
    failed_at: list[float] = field(default_factory=list)
    """Times of what got no answer, or one of 5xx."""

    def row(self, name: str) -> str:
        p50, p95, p99 = np.percentile(self.seconds, (50, 95, 99)) * 1e3 if self.seconds else (np.nan,) * 3
        said = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return f"| {name} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {len(self.seconds) / self.took:.1f} | {said} |"


def in_process(folder: Path, photos: list[bytes], requests: int) -> Load:
    """Decode, embed, search: what the service does for a photo, without it."""
    import torch

    from iir_dist import artifact
    from iir_dist.data.images import decode, prepare
    from iir_dist.index.engine import open_index
    from iir_dist.models.encoder import load

    network = load(*artifact.require(folder / "encoder", *artifact.ENCODERS)).to(memory_format=torch.channels_last)
    spec, seen = network.spec, Load()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with open_index(folder / "index", verify=True) as index, torch.inference_mode():
        start = time.perf_counter()
        for number in range(requests + WARM):
            if number == WARM:
                start = time.perf_counter()
            began = time.perf_counter()
            pixels = prepare(decode(photos[number % len(photos)]), spec.size, spec.resize)
            x = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2).float().div(255)
            index.search(network(x).numpy(), 50)
            if number >= WARM:
                seen.seconds.append(time.perf_counter() - began)
        seen.took = time.perf_counter() - start
    seen.statuses["in process"] = requests
    return seen


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[tuple[str, int]]:
    """`iir serve` in a process of its own: its address and process id."""
    command = [
        sys.executable,
        "-m",
        "iir_dist",
        "serve",
        *(str(folder / "index"),),
        "--encoder",
        str(folder / "encoder"),
    ]
    process = subprocess.Popen(
        [*command, "--images", str(folder / "images"), "--port", "8071", *more], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.match(r"ready: (\S+)/", line):
                yield found[1], process.pid
                return
        raise SystemExit(f"iir serve ended with {process.wait()}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)


async def load(url: str, photos: list[bytes], clients: int, requests: int, retry: bool = False) -> Load:
    """So many requests by so many clients, each with the next as soon as it has its answer.

    Args:
        retry: a client that is told 429 waits as told, and then asks again.
    """
    seen, left = Load(), iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in left:
            while True:
                began = time.perf_counter()
                try:
                    async with session.post(f"{url}/v1/search?k=50", data=photos[number % len(photos)]) as answer:
                        await answer.read()
                        status = str(answer.status)
                        wait = float(answer.headers.get("retry-after", 0))
                except (aiohttp.ClientError, TimeoutError) as error:
                    status, wait = type(error).__name__, 0.0
                seen.statuses[status] += 1
                if status == "200":
                    seen.seconds.append(time.perf_counter() - began)
                elif status != "429":
                    seen.failed_at.append(time.perf_counter())
                if status == "429" and retry:
                    await asyncio.sleep(wait)
                    continue
                break

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seen.took = time.perf_counter() - start
    return seen


def memory(pid: int) -> float:
    """MB that a process and its children hold."""
    process = psutil.Process(pid)
    return sum(p.memory_full_info().uss for p in (process, *process.children(recursive=True))) / 2**20


async def killed(url: str, photos: list[bytes], requests: int) -> None:
    """kill -9 of a replica under the load of 8 clients; what failed, and until when."""
    running = asyncio.create_task(load(url, photos, 8, requests, retry=True))
    await asyncio.sleep(5)
    replicas = [p for p in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(p.info["cmdline"] or ())]
    if not replicas:
        raise SystemExit("no replica of Ray Serve was found")
    replicas[0].kill()
    at = time.perf_counter()
    seen = await running
    print(seen.row(f"kill -9 of 1 of {len(replicas)} replicas, 8 clients"))
    last = max(seen.failed_at, default=at) - at
    print(
        f"\n{len(seen.failed_at)} of {sum(seen.statuses.values())} requests failed, the last {last:.1f} s after the kill"
    )


def main() -> None:
    """As a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--ray", action="store_true", help="kill a replica of Ray Serve too")
    arguments = parser.parse_args()
    folder, requests = arguments.folder.absolute(), arguments.requests
    photos = [path.read_bytes() for path in sorted((folder / "queries").glob("*.jpg"))]
    print("| | p50 ms | p95 ms | p99 ms | answers/s | |\n|---|---:|---:|---:|---:|---|")
    alone = in_process(folder, photos, min(requests, 500))
    print(alone.row("in process"), flush=True)
    with serving(folder, "--local") as (url, pid):
        asyncio.run(load(url, photos, 1, WARM))
        one = asyncio.run(load(url, photos, 1, min(requests, 500)))
        print(one.row("1 client"), flush=True)
        print(asyncio.run(load(url, photos, 8, requests, retry=True)).row("8 clients"), flush=True)
        print(asyncio.run(load(url, photos, 200, requests, retry=True)).row("200 clients"), flush=True)
        held = [memory(pid)]
        for _ in range(4):
            asyncio.run(load(url, photos, 8, requests // 4, retry=True))
            held.append(memory(pid))
    overhead = np.median(one.seconds) / np.median(alone.seconds)
    print(
        f"\np50 over HTTP is {overhead:.2f} times that in process; memory after each quarter of {requests} requests: ",
        end="",
    )
    print(", ".join(f"{mb:.0f}" for mb in held), "MB")
    if arguments.ray:
        with serving(folder, "--set", "replicas=2") as (url, _):
            asyncio.run(killed(url, photos, requests))


if __name__ == "__main__":
    main()
