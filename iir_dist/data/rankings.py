"""Reading `rankings/`: Parquet with query, rank, name (and id, score), ours or anybody's."""

from __future__ import annotations

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
from iir_dist.errors import InputError
from iir_dist.storage import Folder, open_folder

COLUMNS = ("query", "rank", "name")


@dataclass(frozen=True, slots=True)
class Rankings:
    """All lists, as codes into `names`: query -> codes, best first."""

    lists: dict[str, np.ndarray[Any, Any]]
    names: list[str]


def read_rankings(folder: Folder, shards: list[str]) -> Rankings:
    """Read rankings, ours or anybody's, checked: ranks from 0 without holes, no image twice in a list.

    Raises:
        InputError: they are not.
    """
    tables = []
    for shard in shards:
        with folder.open(shard) as file:
            parquet = pq.ParquetFile(file)
            missing = [c for c in COLUMNS if c not in parquet.schema_arrow.names]
            if missing:
                raise InputError(f"{folder.address(shard)} has no column {', '.join(missing)}; rankings have {COLUMNS}")
            tables.append(parquet.read(columns=list(COLUMNS)))
    table = pa.concat_tables(tables)
    dictionary = pc.dictionary_encode(table.column("name").combine_chunks())
    queries = pc.dictionary_encode(table.column("query").combine_chunks())
    codes, ranks = dictionary.indices.to_numpy(), table.column("rank").to_numpy()
    order = np.lexsort((ranks, queries.indices.to_numpy()))
    bounds = np.searchsorted(queries.indices.to_numpy()[order], np.arange(len(queries.dictionary) + 1))
    lists = {}
    for number, query in enumerate(queries.dictionary.to_pylist()):
        rows = order[bounds[number] : bounds[number + 1]]
        if not np.array_equal(ranks[rows], np.arange(len(rows))):
            raise InputError(f"{folder.uri}: ranks of query {query!r} are not 0, 1, 2, …; expected each once")
        lists[query] = codes[rows]
        if len(np.unique(lists[query])) != len(rows):
            raise InputError(f"{folder.uri}: the list of query {query!r} names an image twice; expected each once")
    return Rankings(lists, dictionary.dictionary.to_pylist())


def open_rankings(uri: str | Path) -> tuple[Rankings, Manifest | None, InputRef]:
    """Read a rankings folder; its files are checked against the manifest where there is one."""
    folder = open_folder(uri)
    manifest = read_manifest(folder)
    if manifest is not None:
        artifact.require(uri, "search")
        shards, ref = manifest.shards(), artifact.reference(folder, manifest)
        for shard in shards:
            artifact.check_file(folder, shard, manifest.files[shard])
    else:
        entries = [e for e in folder.list() if e.name.endswith(".parquet") and not e.name.startswith((".", "_"))]
        shards = [e.name for e in entries]
        if not shards:
            artifact.require(uri, "search")  # explains what is there instead
        content = fingerprint([[e.name, e.size, e.version] for e in entries])
        ref = InputRef(uri=folder.uri, fingerprint=content, verified=False)
    return read_rankings(folder, shards), manifest, ref
