"""Labels from a file: a CSV or Parquet with the columns `name` and `label`."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from iir_dist.errors import InputError
from iir_dist.storage import split_uri


def read_labels(uri: str) -> pa.Table:
    """`name` and `label` as strings, each name once.

    Raises:
        InputError: it cannot be read so.
    """
    folder, file = split_uri(uri)
    with folder.open(file) as opened:
        try:
            table = pq.read_table(opened) if uri.lower().endswith(".parquet") else pa.csv.read_csv(opened)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"--labels {uri} is neither CSV nor Parquet: {error}") from error
    missing = {"name", "label"} - set(table.column_names)
    if missing:
        raise InputError(f"--labels {uri} has the columns {', '.join(table.column_names)}; expected `name` and `label`")
    table = table.select(["name", "label"]).cast(pa.schema([("name", pa.string()), ("label", pa.string())]))
    distinct = pc.count_distinct(table["name"]).as_py()
    if distinct != len(table):
        raise InputError(f"--labels {uri} gives {len(table) - distinct} names more than once; expected each name once")
    return table
