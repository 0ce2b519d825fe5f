"""Several embeddings folders as one database, addressed by a dense row number.

A database row is any row whose split is not `query`. Rows are numbered from 0 over folders, shards and rows in
order; a row's public id is its image id plus the offset of its folder, so that with one folder ids are those that
ingest gave, and with several they stay distinct.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from iir_dist.artifact import InputRef, combine
from iir_dist.data.embeddings import Block, Embeddings, open_embeddings
from iir_dist.errors import InputError, MismatchError
from iir_dist.vectors import F32

NAMES = pa.schema(
    [("id", pa.int64()), ("name", pa.string()), ("split", pa.string()), ("source", pa.int32())]
)  # fmt: skip
"""Schema of `names.parquet`; row r of the file is database row r."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The database rows of one shard: rows [start, start + count) of the collection."""

    source: int
    shard: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Collection:
    """Database rows of several folders. Picklable; holds no vectors."""

    sources: tuple[Embeddings, ...]
    segments: tuple[Segment, ...]

    @property
    def num_rows(self) -> int:
        """Number of database rows."""
        return sum(segment.count for segment in self.segments)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.sources[0].dim

    @property
    def ref(self) -> InputRef:
        """All folders as one input."""
        return combine(source.ref for source in self.sources)

    @property
    def encoder(self) -> str | None:
        """Fingerprint of the encoder, None where not known."""
        return next((s.encoder for s in self.sources if s.encoder), None)

    def shifted(self, first: int) -> Collection:
        """The same rows, numbered from `first`: what is appended to that many."""
        return replace(self, segments=tuple(replace(s, start=s.start + first) for s in self.segments))

    def vectors(self, start: int, stop: int) -> Iterator[tuple[int, F32]]:
        """(first row, vectors) block by block for rows [start, stop)."""
        for segment in self.segments:
            low, high = max(start, segment.start), min(stop, segment.start + segment.count)
            if low < high:
                x = self.sources[segment.source].database_vectors(segment.shard)
                yield low, x[low - segment.start : high - segment.start]


def database_rows(block: Block) -> Block:
    """The rows to search in: all but the queries (all, where no split is known)."""
    return block if block.splits is None else block.take(block.splits != "query")


def query_rows(block: Block) -> Block:
    """The rows to search with: the queries (all, where no split is known)."""
    return block if block.splits is None else block.take(block.splits == "query")


def open_collection(uris: Sequence[str]) -> tuple[Collection, pa.Table]:
    """The collection and its names table (`NAMES`).

    Raises:
        MismatchError: the folders were made by several encoders.
        InputError: dimensions differ, or there is no database row.
    """
    sources = tuple(open_embeddings(uri) for uri in uris)
    check_same_space(sources)
    segments, tables = [], []
    start = offset = 0
    for number, source in enumerate(sources):
        top = -1
        for shard in source.shards:
            block = source.read(shard, vectors=False)
            top = max(top, int(block.ids.max(initial=-1)))
            rows = database_rows(block)
            n = len(rows.ids)
            if n:
                segments.append(Segment(number, shard, start, n))
                splits = np.full(n, "db") if rows.splits is None else rows.splits
                columns: dict[str, Any] = {
                    "id": rows.ids + offset, "name": rows.names, "split": splits, "source": np.full(n, number, np.int32)
                }  # fmt: skip
                tables.append(pa.table(columns, schema=NAMES))
                start += n
        offset += top + 1
    if not segments:
        raise InputError(f"{' '.join(uris)}: no database rows, all are queries; give the embeddings of the database")
    return Collection(sources, tuple(segments)), pa.concat_tables(tables)


def check_same_space(sources: Sequence[Embeddings]) -> None:
    """Raise unless all folders hold vectors of one encoder and dimension."""
    first = sources[0]
    for other in sources[1:]:
        if first.encoder and other.encoder and first.encoder != other.encoder:
            raise MismatchError(
                f"{first.folder.uri} was made by encoder {first.encoder[:12]}, {other.folder.uri} by "
                f"{other.encoder[:12]}; embed both with one encoder"
            )
        if first.dim != other.dim:
            raise InputError(
                f"{first.folder.uri} has vectors of dimension {first.dim}, {other.folder.uri} of {other.dim}; "
                "expected one dimension"
            )
