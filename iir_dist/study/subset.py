"""A fraction of the photos of every class, as an images artifact: what fewer labels cost."""

from __future__ import annotations

import hashlib
import math
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import Manifest, shard_name
from iir_dist.config import StageConfig
from iir_dist.data.stored import Stored
from iir_dist.errors import InputError
from iir_dist.vectors import I64


class SubsetConfig(StageConfig):
    """Which photos."""

    fraction: float = Field(gt=0, le=1)
    """Of each class, rounded up, and at least two: with one photo a class has no pair."""
    seed: int = 0
    execution: ClassVar[frozenset[str]] = frozenset()


def chosen(names: list[str], labels: list[str | None], config: SubsetConfig) -> I64:
    """Numbers of the photos, ascending: of each class the first by a hash of seed and name; those without label never.

    A larger fraction has the photos of a smaller one, so a curve over fractions only adds.
    """
    classes: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        if label is not None:
            classes.setdefault(label, []).append(number)
    picked: list[int] = []
    for members in classes.values():
        members.sort(key=lambda n: hashlib.sha256(f"{config.seed}/{names[n]}".encode()).digest())
        picked += members[: max(2, math.ceil(config.fraction * len(members)))]
    return np.sort(np.array(picked, np.int64))


def run(images_uri: str, out: str, config: SubsetConfig, *, force: bool = False) -> Manifest:
    """Write the chosen photos, a shard for each shard that they come from; ids are dense again.

    Raises:
        InputError: no photo has a label.
    """
    source = artifact.require(images_uri, "ingest")
    stored = Stored.read([source])
    numbers = chosen(stored.names, stored.labels, config)
    if not len(numbers):
        raise InputError(f"{images_uri} has no labelled photo; a fraction of the labels needs some")
    with artifact.begin(out, "ingest", config, {"images": artifact.reference(*source)}, force=force) as work:
        if work.finished:
            return work.finished
        parts = []
        for folder, shard, entry, first, rows in stored.shards:
            low, high = np.searchsorted(numbers, [first, first + len(rows)])
            if low < high:
                parts.append((folder, shard, entry, rows[numbers[low:high] - first], low))
        done = work.done()
        for number, (folder, shard, entry, rows, base) in enumerate(parts):
            if number in done:
                continue
            with artifact.verified(folder, shard, entry) as path:
                table = pq.read_table(path).take(pa.array(rows))
            at = table.schema.get_field_index("id")
            table = table.set_column(at, table.schema.field(at), pa.array(np.arange(base, base + len(rows))))
            with work.folder.publish(shard_name(number)) as file:
                pq.write_table(table, file.path, compression="none")
            artifact.commit(work.folder, number, {shard_name(number): artifact.entry_of(file)}, {"rows": len(rows)})
        counts = {"in": len(numbers), "out": len(numbers), "rejected": 0, "rows": len(numbers), "queries": 0}
        return work.publish(counts, info={"split": source[1].info.get("split", "train")}, shards=len(parts))
