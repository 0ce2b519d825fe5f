"""Small copies of the photos that a page shows, each held once however often it is shown."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.images import thumbnail
from iir_dist.errors import ImageError, InputError
from iir_dist.storage import Folder

Key = tuple[str, bool]
"""Name of a photo, and whether it is a query's, which is cut to its box."""


class Photos:
    """Photos of images artifacts by name, read only where a page shows them.

    `data` are JPEGs in base64; `numbers` says where in it a photo is.
    """

    def __init__(self, sources: Sequence[tuple[Folder, Manifest]], side: int) -> None:
        self._side, self._sources = side, sources
        self.data: list[str] = []
        self.numbers: dict[Key, int] = {}

    def load(self, wanted: Iterable[Key]) -> None:
        """Load photos; those that no artifact holds, or that cannot be decoded, are left out.

        Raises:
            InputError: there are artifacts, and none of them holds any.
            CorruptError: a shard is not the one that was written.
        """
        wanted = list(dict.fromkeys(wanted))
        if not self._sources or not wanted:
            return
        for (source, shard), keys in self._find(wanted).items():
            folder, manifest = self._sources[source]
            with artifact.verified(folder, shard, manifest.files[shard]) as path:
                table = pq.ParquetFile(path).read(columns=["bytes", "box"]).take([row for _, row in keys])
            for (key, _), item in zip(keys, table.to_pylist(), strict=True):
                try:
                    jpeg = thumbnail(item["bytes"], self._side, item["box"])
                except ImageError:
                    continue
                self.numbers[key] = len(self.data)
                self.data.append(base64.b64encode(jpeg).decode())
        if not self.data:
            where = ", ".join(folder.uri for folder, _ in self._sources)
            raise InputError(
                f"none of the {len(wanted)} photos of the rankings (first {wanted[0][0]!r}) is in {where}; expected the "
                "images that were searched, or no --images at all"
            )

    def _find(self, wanted: Sequence[Key]) -> dict[tuple[int, str], list[tuple[Key, int]]]:
        """Sources and shards that hold wanted photos, with the rows; of several photos of a name the first counts."""
        left = set(wanted)
        found: dict[tuple[int, str], list[tuple[Key, int]]] = {}
        for source, (folder, manifest) in enumerate(self._sources):
            for shard in manifest.shards():
                try:
                    with folder.open(shard) as file:
                        table = pq.ParquetFile(file).read(columns=["name", "split"])
                except (OSError, pa.ArrowException):
                    artifact.check_file(folder, shard, manifest.files[shard])  # says what is wrong with it
                    raise
                splits = table.column("split").to_pylist()
                for row, (name, split) in enumerate(zip(table.column("name").to_pylist(), splits, strict=True)):
                    key = (name, split == "query")
                    if key in left:
                        left.remove(key)
                        found.setdefault((source, shard), []).append((key, row))
        return found
