"""The index against plain faiss, autofaiss, HNSW and exact search: python benchmarks/index.py [--autofaiss PYTHON] [PART...]

build      seconds against plain faiss in one process: the same factory, and the string that everyone writes (training)
search     queries/s of the same codes against one faiss index, in this process and over two actors; at recall@10 0.95
           against autofaiss given as much memory (where --autofaiss names a Python that has it), HNSW and exact search;
           recall reached against its target
growth     cost from 10^4 to 10^6 vectors as measured, and what the plan computes up to 10^9

build and search work on 1,000,000 x 256, and with --small on 200,000 x 512, vectors: a mixture of clusters in 32 dimensions
and noise in all. Queries are noisier than the database; those that settings were chosen by are not those that recall is
told of. All run on the same cores with OMP_WAIT_POLICY=passive. Rates are medians of --repeat runs that alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FILE = 50_000
TARGET = 0.95
K = 10
NQ = 1000
PLAIN = {256: "IVF1024,PQ128x4fsr", 512: "IVF512,PQ256x4fsr"}
EVERYONE = {256: "IVF1024,PQ64", 512: "IVF512,PQ128"}
"""As many bytes a vector as ours."""
Matrix = Any


def vectors(n: int, dim: int, seed: int, noise: float) -> Matrix:
    shape = np.random.default_rng(0)
    centres = shape.normal(size=(5000, 32)).astype(np.float32)
    into = shape.normal(size=(32, dim)).astype(np.float32) / np.sqrt(32, dtype=np.float32)
    rng = np.random.default_rng(seed)
    z = centres[rng.integers(len(centres), size=n)] + 0.7 * rng.standard_normal((n, 32), dtype=np.float32)
    x = z @ into + noise * rng.standard_normal((n, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write(folder: Path, x: Matrix, first: int, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.arange(first, first + len(x))
    columns = {
        "id": rows, "name": [f"{split}{row}" for row in rows], "split": [split] * len(x),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / f"shard-{first // ROWS_PER_FILE:05d}.parquet")


def make(root: Path, n: int, dim: int) -> None:
    for first in range(0, n, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, n - first)
        write(root / "db", vectors(count, dim, 1 + first, 0.35), first, "db")
    write(root / "tune", vectors(NQ, dim, 10**8, 0.5), 0, "query")
    write(root / "test", vectors(NQ, dim, 10**8 + 1, 0.5), 0, "query")


def read(folder: Path) -> Iterator[Matrix]:
    for file in sorted(folder.glob("*.parquet")):
        column = pq.read_table(file, columns=["embedding"]).column(0)
        for chunk in column.chunks:
            yield chunk.flatten().to_numpy().reshape(len(chunk), -1)


def peak_of_children(stop: float = 0.5) -> Callable[[], int]:
    """Samples the memory of this process's children in a thread; what it returns tells the peak."""
    import threading

    import psutil  # not everywhere where this file runs

    done, peak = threading.Event(), [0]

    def look() -> None:
        while not done.wait(stop):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError, IndexError):
                    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    total += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()

    def end() -> int:
        done.set()
        thread.join()
        return peak[0]

    return end


