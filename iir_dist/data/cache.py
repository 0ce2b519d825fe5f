"""Random row access for training: a node's own copy of image shards as uncompressed Arrow IPC, memory-mapped.

Parquet is read from front to back; training reads rows in any order. Each shard is converted once, a row group at a
time, to a file named by the shard's SHA-256, so a copy can never belong to other data.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.storage import Folder, LocalFolder

COLUMNS = ["id", "name", "label", "split", "bytes"]


def cache_folder() -> LocalFolder:
    """`$IIR_CACHE`, else the user's cache directory."""
    base = os.environ.get("IIR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "iir_dist"
    return LocalFolder(base)


def fill(folder: Folder, shard: str, manifest: Manifest, cache: LocalFolder) -> Path:
    """The local copy of one shard, made if it is not there."""
    entry = manifest.files[shard]
    name = f"{entry.sha256}.arrow"
    if not cache.exists(name):
        artifact.check_file(folder, shard, entry)
        with folder.local(shard) as source, cache.publish(name) as file:
            parquet = pq.ParquetFile(source)
            schema = pa.schema([parquet.schema_arrow.field(c) for c in COLUMNS])
            with pa.ipc.new_file(str(file.path), schema) as writer:
                for batch in parquet.iter_batches(batch_size=256, columns=COLUMNS):
                    writer.write_batch(batch)
    return cache.path / name


@dataclass(frozen=True, slots=True)
class Photo:
    """One stored photo."""

    name: str
    label: str | None
    data: bytes


class Photos:
    """Rows of one or more images artifacts, by number; queries are left out. Opens its files in each process."""

    def __init__(self, sources: list[tuple[Folder, Manifest]]) -> None:
        cache = cache_folder()
        self._paths = [fill(f, shard, m, cache) for f, m in sources for shard in m.shards()]
        self._files: list[Any] | None = None
        labels: list[str | None] = []
        where: list[tuple[int, int, int]] = []
        for number, file in enumerate(self._open()):
            for b in range(file.num_record_batches):
                batch = file.get_batch(b)
                for row, split in enumerate(batch.column("split").to_pylist()):
                    if split != "query":
                        where.append((number, b, row))
                labels += [
                    label
                    for label, split in zip(
                        batch.column("label").to_pylist(), batch.column("split").to_pylist(), strict=True
                    )
                    if split != "query"
                ]
        self._where = np.array(where, dtype=np.int64).reshape(-1, 3)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def __getitem__(self, number: int) -> Photo:
        file, batch, row = (int(v) for v in self._where[number])
        rows = self._open()[file].get_batch(batch)
        return Photo(
            rows.column("name")[row].as_py(), rows.column("label")[row].as_py(), rows.column("bytes")[row].as_py()
        )

    def _open(self) -> list[Any]:
        if self._files is None:
            self._files = [pa.ipc.open_file(pa.memory_map(str(path))) for path in self._paths]
        return self._files
