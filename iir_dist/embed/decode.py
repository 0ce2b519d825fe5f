"""One images shard to batches of pixels: images of one shape, up to a budget of pixels.

The decoder makes the batches, so what is computed together depends on the shard alone and not on scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist.data.images import MAX_MEGAPIXELS, Resize, decode, prepare
from iir_dist.errors import ImageError

BATCH_FIELDS = pa.schema(
    [
        ("shard", pa.int64()), ("total", pa.int64()), ("row", pa.list_(pa.int64())), ("id", pa.list_(pa.int64())),
        ("name", pa.list_(pa.string())), ("split", pa.list_(pa.string())), ("shape", pa.list_(pa.int64())),
        ("pixels", pa.large_binary()), ("error", pa.string()),
    ]
)  # fmt: skip
"""One decoded batch as a row: `pixels` is (n, height, width, 3) uint8; with `error`, n = 1 and there are none."""


def batches(path: Path, shard: int, size: int, resize: Resize, pixels: float) -> Iterator[pa.Table]:
    """Decode one images shard, row group by row group, into batches of one shape; a pure function of the shard."""
    buckets: dict[tuple[int, int], list[tuple[int, Any, Any]]] = {}
    # Mapped and without reading ahead: one row group is held at a time.
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as parquet:
        total = parquet.metadata.num_rows
        row = 0
        columns = ["id", "name", "split", "box", "bytes"]
        for group in range(parquet.num_row_groups):
            for item in parquet.read_row_group(group, columns, use_threads=False).to_pylist():
                try:
                    image = prepare(decode(item.pop("bytes"), MAX_MEGAPIXELS * 2), size, resize, item["box"])
                except ImageError as error:
                    yield _batch(shard, total, [(row, item, None)], str(error))
                    row += 1
                    continue
                bucket = buckets.setdefault(image.shape[:2], [])
                bucket.append((row, item, image))
                row += 1
                if (len(bucket) + 1) * image.shape[0] * image.shape[1] > pixels:
                    yield _batch(shard, total, buckets.pop(image.shape[:2]))
    for bucket in buckets.values():
        yield _batch(shard, total, bucket)


def _batch(shard: int, total: int, rows: list[tuple[int, Any, Any]], error: str | None = None) -> pa.Table:
    stack = np.zeros((0, 0, 0, 3), np.uint8) if error else np.stack([image for _, _, image in rows])
    values = {
        "shard": [shard], "total": [total], "row": [[row for row, _, _ in rows]],
        **{key: [[item[key] for _, item, _ in rows]] for key in ("id", "name", "split")},
        "shape": [list(stack.shape)], "pixels": [stack.tobytes()], "error": [error],
    }  # fmt: skip
    return pa.table(values, schema=BATCH_FIELDS)
