"""Which database rows are meant: the names of an index, what was deleted, and rows by name, id or list file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from iir_dist.artifact import Manifest
from iir_dist.errors import CorruptError, InputError
from iir_dist.index.shard import NAMES_FILE, fetch
from iir_dist.storage import Folder, split_uri
from iir_dist.vectors import I64

LISTS = (".txt", ".csv", ".parquet")
"""Endings of files that list rows; no image has them, so they tell a file from a name."""


def names_files(manifest: Manifest) -> list[str]:
    """The files with the names of an index: of the build, then of each addition; row r of all together is database row r."""
    return list(manifest.info.get("names", [NAMES_FILE]))


def read_names(folder: Folder, manifest: Manifest) -> pa.Table:
    """Id, name, split and source of every database row, deleted ones too.

    Raises:
        CorruptError: a file is missing or not the one that was written.
    """
    files = [fetch(folder, name, manifest.files[name]) for name in names_files(manifest)]
    table = pa.concat_tables(pq.read_table(pa.py_buffer(file.data)) for file in files)
    if len(table) != manifest.counts["rows"]:
        raise CorruptError(
            f"{folder.uri} has {len(table)} names for {manifest.counts['rows']} rows; build the index again"
        )
    return table


def read_tombstones(folder: Folder, manifest: Manifest) -> I64:
    """The database rows that were ever deleted, ascending."""
    name = manifest.info.get("tombstones")
    if name is None:
        return np.zeros(0, np.int64)
    return np.frombuffer(fetch(folder, name, manifest.files[name]).data, "<i8")


def rows_of(table: pa.Table, names: Sequence[str], ids: Sequence[int], where: str) -> I64:
    """The database rows with one of the names or ids, ascending. A name that several rows have means all of them.

    Args:
        table: as `read_names` gives it.
        where: what they are looked for in, for the message.

    Raises:
        InputError: some are not there; the message lists the first.
    """
    found = []
    for column, values in (("name", pa.array(names, pa.string())), ("id", pa.array(ids, pa.int64()))):
        hit = pc.is_in(table[column], value_set=values)
        there = table[column].filter(hit).combine_chunks()  # of all names: one array holds no more than 2 GB
        missing = values.filter(pc.invert(pc.is_in(values, value_set=there))).to_pylist()
        if missing:
            shown = ", ".join(str(value) for value in missing[:3]) + (", …" if len(missing) > 3 else "")
            raise InputError(f"{where} has no {column} {shown} ({len(missing)} of {len(values)} are not there)")
        found.append(np.flatnonzero(hit.to_numpy(zero_copy_only=False)))
    return np.union1d(*found).astype(np.int64)


def read_list(uri: str) -> tuple[list[str], list[int]]:
    """Names and ids that a file lists: .txt with a name a line, .csv or .parquet with a column `name` or else `id`.

    Raises:
        InputError: it has neither column, or cannot be read.
    """
    folder, name = split_uri(uri)
    data = folder.read(name)
    try:
        if name.endswith(".txt"):
            return [line.strip() for line in data.decode().splitlines() if line.strip()], []
        table: Any = (pq.read_table if name.endswith(".parquet") else pyarrow.csv.read_csv)(pa.BufferReader(data))
        if "name" in table.column_names:
            return table["name"].cast(pa.string()).to_pylist(), []
        if "id" in table.column_names:
            return [], table["id"].cast(pa.int64()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise InputError(f"{uri} cannot be read: {str(error).splitlines()[0]}") from error
    raise InputError(f"{uri} has no column name or id (it has {', '.join(table.column_names)})")


def named(values: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names and ids that are meant on the command line: names, and list files, which their endings tell from names."""
    names: list[str] = []
    ids: list[int] = []
    for value in values:
        more = read_list(value) if Path(value).suffix in LISTS else ([value], [])
        names += more[0]
        ids += more[1]
    return names, ids
