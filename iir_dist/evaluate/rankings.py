"""Reading `rankings/`: Parquet with query, rank, name (and id, score), ours or anybody's.

A list of a million names is held as numbers. In our own rankings an image has one id, so a name is looked at once and
not once a list; in others' the names themselves are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest, read_manifest
from iir_dist.config import fingerprint
from iir_dist.errors import CorruptError, InputError
from iir_dist.storage import Folder, open_folder

COLUMNS = ("query", "rank", "name")
STAGES = ("search", "rerank")
"""That write rankings."""
LARGEST_ID = 2**27
"""Ids up to it are looked up in a table of them all (512 MB); where there are larger ones, names are told apart."""
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Ties:
    """Images that have the score of a neighbour in their list, the lists that have such, and what puts them in order."""

    images: int
    lists: int
    broken_by: str


@dataclass(frozen=True, slots=True)
class Rankings:
    """All lists, best first.

    lists: query -> (n,) numbers of images. names: by number. scores: query -> (n,), empty where there are none. ties: None
    where there are no scores. rising: queries whose scores rise somewhere in the list; these keep the order of their ranks.
    """

    lists: dict[str, I32]
    names: pa.Array
    scores: dict[str, Scores] = field(default_factory=dict)
    ties: Ties | None = None
    rising: tuple[str, ...] = ()


def open_rankings(uri: str | Path) -> tuple[Rankings, Manifest | None, InputRef]:
    """Read a rankings folder; its files are checked against the manifest where there is one."""
    folder = open_folder(uri)
    manifest = read_manifest(folder)
    if manifest is not None:
        artifact.require(uri, *STAGES)
        shards, ref = manifest.shards(), artifact.reference(folder, manifest)
        for shard in shards:
            artifact.check_file(folder, shard, manifest.files[shard])
    else:
        entries = [e for e in folder.list() if e.name.endswith(".parquet") and not e.name.startswith((".", "_"))]
        shards = [e.name for e in entries]
        if not shards:
            artifact.require(uri, *STAGES)  # explains what is there instead
        content = fingerprint([[e.name, e.size, e.version] for e in entries])
        ref = InputRef(uri=folder.uri, fingerprint=content, verified=False)
    return read_rankings(folder, shards, by_id=manifest is not None), manifest, ref


def read_rankings(folder: Folder, shards: Sequence[str], *, by_id: bool) -> Rankings:
    """Read rankings, checked: ranks from 0 without holes, no image twice in a list, no score that is not finite.

    Args:
        by_id: an image has one id in all lists, as in ours; else it is told by its name.

    Raises:
        InputError: they are not.
        CorruptError: a file is not Parquet.
    """
    schemas = [_schema(folder, shard) for shard in shards]
    has_ids = all("id" in schema.names for schema, _ in schemas)
    has_scores = all("score" in schema.names for schema, _ in schemas)
    images: _ById | _ByName
    if by_id and has_ids and all(low >= 0 and high <= LARGEST_ID for _, (low, high) in schemas):
        images = _ById()
    else:
        images = _ByName(has_ids)
    columns = ["query", "rank", *(["id"] if has_ids else []), *(["score"] if has_scores else [])]
    pieces: dict[str, list[tuple[I32, I32, Scores]]] = {}
    for shard in shards:
        where = folder.address(shard)
        with folder.open(shard) as file:
            parquet = pq.ParquetFile(file, read_dictionary=["query"])
            for number in range(parquet.num_row_groups):
                table = parquet.read_row_group(number, columns=columns)
                if len(table):
                    _gather(pieces, table, images.numbers(parquet, number, table, where), where)
    return _finish(pieces, images, folder.uri, has_scores)


def _schema(folder: Folder, shard: str) -> tuple[pa.Schema, tuple[int, int]]:
    """Schema, and the smallest and largest id as far as the file says (-1 where it does not)."""
    where = folder.address(shard)
    with folder.open(shard) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise CorruptError(f"{where} is not a Parquet file ({error}); write it again") from error
        schema = parquet.schema_arrow
        missing = [c for c in COLUMNS if c not in schema.names]
        if missing:
            raise InputError(f"{where} has no column {', '.join(missing)}; rankings have {COLUMNS}")
        for column, kind in (("query", "text"), ("name", "text"), ("rank", "integers"), ("id", "integers")):
            if column in schema.names and not _is(schema.field(column).type, kind):
                raise InputError(f"{where}: `{column}` is {schema.field(column).type}; expected {kind}")
        if "score" in schema.names and not pa.types.is_floating(schema.field("score").type):
            raise InputError(f"{where}: `score` is {schema.field('score').type}; expected floats, larger is better")
        if "id" not in schema.names:
            return schema, (-1, -1)
        at = next(i for i in range(len(parquet.schema)) if parquet.schema.column(i).path == "id")
        groups = [parquet.metadata.row_group(g).column(at).statistics for g in range(parquet.num_row_groups)]
        if not groups:
            return schema, (0, 0)
        if any(s is None or not s.has_min_max for s in groups):
            return schema, (-1, -1)
        return schema, (min(s.min for s in groups), max(s.max for s in groups))


def _is(kind: pa.DataType, wanted: str) -> bool:
    if wanted == "integers":
        return bool(pa.types.is_integer(kind))
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# ------------------------------------------------------------------------------------------------ images


class _ById:
    """Numbers of images by their ids; a name is read where an id comes for the first time."""

    broken_by = "id"

    def __init__(self) -> None:
        self._number: I32 = np.full(1, -1, np.int32)
        self._ids: list[I64] = []
        self._names: list[pa.Array] = []
        self._count = 0

    def numbers(self, parquet: pq.ParquetFile, group: int, table: pa.Table, where: str) -> I32:
        ids = _values(table, "id", where).astype(np.int64, copy=False)
        if ids.max() >= len(self._number):
            more = np.full(max(2 * len(self._number), int(ids.max()) + 1) - len(self._number), -1, np.int32)
            self._number = np.concatenate([self._number, more])
        new = np.flatnonzero(self._number[ids] < 0)
        if len(new):
            first = new[np.unique(ids[new], return_index=True)[1]]
            names = parquet.read_row_group(group, columns=["name"]).column("name").take(pa.array(first))
            self._number[ids[first]] = self._count + np.arange(len(first), dtype=np.int32)
            self._ids.append(ids[first])
            self._names.append(_text(names, "name", where))
            self._count += len(first)
        return self._number[ids]

    def names(self) -> pa.Array:
        return pa.concat_arrays(self._names) if self._names else pa.array([], pa.large_string())

    def keys(self) -> I64:
        """What equal scores are put in order by."""
        return np.concatenate(self._ids) if self._ids else np.zeros(0, np.int64)


class _ByName:
    """Numbers of images by their names; of several ids of a name the first counts."""

    def __init__(self, has_ids: bool) -> None:
        self._known: pa.Array = pa.array([], pa.large_string())
        self._ids: list[I64] = []
        self._has_ids = has_ids
        self.broken_by = "id" if has_ids else "name"

    def numbers(self, parquet: pq.ParquetFile, group: int, table: pa.Table, where: str) -> I32:
        column = parquet.read_row_group(group, columns=["name"]).column("name")
        encoded = _text(column, "name", where).dictionary_encode()
        number = pc.index_in(encoded.dictionary, value_set=self._known).fill_null(-1).to_numpy().astype(np.int32)
        new = np.flatnonzero(number < 0)
        number[new] = len(self._known) + np.arange(len(new), dtype=np.int32)
        rows: I32 = encoded.indices.to_numpy()
        if self._has_ids:
            ids = _values(table, "id", where).astype(np.int64, copy=False)
            self._ids.append(ids[np.unique(rows, return_index=True)[1]][new])
        self._known = pa.concat_arrays([self._known, encoded.dictionary.take(pa.array(new))])
        found: I32 = number[rows]
        return found

    def names(self) -> pa.Array:
        return self._known

    def keys(self) -> I64:
        """What equal scores are put in order by."""
        if self._has_ids:
            return np.concatenate(self._ids) if self._ids else np.zeros(0, np.int64)
        place = np.empty(len(self._known), np.int64)
        place[pc.array_sort_indices(self._known).to_numpy()] = np.arange(len(place))
        return place


def _text(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    if column.null_count:
        raise InputError(f"{where}: `{name}` is empty in {column.null_count} rows; expected one in each")
    kind = column.type
    plain = column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column
    return pa.concat_arrays(plain.cast(pa.large_string()).chunks)


def _values(table: pa.Table, name: str, where: str) -> npt.NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise InputError(f"{where}: `{name}` is empty in {column.null_count} rows; expected one in each")
    values: npt.NDArray[Any] = column.to_numpy()
    return values


# ------------------------------------------------------------------------------------------------ lists


def _gather(pieces: dict[str, list[tuple[I32, I32, Scores]]], table: pa.Table, numbers: I32, where: str) -> None:
    """Add the rows of one row group to the lists that they belong to."""
    ranks = _values(table, "rank", where)
    if ranks.min() < 0 or ranks.max() >= 2**31:
        raise InputError(f"{where}: ranks from {ranks.min()} to {ranks.max()}; expected 0, 1, 2, …")
    ranks = ranks.astype(np.int32, copy=False)
    scores: Scores = np.zeros(0, np.float32)
    if "score" in table.column_names:
        scores = _values(table, "score", where)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise InputError(
                f"{where}: {len(bad)} scores are not finite (first {scores[bad[0]]} of query "
                f"{table.column('query')[int(bad[0])]} at rank {ranks[bad[0]]}); leave such images out of the lists"
            )
    if table.column("query").null_count:
        raise InputError(f"{where}: `query` is empty in {table.column('query').null_count} rows; expected one in each")
    query = table.column("query").combine_chunks()
    query = query if pa.types.is_dictionary(query.type) else query.dictionary_encode()
    codes = query.indices.to_numpy()
    if (np.diff(codes) < 0).any():
        order = np.argsort(codes, kind="stable")
        codes, ranks, numbers = codes[order], ranks[order], numbers[order]
        scores = scores[order] if len(scores) else scores
    starts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for start, stop in pairwise(starts):
        part = slice(start, stop)
        pieces.setdefault(query.dictionary[int(codes[start])].as_py(), []).append(
            (ranks[part], numbers[part], scores[part])
        )


def _finish(
    pieces: dict[str, list[tuple[I32, I32, Scores]]], images: _ById | _ByName, where: str, has_scores: bool
) -> Rankings:
    names, keys = images.names(), images.keys()
    lists: dict[str, I32] = {}
    kept: dict[str, Scores] = {}
    rising, tied_images, tied_lists = [], 0, 0
    for query in list(pieces):
        ranks, numbers, scores = (np.concatenate(parts) for parts in zip(*pieces.pop(query), strict=True))
        if not np.array_equal(ranks, np.arange(len(ranks))):
            order = np.argsort(ranks, kind="stable")
            if not np.array_equal(ranks[order], np.arange(len(ranks))):
                raise InputError(f"{where}: ranks of query {query!r} are not 0, 1, 2, …; expected each once")
            numbers, scores = numbers[order], scores[order] if has_scores else scores
        _check_once(numbers, names, query, where)
        if has_scores:
            fall = np.diff(scores)
            if (fall > 0).any():
                rising.append(query)
            else:
                tied = _break_ties(numbers, fall == 0, keys)
                tied_images, tied_lists = tied_images + tied, tied_lists + bool(tied)
            kept[query] = scores
        lists[query] = numbers
    ties = Ties(tied_images, tied_lists, images.broken_by) if has_scores else None
    return Rankings(lists, names, kept, ties, tuple(rising))


def _check_once(numbers: I32, names: pa.Array, query: str, where: str) -> None:
    seen = np.zeros(len(names), bool)
    seen[numbers] = True
    if int(seen.sum()) != len(numbers):
        values, counts = np.unique(numbers, return_counts=True)
        twice = names[int(values[counts > 1][0])].as_py()
        raise InputError(f"{where}: the list of query {query!r} names an image twice ({twice!r}); expected each once")


def _break_ties(numbers: I32, tie: npt.NDArray[np.bool_], keys: I64) -> int:
    """Put images of equal score in the order of their keys, in place; how many there are.

    Args:
        tie: (n - 1,) whether an image has the score of the next.
    """
    at = np.flatnonzero(np.append(tie, False) | np.append(False, tie))
    run = np.append(0, np.cumsum(~tie))[at]
    tied = numbers[at]
    numbers[at] = tied[np.lexsort((keys[tied], run))]
    return len(at)


def matching(names: pa.Array, wanted: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(name, number) of the images that have one of the wanted names, or its last component."""
    last = pa.array(sorted({name.rpartition("/")[2] for name in wanted}), pa.large_string())
    likely = pc.is_in(pc.replace_substring_regex(names, r"^.*/", ""), last)
    at = np.flatnonzero(likely.to_numpy(zero_copy_only=False))
    return zip(names.take(pa.array(at)).to_pylist(), at.tolist(), strict=True)
