"""Reading `embeddings/`: Parquet shards of unit vectors, ours or anybody's.

A plain folder of Parquet files with the columns `name` and `embedding` (and, if they are there, `id` and `split`) and
no manifest is accepted, checked while it is read, and said to be unverified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest, read_manifest
from iir_dist.config import fingerprint
from iir_dist.errors import CorruptError, InputError
from iir_dist.storage import Folder, open_folder, sha256_of
from iir_dist.vectors import F32, I64

NORM_TOLERANCE = 1e-2
"""How far a norm may be from 1: float16 vectors of 2,048 dimensions stay within it."""


def schema(dim: int, dtype: str = "float32") -> pa.Schema:
    """Schema of an embeddings shard."""
    value = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(value, dim), nullable=False),
        ]
    )


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one shard: ids (n,), names (n,), splits (n,) or None, vectors (n, d) float32 or None if not read."""

    ids: I64
    names: np.ndarray[Any, Any]
    splits: np.ndarray[Any, Any] | None
    vectors: F32 | None

    def take(self, mask: np.ndarray[Any, Any]) -> Block:
        """The rows where `mask` is true."""
        if mask.all():
            return self
        return Block(
            self.ids[mask],
            self.names[mask],
            None if self.splits is None else self.splits[mask],
            None if self.vectors is None else self.vectors[mask],
        )


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One embeddings folder. `encoder` is the fingerprint of what made it, None where that is not known."""

    folder: Folder
    manifest: Manifest | None
    shards: tuple[str, ...]
    dim: int
    ref: InputRef
    encoder: str | None

    def read(self, shard: str, *, vectors: bool = True) -> Block:
        """One shard, in memory. Vectors are checked to be finite and of unit norm.

        Raises:
            CorruptError: they are not, the file is damaged, or (with a manifest) not the one that was written.
        """
        table = self._table(shard, ("id", "name", "split", "embedding") if vectors else ("id", "name", "split"))
        x = np.require(self._checked(table, shard), requirements="W") if vectors else None
        ids = table.column("id").to_numpy() if "id" in table.column_names else np.arange(len(table))
        splits = table.column("split").to_numpy(zero_copy_only=False) if "split" in table.column_names else None
        return Block(ids.astype(np.int64), table.column("name").to_numpy(zero_copy_only=False), splits, x)

    def database_vectors(self, shard: str) -> F32:
        """The vectors (n, d) of the rows to search in (`database_rows`), checked as `read` does; perhaps read-only.

        Names and ids are not read, which for small vectors take most of the time.
        """
        table = self._table(shard, ("split", "embedding"))
        if "split" in table.column_names:
            kept = pc.fill_null(pc.not_equal(table.column("split"), "query"), True)
            table = table if pc.all(kept).as_py() else table.filter(kept)
        return self._checked(table, shard)

    def count_queries(self, shard: str) -> int:
        """Rows of split `query`; none where no split is known."""
        table = self._table(shard, ("split",))
        return int(pc.sum(pc.equal(table["split"], "query")).as_py() or 0) if table.num_columns else 0

    def _table(self, shard: str, columns: Sequence[str]) -> pa.Table:
        """These columns, as far as they are there; the file is checked where vectors are among them."""
        if "embedding" in columns and self.manifest is not None:
            artifact.check_file(self.folder, shard, self.manifest.files[shard])
        with self.folder.open(shard) as file:
            where = self.folder.address(shard)
            parquet = _parquet(file, where)
            with _decoding(where):
                return parquet.read(columns=[c for c in columns if c in parquet.schema_arrow.names])

    def _checked(self, table: pa.Table, shard: str) -> F32:
        where = self.folder.address(shard)
        x = _matrix(table.column("embedding"), self.dim, where)
        check_unit(x, where)
        return x

    def blocks(self, *, vectors: bool = True) -> Iterator[Block]:
        """Every shard in order."""
        for shard in self.shards:
            yield self.read(shard, vectors=vectors)


def open_embeddings(uri: str | Path) -> Embeddings:
    """Open an embeddings folder.

    Raises:
        InputError: there is none, or its files lack the columns.
    """
    folder = open_folder(uri)
    manifest = read_manifest(folder)
    if manifest is not None:
        artifact.require(uri, *artifact.EMBEDDINGS)
        shards = manifest.shards()
        ref = artifact.reference(folder, manifest)
        encoder = manifest.info.get("encoder_fingerprint")
    else:
        shards = [e.name for e in folder.list() if e.name.endswith(".parquet") and not e.name.startswith((".", "_"))]
        if not shards:
            artifact.require(uri, *artifact.EMBEDDINGS)  # explains what is there instead
        ref = InputRef(uri=folder.uri, fingerprint=_content(folder, shards), verified=False)
        encoder = None
    dims = {_dimension(folder, shard) for shard in (shards if manifest is None else shards[:1])}
    if len(dims) != 1:
        raise InputError(f"{folder.uri} mixes vectors of dimensions {sorted(dims)}; expected one")
    found = Embeddings(folder, manifest, tuple(shards), dims.pop(), ref, encoder)
    if manifest is None:
        _check_ids(found)
    return found


def _content(folder: Folder, shards: Sequence[str]) -> str:
    digests = {}
    for shard in shards:
        with folder.local(shard) as path:
            digests[shard] = sha256_of(path)
    return fingerprint(digests)


def _check_ids(found: Embeddings) -> None:
    blocks = list(found.blocks(vectors=False))
    ids = np.concatenate([b.ids for b in blocks])
    has_ids = _has_column(found, "id")
    if has_ids and len(np.unique(ids)) != len(ids):
        raise InputError(
            f"{found.folder.uri} has {len(ids) - len(np.unique(ids))} duplicate ids; expected each id once"
        )
    if not has_ids and len(blocks) > 1:
        raise InputError(f"{found.folder.uri} has no `id` column in its {len(blocks)} files; add one, unique over all")


def _has_column(found: Embeddings, column: str) -> bool:
    with found.folder.open(found.shards[0]) as file:
        return column in _parquet(file, found.shards[0]).schema_arrow.names


def _dimension(folder: Folder, shard: str) -> int:
    where = folder.address(shard)
    with folder.open(shard) as file:
        parquet = _parquet(file, where)
        fields = parquet.schema_arrow
        for column in ("name", "embedding"):
            if column not in fields.names:
                raise InputError(f"{where} has no column {column!r} (it has {', '.join(fields.names)})")
        kind = fields.field("embedding").type
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        with _decoding(where):
            first = next(parquet.iter_batches(batch_size=1, columns=["embedding"]), None)
        if first is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise InputError(f"{where}: `embedding` is {kind}; expected a list of floats, at least one row")
        return len(first.column(0)[0])


def _parquet(file: Any, where: str) -> pq.ParquetFile:
    with _decoding(where):
        return pq.ParquetFile(file)


@contextlib.contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; Arrow's own have no number
            raise
        reason = str(error).strip().splitlines()[0]
        raise CorruptError(f"{where} is not a Parquet file, or damaged ({reason}); write it again") from error


def _matrix(column: pa.ChunkedArray, dim: int, where: str) -> F32:
    """A list column as (n, dim) float32, without a Python loop."""
    parts = []
    for chunk in column.chunks:
        if chunk.null_count:
            raise CorruptError(f"{where}: `embedding` has {chunk.null_count} nulls")
        flat = chunk.flatten().to_numpy(zero_copy_only=False)
        if len(flat) != len(chunk) * dim:
            raise CorruptError(f"{where}: vectors of several lengths; expected all of {dim}")
        parts.append(np.asarray(flat, dtype=np.float32).reshape(len(chunk), dim))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros((0, dim), np.float32)


def check_unit(x: F32, where: str) -> None:
    """Raise `CorruptError` unless all vectors are finite and of unit norm."""
    norms = np.sqrt(np.einsum("nd,nd->n", x, x))  # a fifth of the time of np.linalg.norm, which squares into a copy
    bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # a NaN compares false
    if len(bad):
        raise CorruptError(
            f"{where}: {len(bad)} of {len(x)} vectors are not of unit norm (row {bad[0]}: {norms[bad[0]]:.4g}); "
            "normalize them (iir_dist.vectors.normalize)"
        )
