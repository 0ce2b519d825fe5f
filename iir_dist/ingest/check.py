"""The images of one shard: read, decoded to the end, hashed, and written. Runs in the workers."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import FileEntry, shard_name
from iir_dist.data.images import decode
from iir_dist.data.listing import to_members
from iir_dist.data.sources.reader import Reader
from iir_dist.errors import ImageError
from iir_dist.ingest.ledger import PLAN
from iir_dist.ingest.plan import where
from iir_dist.storage import Folder

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),
    ]
)
CHECKED = pa.schema([field for field in SCHEMA if field.name != "id"])
ROW_GROUP_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Checked:
    """What the driver needs of a checked shard: ledger lines, how many rows are good, and where it compares their
    bytes, (name, place, SHA-256) of each."""

    rejected: list[tuple[str, str, str, str]]
    good: int
    rows: list[tuple[str, str, bytes]]


@functools.cache
def reader() -> Reader:
    """One reader a process: a compressed archive goes on where the last shard ended."""
    return Reader()


def check(folder: Folder, number: int, max_megapixels: float, compare: bool) -> tuple[pa.Table, Checked]:
    """Read and fully decode the images of one shard; the table lacks only the ids.

    Raises:
        StorageError: the store is gone, which says nothing of the images; nothing is rejected for it.
    """
    with folder.open(f"{PLAN}{shard_name(number)}") as file:
        rows = pq.read_table(file)
    planned = rows.select(["name", "label", "split", "box"]).to_pylist()
    places, members = where(rows), to_members(rows)
    columns: dict[str, list[Any]] = {field.name: [] for field in CHECKED}
    batches: list[pa.RecordBatch] = []
    rejected: list[tuple[str, str, str, str]] = []
    good: list[tuple[str, str, bytes]] = []
    held = 0
    answers = reader().read(members)
    for row, place, (_, data) in zip(planned, places, answers, strict=True):
        try:
            if isinstance(data, ImageError):
                raise data
            image = decode(data, max_megapixels)
        except ImageError as error:
            rejected.append((row["name"], place, error.reason, error.detail))
            continue
        digest = hashlib.sha256(data).digest()
        values = (row["name"], row["label"], row["split"], row["box"], image.width, image.height, digest.hex(), data)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        if compare:
            good.append((row["name"], place, digest))
        held += len(data)
        if held >= ROW_GROUP_BYTES:  # Arrow's copy in place of Python's, a row group at a time
            batches.append(_batch(columns))
            held = 0
    batches.append(_batch(columns))
    table = pa.Table.from_batches(batches, CHECKED)
    return table, Checked(rejected, len(table), good)


def _batch(columns: dict[str, list[Any]]) -> pa.RecordBatch:
    batch = pa.record_batch(columns, schema=CHECKED)
    for column in columns.values():
        column.clear()
    return batch


def write(
    folder: Folder, number: int, base: int, table: pa.Table, rejected: list[tuple[str, str, str, str]], keep: Any = None
) -> None:
    """Write one shard with ids from `base`, and commit it.

    Args:
        keep: (rows,) bool, the rows to write; all where not given.
    """
    if keep is not None:
        table = table.filter(pa.array(keep))
    ids = pa.array(range(base, base + len(table)), pa.int64())
    table = table.add_column(0, SCHEMA.field("id"), ids)
    files: dict[str, FileEntry] = {}
    if len(table):
        name = shard_name(number)
        with folder.publish(name) as file:
            rows = max(1, int(len(table) * ROW_GROUP_BYTES / max(table.nbytes, 1)))
            # JPEG does not compress again, and statistics over bytes would store images in the footer.
            pq.write_table(
                table, file.path, row_group_size=rows, compression="none", use_dictionary=["label", "split"],
                write_statistics=["id", "name"],
            )  # fmt: skip
        files[name] = artifact.entry_of(file)
    artifact.commit(folder, number, files, {"rows": len(table)}, {"rejected": rejected})