def child(*arguments: object, python: str = sys.executable) -> Any:
    """Run a part of this file in a process of its own; what it prints last is JSON."""
    done = subprocess.run([python, __file__, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ in a process of its own


def plain(root: str, factory: str, train_size: str, out: str) -> dict[str, float]:
    """What a script would do: read, sample, train, add, write; with `out` empty only train."""
    import faiss

    start = time.perf_counter()
    n = sum(pq.read_metadata(file).num_rows for file in Path(root, "db").glob("*.parquet"))
    rows = np.sort(np.random.default_rng(0).choice(n, min(n, int(train_size)), replace=False))
    parts, first = [], 0
    for x in read(Path(root, "db")):
        parts.append(x[rows[(rows >= first) & (rows < first + len(x))] - first])
        first += len(x)
    xt = np.concatenate(parts)
    index = faiss.index_factory(xt.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
    trained = time.perf_counter()
    index.train(xt)
    train = time.perf_counter() - trained
    if out != "-":
        for x in read(Path(root, "db")):
            index.add(x)
        faiss.write_index(index, out)
    return {"seconds": time.perf_counter() - start, "train": train, "memory": peak()}


def ours(root: str, out: str, *settings: str) -> dict[str, Any]:
    """`iir index`, Ray up before the clock runs."""
    from iir_dist import session
    from iir_dist.index import build
    from iir_dist.index.plan import IndexConfig

    values: dict[str, Any] = {"recall": TARGET} | dict(s.split("=") for s in settings)
    session.connect()
    memory = peak_of_children()
    start = time.perf_counter()
    manifest = build.run([f"{root}/db"], out, IndexConfig.model_validate(values), queries=[f"{root}/tune"])
    return {"seconds": time.perf_counter() - start, **manifest.info, "memory": memory() + peak()}


def autofaiss(root: str, memory: str, out: str) -> dict[str, Any]:
    """Its own choice and tuning, for the same memory."""
    from autofaiss import build_index

    start = time.perf_counter()
    _, infos = build_index(
        f"{root}/db", file_format="parquet", embedding_column_name="embedding", id_columns=None, index_path=out,
        index_infos_path=f"{out}.json", max_index_memory_usage=memory, current_memory_available="6G",
        max_index_query_time_ms=10, metric_type="ip", nb_cores=os.cpu_count(), save_on_disk=True, verbose=40,
    )  # fmt: skip
    known = {key: value for key, value in infos.items() if isinstance(value, (str, int, float))}
    made = {"seconds": time.perf_counter() - start, **known, "memory": peak()}
    Path(f"{out}.made").write_text(json.dumps(made))
    return made


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PROCESSES: dict[str, Callable[..., Any]] = {"plain": plain, "ours": ours, "autofaiss": autofaiss}

# ------------------------------------------------------------------------------------------------ parts


def build_part(root: Path, n: int, dim: int) -> None:
    print(
        f"\nBuild, {n:,} x {dim}\n\n| run | factory | seconds | training | ratio | memory, MB |\n|---|---|---:|---:|---:|---:|"
    )
    shutil.rmtree(root / "index", ignore_errors=True)
    mine = child("ours", root, root / "index")
    theirs = child("plain", root, mine["factory"], 65_536, root / "plain.faiss")
    everyone = child("plain", root, EVERYONE[dim], 65_536, "-")
    seconds = mine["seconds_of"]
    print(
        f"| plain faiss | {mine['factory']} | {theirs['seconds']:.1f} | {theirs['train']:.1f} | | {theirs['memory'] / 2**20:.0f} |"
    )
    print(
        f"| iir index: train, fill, float16 vectors, checksums | {mine['factory']} | {seconds['build']:.1f} | | "
        f"{seconds['build'] / theirs['seconds']:.2f} | {mine['memory'] / 2**20:.0f} |"
    )
    print(f"| the same and operating points | | {mine['seconds']:.1f} | | | |")
    print(
        f"| plain faiss, training only | {EVERYONE[dim]} | | {everyone['train']:.1f} | "
        f"{everyone['train'] / theirs['train']:.1f} times ours | |"
    )
    memory = mine["memory_bytes"]
    print(
        f"\nmemory in MB, planned and found: search {memory['search_planned'] / 2**20:.0f}, {memory['search'] / 2**20:.0f}; "
        f"a worker of the build {memory['build_planned'] / 2**20:.0f}, {memory['build'] / 2**20:.0f}"
    )
    codes = sum(file.stat().st_size for file in (root / "index").glob("shard-*.faiss"))
    print(
        f"bytes a vector on disk: {codes / n:.1f}, code and id {mine['code_bytes'] + 8}: {codes / n / (mine['code_bytes'] + 8):.3f}"
    )


def rate(search: Callable[[Matrix], Any], xq: Matrix) -> float:
    start = time.perf_counter()
    search(xq)
    return len(xq) / (time.perf_counter() - start)


def rates(repeat: int, xq: Matrix, **searches: Callable[[Matrix], Any]) -> dict[str, float]:
    for search in searches.values():
        search(xq[:50])
    seen: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(repeat):
        for name, search in searches.items():
            seen[name].append(rate(search, xq))
    return {name: statistics.median(values) for name, values in seen.items()}


def single_ms(search: Callable[[Matrix], Any], xq: Matrix) -> float:
    times = []
    for one in xq[:200]:
        start = time.perf_counter()
        search(one[None])
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def recall(found: Matrix, truth: Matrix) -> float:
    return float(np.mean([len(np.intersect1d(f, t)) / K for f, t in zip(found, truth, strict=True)]))


def search_part(root: Path, n: int, dim: int, arguments: argparse.Namespace) -> None:
    import faiss

    from iir_dist import session
    from iir_dist.index.engine import open_index
    from iir_dist.index.export import export
    from iir_dist.index.fanout import open_on_actors
    from iir_dist.index.points import read_points

    if not (root / "index" / "manifest.json").exists():
        child("ours", root, root / "index")
    if not (root / "index-2" / "manifest.json").exists():
        child("ours", root, root / "index-2", "shards=2")
    threads = os.cpu_count() or 1
    xq = np.concatenate(list(read(root / "test")))
    export(str(root / "index"), str(root / "merged.faiss"))
    one: Any = faiss.read_index(str(root / "merged.faiss"))
    ivf = faiss.extract_index_ivf(one)
    mine = open_index(root / "index")
    session.connect()
    spread = open_on_actors(root / "index-2", 2)
    flat = faiss.IndexFlatIP(dim)
    for x in read(root / "db"):
        flat.add(x)
    truth = flat.search(xq, K)[1]
    point = read_points(mine.folder, mine.manifest).reaching(TARGET)

    print(f"\nThe same codes, {n:,} x {dim}, batches of {NQ}\n")
    print("| nprobe | k | faiss, one index | in process | ratio | two actors | ratio |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for nprobe in (point.nprobe, 4 * point.nprobe):
        for k in (K, 100, 1000):
            ivf.nprobe = nprobe

            def ours_by_code(x: Matrix, nprobe: int = nprobe, k: int = k) -> Any:
                return mine.search(x, k, nprobe, 0)

            def spread_by_code(x: Matrix, nprobe: int = nprobe, k: int = k) -> Any:
                return spread.search(x, k, nprobe, 0)

            def faiss_by_code(x: Matrix, k: int = k) -> Any:
                faiss.omp_set_num_threads(threads)
                return one.search(x, k)

            found = rates(arguments.repeat, xq, faiss=faiss_by_code, mine=ours_by_code, spread=spread_by_code)
            base = found["faiss"]
            print(
                f"| {nprobe} | {k} | {base:,.0f} | {found['mine']:,.0f} | {found['mine'] / base:.2f} | "
                f"{found['spread']:,.0f} | {found['spread'] / base:.2f} |", flush=True,
            )  # fmt: skip

    print(f"\nAt recall@10 of {TARGET} or the best it has, {n:,} x {dim}\n")
    print("| index | setting | recall@10 | queries/s | ms a query | bytes a vector | build, s |")
    print("|---|---|---:|---:|---:|---:|---:|")

    def row(name: str, setting: str, search: Callable[[Matrix], Any], size: float, seconds: float) -> None:
        faiss.omp_set_num_threads(threads)
        reached = recall(search(xq)[1], truth)
        quick = rates(arguments.repeat, xq, it=search)["it"]
        print(
            f"| {name} | {setting} | {reached:.3f} | {quick:,.0f} | {single_ms(search, xq):.2f} | {size / n:.0f} | {seconds:.0f} |",
            flush=True,
        )

    info = mine.manifest.info
    memory = info["memory_bytes"]["search"]
    row(
        f"iir, {info['factory']}", f"nprobe {point.nprobe}, refine {point.refine}",
        lambda x: mine.search(x, K, point.nprobe, point.refine), memory, sum(info["seconds_of"].values()),
    )  # fmt: skip
    out = root / "autofaiss.faiss"
    if arguments.autofaiss and not out.exists():
        child("autofaiss", root, f"{memory // 10**6 + 1}MB", out, python=arguments.autofaiss)
    if out.exists():
        made = json.loads(Path(f"{out}.made").read_text())
        theirs: Any = faiss.read_index(str(out))
        row(
            f"autofaiss, {made.get('index_key', '')}",
            f"its own: {made.get('index_param', '')}",
            _searcher(theirs),
            out.stat().st_size,
            made["seconds"],
        )
        inner = faiss.extract_index_ivf(theirs)
        for nprobe in (2**i for i in range(14)):
            inner.nprobe = min(nprobe, inner.nlist)
            if nprobe >= inner.nlist or recall(theirs.search(xq, K)[1], truth) >= TARGET:
                break
        row("the same", f"nprobe {inner.nprobe}", _searcher(theirs), out.stat().st_size, made["seconds"])
    if n <= 200_000:
        start = time.perf_counter()
        hnsw = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        for x in read(root / "db"):
            hnsw.add(x)
        seconds = time.perf_counter() - start
        for ef in (2**i for i in range(4, 11)):
            hnsw.hnsw.efSearch = ef
            if recall(hnsw.search(xq, K)[1], truth) >= TARGET:
                break
        row("faiss HNSW32", f"efSearch {ef}", _searcher(hnsw), n * (4 * dim + 8 * 32 + 16), seconds)
    row("faiss, exact", "", _searcher(flat), 4 * dim * n, 0)
    spread.close()


def _searcher(index: Any) -> Callable[[Matrix], Any]:
    return lambda x: index.search(x, K)


def growth(scratch: Path) -> None:
    from iir_dist.index.plan import IndexConfig, plan
    from iir_dist.index.points import OperatingPoints

    print(
        "\n| vectors | factory | build, s | measure, s | nprobe, refine | recall@10 | ms a query | B a vector | worker, MB |"
    )
    print("|---:|---|---:|---:|---|---:|---:|---:|---:|")
    for n in (10**4, 10**5, 10**6):
        root = scratch / f"growth-{n}"
        make(root, n, 256)
        made = child("ours", root, root / "index")
        found = OperatingPoints.model_validate_json((root / "index" / "operating_points.json").read_bytes())
        point, seconds = found.reaching(TARGET), made["seconds_of"]
        print(
            f"| {n:,} | {made['factory']} | {seconds['build']:.1f} | {seconds['measure']:.1f} | {point.nprobe}, "
            f"{point.refine} | {point.worst:.3f} | {point.latency_ms.p50:.2f} | {made['memory_bytes']['search'] / n:.0f} | "
            f"{made['memory_bytes']['build'] / 2**20:.0f} |", flush=True,
        )  # fmt: skip
    print(
        "\nPlanned\n\n| vectors | factory | shards | trained on | search, GB | B a vector | float16, GB | worker, GB | ms |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for n in (10**6, 10**7, 10**8, 10**9):
        todo = plan(n, 256, IndexConfig(recall=TARGET), ROWS_PER_FILE)
        print(
            f"| {n:,} | {todo.factory} | {len(todo.ranges)} | {todo.train_size:,} | {todo.search_bytes / 2**30:.2f} | "
            f"{todo.search_bytes / n:.1f} | {n * 512 / 2**30:.1f} | {todo.build_bytes / 2**30:.1f} | {todo.latency_ms:.2f} |"
        )


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        print(json.dumps(PROCESSES[sys.argv[1]](*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autofaiss", metavar="PYTHON", help="interpreter of an environment with autofaiss 2.18")
    parser.add_argument("--small", action="store_true", help="200,000 x 512 in place of 1,000,000 x 256")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "parts", nargs="*", choices=[[], "build", "search", "growth"], help="build and search where none is named"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep data and indexes there, and use what is there")
    arguments = parser.parse_args()
    parts = arguments.parts or ["build", "search"]
    n, dim = (200_000, 512) if arguments.small else (1_000_000, 256)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        root = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if {*parts} - {"growth"} and not (root / "test").exists():
            make(root, n, dim)
        if "build" in parts:
            build_part(root, n, dim)
        if "search" in parts:
            search_part(root, n, dim, arguments)
        if "growth" in parts:
            growth(root)
    print(f"\n{time.perf_counter() - start:.0f} s in all; peak of this process {peak() / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
