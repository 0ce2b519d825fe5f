"""Vectors of one shard to its file and marker; what could not be embedded to the ledger; closing the books."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Manifest, shard_name
from iir_dist.data.embeddings import check_unit, schema
from iir_dist.errors import InputError
from iir_dist.storage import Folder

REJECTED = "rejected.parquet"


def write_shard(folder: Folder, table: pa.Table, dtype: str) -> None:
    """Write the vectors of one shard and commit it; what could not be embedded goes to its ledger."""
    number = int(table.column("shard")[0].as_py())
    good = table.filter(pa.compute.is_null(table.column("error")))
    lost = table.filter(pa.compute.is_valid(table.column("error"))).select(["name", "error"]).to_pylist()
    files: dict[str, FileEntry] = {}
    if len(good):
        kind = schema(good.column("embedding").type.list_size, dtype)
        check_unit(np.stack(good.column("embedding").to_numpy(zero_copy_only=False)), f"shard {number}")
        with folder.publish(shard_name(number)) as file:
            pq.write_table(
                good.select(kind.names).cast(kind), file.path, compression="zstd", use_dictionary=["split"],
                write_statistics=["id", "name"],
            )  # fmt: skip
        files[shard_name(number)] = artifact.entry_of(file)
    counts = {"in": len(table), "out": len(good), "rejected": len(lost)}
    artifact.commit(folder, number, files, counts, {"rejected": lost})


def write_ledger(folder: Folder, lost: list[dict[str, str]]) -> FileEntry:
    """Write `rejected.parquet`: name and error of each image that has no vector."""
    fields = pa.schema([("name", pa.string()), ("error", pa.string())])
    with folder.publish(REJECTED) as file:
        pq.write_table(pa.Table.from_pylist(lost, schema=fields), file.path)
    return artifact.entry_of(file)


def finish(work: artifact.Work, encoder: Manifest, shards: int, extra: Mapping[str, Any] | None = None) -> Manifest:
    """Publish the artifact once all its shards are committed."""
    markers = work.done()
    counts = {key: sum(m.counts[key] for m in markers.values()) for key in ("in", "out", "rejected")}
    if not counts["out"]:
        raise InputError(f"none of {counts['in']} images could be embedded; first: {markers[0].info['rejected'][0]}")
    lost = [line for number in sorted(markers) for line in markers[number].info["rejected"]]
    ledger = write_ledger(work.folder, lost)
    info = {"encoder_fingerprint": encoder.fingerprint, "encoder": encoder.info["encoder"], **(extra or {})}
    return work.publish(counts, {REJECTED: ledger}, info, shards=shards)
