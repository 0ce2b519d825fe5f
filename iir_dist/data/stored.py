"""Names and labels of images without a byte of them, numbered as `data.cache.Photos` does: queries are left out.

For who has to choose among images that others will open: this reads three columns, where opening the photos copies all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist.artifact import FileEntry, Manifest
from iir_dist.storage import Folder
from iir_dist.vectors import I64


@dataclass(frozen=True, slots=True)
class Stored:
    """Names and labels of the images of several artifacts, by number.

    `shards` are (folder, shard, its entry, first number, rows of the shard that are numbered (n,)).
    """

    names: list[str]
    labels: list[str | None]
    shards: list[tuple[Folder, str, FileEntry, int, I64]]

    @classmethod
    def read(cls, sources: Sequence[tuple[Folder, Manifest]]) -> Stored:
        """Read these columns alone; no image is."""
        names: list[str] = []
        labels: list[str | None] = []
        shards = []
        for folder, manifest in sources:
            for shard in manifest.shards():
                with folder.open(shard) as file:
                    table = pq.read_table(file, columns=["name", "label", "split"])
                rows = np.flatnonzero(pc.fill_null(pc.not_equal(table["split"], "query"), False).to_numpy())
                shards.append((folder, shard, manifest.files[shard], len(names), rows))
                table = table.take(pa.array(rows))
                names += table["name"].to_pylist()
                labels += table["label"].to_pylist()
        return cls(names, labels, shards)
