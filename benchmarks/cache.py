"""Rows a second through the cache and from Parquet, and seconds to open a million rows: python benchmarks/cache.py

Photos are random bytes of 100 kB in row groups of 16 MB, as ingest writes them; each read copies the bytes, as the
decoder does. Files are in the page cache; a fill ends when the copy is on the disk. Figures are medians of five.
"""

from __future__ import annotations

import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.config import StageConfig
from iir_dist.data.cache import SCHEMA, Photos

PHOTOS, PHOTO_BYTES = 2_000, 100_000
TINY, TINY_SHARDS, TINY_BYTES, CLASSES = 1_000_000, 4, 16, 10_000
GROUP_BYTES = 16 * 2**20


def make(out: Path, shards: int, rows: int, row_bytes: int) -> Any:
    """An images artifact of random bytes; every hundredth row is a query."""
    rng = np.random.default_rng(0)
    with artifact.begin(out, "ingest", StageConfig(), {}) as work:
        for shard in range(shards):
            numbers = range(shard * rows, (shard + 1) * rows)
            offsets = pa.py_buffer(np.arange(rows + 1, dtype=np.int32) * row_bytes)
            data = [None, offsets, pa.py_buffer(rng.bytes(rows * row_bytes))]
            columns = {
                "name": [f"{n % CLASSES}/{n:07d}" for n in numbers],
                "label": [str(n % CLASSES) for n in numbers],
                "split": ["query" if n % 100 == 99 else "train" for n in numbers],
                "bytes": pa.Array.from_buffers(pa.binary(), rows, data),
            }
            table, name = pa.table(columns, schema=SCHEMA), artifact.shard_name(shard)
            with work.folder.publish(name) as file:
                group = max(1, int(rows * GROUP_BYTES / table.nbytes))
                pq.write_table(
                    table, file.path, row_group_size=group, compression="none", use_dictionary=["label", "split"],
                    write_statistics=["name"],
                )  # fmt: skip
            artifact.commit(work.folder, shard, {name: artifact.entry_of(file)}, {"rows": rows})
        work.publish({"rows": shards * rows}, shards=shards)
    return artifact.require(out, "ingest")


def median(work: Callable[[], object]) -> float:
    """Seconds that it takes, of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fill(source: Any) -> None:
    """Copy an artifact into the cache anew."""
    shutil.rmtree(os.environ["IIR_CACHE"], ignore_errors=True)
    Photos([source])


def from_parquet(path: Path, numbers: list[int]) -> list[bytes]:
    """Rows of one shard, each by reading the row group that it lies in."""
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as parquet:
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        found = []
        for number in numbers:
            group = int(np.searchsorted(starts, number, side="right")) - 1
            table = parquet.read_row_group(group, columns=["name", "label", "bytes"])
            found.append(table.column("bytes")[number - int(starts[group])].as_py())
    return found


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["IIR_CACHE"] = str(Path(scratch) / "cache")
        source = make(Path(scratch) / "photos", 1, PHOTOS, PHOTO_BYTES)
        size = PHOTOS * PHOTO_BYTES / 1e6
        lines.append((f"fill {size:.0f} MB", f"{size / median(lambda: fill(source)):,.0f} MB/s"))
        photos = Photos([source])
        order = np.random.default_rng(1).permutation(len(photos)).tolist()
        took = median(lambda: [bytes(photos[number].data) for number in order])
        lines.append(("random rows, cache", f"{len(order) / took:,.0f} rows/s"))
        took = median(lambda: [photos[number] for number in order])
        lines.append(("random rows, cache, bytes not touched", f"{len(order) / took:,.0f} rows/s"))
        path = Path(scratch) / "photos" / "shard-00000.parquet"
        took = median(lambda: from_parquet(path, order[:50]))
        lines.append(("random rows, a row group of Parquet each", f"{50 / took:,.0f} rows/s"))

        source = make(Path(scratch) / "tiny", TINY_SHARDS, TINY // TINY_SHARDS, TINY_BYTES)
        lines.append((f"fill {TINY:,} rows", f"{median(lambda: fill(source)):.2f} s"))
        lines.append((f"open {TINY:,} rows", f"{median(lambda: Photos([source])):.3f} s"))
        lines.append(("… and their labels", f"{median(lambda: Photos([source]).labels):.3f} s"))
        state = pickle.dumps(Photos([source]))
        lines.append((f"… from a pickle of {len(state):,} bytes", f"{median(lambda: pickle.loads(state)):.3f} s"))  # noqa: S301
    print("| what | figure |\n|---|---:|")
    for what, figure in lines:
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main()
