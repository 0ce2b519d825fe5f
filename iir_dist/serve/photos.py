"""The stored photos of database rows, and small copies of them."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.images import MAX_MEGAPIXELS, SIGNATURES, decode
from iir_dist.errors import CorruptError, NotFoundError
from iir_dist.storage import Folder
from iir_dist.vectors import I64

SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "AVIF": "image/avif"}
"""Formats that browsers show. Whatever else is stored is sent as bytes to keep, never as a type that could run."""
OTHER = "application/octet-stream"
COLUMNS = ("name", "split", "width", "height")


class Photos:
    """Photos of images artifacts by database row, matched by name; queries are left out.

    Bytes are read from the shards, of which each is checked before its first use. Small copies are kept, the ones used
    least recently make room.

    Args:
        sources: images artifacts; of several photos of a name the first counts.
        names: of the database rows (`engine.Index.names`).
        thumbnail_bytes: of small copies in memory.
        threads: small copies that are made at a time, which bounds the memory of decoding.
    """

    def __init__(
        self, sources: Sequence[tuple[Folder, Manifest]], names: pa.Table, thumbnail_bytes: int, threads: int
    ) -> None:
        self._shards: list[tuple[Folder, str, Manifest]] = []
        tables, starts, rows = [], [0], []
        for folder, manifest in sources:
            for shard in manifest.shards():
                with folder.open(shard) as file:
                    parquet = pq.ParquetFile(file)
                    there = [name for name in COLUMNS if name in parquet.schema_arrow.names]
                    table = parquet.read(columns=there)
                for name in COLUMNS[2:]:
                    if name not in there:
                        table = table.append_column(name, pa.array(np.zeros(len(table), np.int32)))
                stored = np.flatnonzero(pc.fill_null(pc.not_equal(table["split"], "query"), True).to_numpy())
                self._shards.append((folder, shard, manifest))
                tables.append(table.select(["name", "width", "height"]).take(pa.array(stored)))
                rows.append(stored)
                starts.append(starts[-1] + len(stored))
        self._starts = np.array(starts)
        self._rows: I64 = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        self._numbers: I64 = np.full(len(names), -1)
        self._sizes = np.zeros((0, 2), np.int32)
        if tables:
            table = pa.concat_tables(tables)
            found = pc.index_in(names["name"], value_set=table["name"].combine_chunks())
            self._numbers = pc.fill_null(found, -1).to_numpy().astype(np.int64)
            self._sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], axis=1)
        self._checked: set[int] = set()
        self._small: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._room, self._held = thumbnail_bytes, 0
        self._lock, self._checking, self._decoding = threading.Lock(), threading.Lock(), threading.Semaphore(threads)

    @property
    def count(self) -> int:
        """Database rows whose photo is stored."""
        return int((self._numbers >= 0).sum())

    @property
    def rows(self) -> I64:
        """These rows, ascending."""
        return np.flatnonzero(self._numbers >= 0)

    def size(self, row: int) -> tuple[int, int] | None:
        """Width and height in px of the upright photo; None where it is not stored."""
        number = self._numbers[row]
        width, height = self._sizes[number].tolist() if number >= 0 else (0, 0)
        return (width, height) if width and height else None

    def read(self, row: int) -> bytes:
        """The original file.

        Raises:
            NotFoundError: the photo of this row is not stored.
            CorruptError: its shard is not the one that was written.
        """
        number = int(self._numbers[row])
        if number < 0:
            raise NotFoundError("the photo of this row is not stored here; start with --images IMAGES")
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        folder, shard, manifest = self._shards[at]
        if at not in self._checked:
            with self._checking:  # a page asks for many at once, and one of them reads all of the shard
                if at not in self._checked:
                    artifact.check_file(folder, shard, manifest.files[shard])
                    self._checked.add(at)
        row = int(self._rows[number])
        try:
            with folder.open(shard) as file:
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    length = parquet.metadata.row_group(group).num_rows
                    if row < length:
                        data: bytes = parquet.read_row_group(group, ["bytes"], use_threads=False)["bytes"][row].as_py()
                        return data
                    row -= length
        except (NotFoundError, pa.ArrowException, OSError) as error:
            raise CorruptError(f"{folder.address(shard)} was changed since it was checked: {error}") from error
        raise CorruptError(f"{folder.address(shard)} was changed since it was checked: it has fewer rows")

    def small(self, row: int, side: int) -> bytes:
        """A JPEG of at most `side` px a side. Raises as `read`, and `ImageError`."""
        key = (row, side)
        with self._lock:
            if key in self._small:
                self._small.move_to_end(key)
                return self._small[key]
        with self._decoding:
            made = shrunk(self.read(row), side)
        with self._lock:
            if key not in self._small:
                self._small[key] = made
                self._held += len(made)
            while self._held > self._room and self._small:
                self._held -= len(self._small.popitem(last=False)[1])
        return made


def shrunk(data: bytes, side: int, max_megapixels: float = 2 * MAX_MEGAPIXELS) -> bytes:
    """A JPEG of at most `side` px a side; JPEGs are decoded at no larger a scale than that takes."""
    image = decode(data, max_megapixels, least=side)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return out.getvalue()


def read_heic() -> None:
    """Teach Pillow HEIC, the format of iPhones, where the extra `heic` is installed."""
    with contextlib.suppress(ImportError):
        from pi_heif import register_heif_opener

        register_heif_opener()


def media_type(data: bytes) -> str:
    """By the bytes: one of `SHOWN`, else bytes."""
    head = data[:1024]
    kind = next((name for name, pattern in SIGNATURES.items() if re.match(pattern, head, re.DOTALL)), "")
    return SHOWN.get(kind, OTHER)
