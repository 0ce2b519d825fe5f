"""Labels from a file, as a table of `name` and `label`, and which image has which."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from iir_dist.data import pickles
from iir_dist.errors import InputError
from iir_dist.storage import split_uri

TABLE = pa.schema([("name", pa.string()), ("label", pa.string())])

# A name is a word, also where it looks like a number: 0001 is not 1.
AS_TEXT = pa.csv.ConvertOptions(column_types=dict.fromkeys(("name", "label", "landmark_id", "images"), pa.string()))


def read_labels(uri: str) -> pa.Table:
    """`name` and `label` as strings, each name once.

    Read are CSV and Parquet with these columns, a CSV of `landmark_id` and `images` (names with blanks between them,
    as Google Landmarks is published), and a pickle whose parts have `cids` and `cluster` (as retrieval-SfM is).

    Raises:
        InputError: it is none of these, or gives a name twice.
    """
    folder, file = split_uri(uri)
    if uri.lower().endswith(".pkl"):
        table = _from_clusters(pickles.loads(folder.read(file), uri), uri)
    else:
        with folder.open(file) as opened:
            try:
                table = (
                    pq.read_table(opened)
                    if uri.lower().endswith(".parquet")
                    else pa.csv.read_csv(opened, convert_options=AS_TEXT)
                )
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"--labels {uri} is neither CSV nor Parquet: {error}") from error
        if {"landmark_id", "images"} <= set(table.column_names):
            table = _from_classes(table)
    if not {"name", "label"} <= set(table.column_names):
        raise InputError(f"--labels {uri} has the columns {', '.join(table.column_names)}; expected `name` and `label`")
    table = table.select(TABLE.names).cast(TABLE)
    distinct = pc.count_distinct(table["name"]).as_py()
    if distinct != len(table):
        raise InputError(f"--labels {uri} gives {len(table) - distinct} names more than once; expected each name once")
    return table


def _from_classes(table: pa.Table) -> pa.Table:
    names = pc.utf8_split_whitespace(table["images"].cast(pa.string()))
    labels = table["landmark_id"].cast(pa.string()).take(pc.list_parent_indices(names))
    return pa.table({"name": pc.list_flatten(names), "label": labels})


def _from_clusters(value: object, uri: str) -> pa.Table:
    names: list[str] = []
    labels: list[str] = []
    parts = [part for part in value.values() if isinstance(part, dict)] if isinstance(value, dict) else []
    for part in parts:
        if len(part.get("cids", ())) != len(part.get("cluster", ())):
            raise InputError(f"--labels {uri}: {len(part['cids'])} cids but {len(part['cluster'])} clusters")
        names += map(str, part.get("cids", ()))
        labels += map(str, part.get("cluster", ()))
    if not names:
        raise InputError(f"--labels {uri}: expected a dict of parts that have `cids` and `cluster`")
    return pa.table({"name": names, "label": labels}, schema=TABLE)


def find_labels(names: pa.Array, labels: pa.Table) -> pa.Array:
    """The label of each name, null where there is none; by the whole name, else by a last component that is unique.

    Raises:
        InputError: no name at all has one.
    """
    at = pc.index_in(names, labels["name"])
    last = pc.replace_substring_regex(names, r"^.*/", "")
    counts = last.value_counts()
    unique = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    by_last = pc.if_else(pc.is_in(last, unique), pc.index_in(last, labels["name"]), pa.scalar(None, pa.int32()))
    at = pc.coalesce(at, by_last)
    if at.null_count == len(at):
        raise InputError(
            f"no name of --labels is that of an image: the first is {labels['name'][0].as_py()!r}, "
            f"the first image is {names[0].as_py()!r}"
        )
    found = labels["label"].take(at)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def folders(names: pa.Array) -> pa.Array:
    """The folder that each name lies in, which is its class in `class/file` layouts; null where it lies in none."""
    has = pc.match_substring(names, "/")
    return pc.if_else(has, pc.replace_substring_regex(names, r"/[^/]*$", ""), pa.scalar(None, pa.string()))


def labelled(labels: pa.Array) -> npt.NDArray[np.bool_]:
    """Which of them are not null."""
    return np.asarray(pc.is_valid(labels).to_numpy(zero_copy_only=False), bool)
