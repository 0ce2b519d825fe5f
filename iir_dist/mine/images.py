"""What every round of mining does with the stages: copy images, embed them, search them, read the lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, InputRef, Manifest, shard_name
from iir_dist.config import StageConfig
from iir_dist.data.embeddings import Embeddings
from iir_dist.data.stored import Stored
from iir_dist.errors import InputError
from iir_dist.index import build, search
from iir_dist.index.plan import IndexConfig
from iir_dist.progress import Progress
from iir_dist.storage import Folder, open_folder
from iir_dist.vectors import F32, I64

POOL, EMBEDDINGS, QUERIES, INDEX, RANKINGS = "pool", "embeddings", "queries", "index", "rankings"
"""Folders of a round that are deleted when it is done."""


def once(
    images: Sequence[str],
    encoder: str,
    work: str,
    result: str,
    settings: StageConfig,
    make: Callable[[artifact.Work, Folder, Sequence[tuple[Folder, Manifest]]], None],
) -> str:
    """The address of `result` of a round, made unless it is there; the folders of the stages are deleted then.

    Args:
        result: name of the Parquet file.
        make: what makes and publishes it, from the artifact that it is of, the round's folder, and the images artifacts.
    """
    sources = [artifact.require(uri, "ingest") for uri in images]
    refs = {
        "images": artifact.combine(artifact.reference(*source) for source in sources),
        "encoder": artifact.reference(*artifact.require(encoder, *artifact.ENCODERS)),
    }
    folder = open_folder(work)
    with artifact.begin(folder.child(result.removesuffix(".parquet")).uri, "mine", settings, refs) as job:
        if job.finished is None:
            make(job, folder, sources)
    for name in (POOL, EMBEDDINGS, QUERIES, INDEX, RANKINGS):
        folder.delete_all(f"{name}/")
    return job.folder.address(result)


def write_pool(out: str, images: InputRef, stored: Stored, searched: I64, settings: StageConfig) -> None:
    """The drawn images as an images artifact, a shard for each shard they come from; ids and names are their numbers.

    Args:
        settings: what decides which images they are.
    """
    with artifact.begin(out, "ingest", settings, {"images": images}) as work:
        if work.finished:
            return
        parts = []
        for folder, shard, entry, first, rows in stored.shards:
            low, high = np.searchsorted(searched, [first, first + len(rows)])
            if low < high:
                numbers = searched[low:high]
                parts.append((folder, shard, entry, rows[numbers - first], numbers))
        done = work.done()
        ray = session.connect()
        copy = ray.remote(_copy)
        with Progress("mine", len(searched), "images", done=sum(m.counts["rows"] for m in done.values())) as progress:
            tasks = {
                copy.remote(*part, work.folder, n): len(part[-1]) for n, part in enumerate(parts) if n not in done
            }  # fmt: skip
            try:
                while tasks:
                    for ref in ray.wait(list(tasks), num_returns=1)[0]:
                        session.result_of(ref)
                        progress.advance(tasks.pop(ref))
            finally:  # without the lock they would write into the next run
                for ref in tasks:
                    ray.cancel(ref, force=True)
                if tasks:
                    ray.wait(list(tasks), num_returns=len(tasks))
        work.publish({"rows": len(searched), "queries": 0}, info={"split": "train"}, shards=len(parts))


def _copy(source: Folder, shard: str, entry: FileEntry, rows: I64, numbers: I64, target: Folder, number: int) -> None:
    """Copy rows (ascending) of a shard, a row group at a time."""
    name = shard_name(number)
    with artifact.verified(source, shard, entry) as path, target.publish(name) as file:
        with (
            pq.ParquetFile(path, memory_map=True, pre_buffer=False) as parquet,
            pq.ParquetWriter(file.path, parquet.schema_arrow, compression="none", use_dictionary=["label", "split"],
                             write_statistics=["id", "name"]) as writer,
        ):  # fmt: skip
            first = 0
            for group in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(group).num_rows
                low, high = np.searchsorted(rows, [first, last])
                if low < high:
                    table = parquet.read_row_group(group, use_threads=False).take(pa.array(rows[low:high] - first))
                    writer.write_table(_renamed(table, numbers[low:high]))
                first = last
    artifact.commit(target, number, {name: artifact.entry_of(file)}, {"rows": len(rows)})


def _renamed(table: pa.Table, numbers: I64) -> pa.Table:
    """Their numbers as ids and names: names of several artifacts may be the same."""
    names = pa.array([str(n) for n in numbers])
    for column, values in (("id", pa.array(numbers)), ("name", names), ("split", pa.repeat("train", len(numbers)))):
        at = table.schema.get_field_index(column)
        table = table.set_column(at, table.schema.field(at), values)
    return table


def write_queries(folder: Folder, vectors: Embeddings, queries: I64) -> tuple[I64, F32]:
    """The queries' vectors as an embeddings folder of their own, since they are searched too; numbers and vectors (nq, d)."""
    blocks = [block.take(np.isin(block.ids, queries)) for block in vectors.blocks()]
    numbers = np.concatenate([b.ids for b in blocks])
    xq = np.concatenate([b.vectors for b in blocks if b.vectors is not None])
    if not len(numbers):
        raise InputError(
            f"none of {len(queries)} queries could be embedded; see {vectors.folder.address('rejected.parquet')}"
        )
    columns = {
        "id": numbers, "name": [str(n) for n in numbers],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(xq.ravel()), xq.shape[1]),
    }  # fmt: skip
    with folder.publish("queries.parquet") as file:
        pq.write_table(pa.table(columns), file.path)
    return numbers, xq


def lists(rankings: str) -> Iterator[tuple[int, I64, F32]]:
    """Each query's number with the ids and scores of its list, best first."""
    folder, manifest = artifact.require(rankings, "search")
    for shard in manifest.shards():
        with artifact.verified(folder, shard, manifest.files[shard]) as path:
            ranked = pq.read_table(path, columns=["query", "id", "score"])
        asked = ranked["query"].cast(pa.int64()).to_numpy()
        ids, scores = ranked["id"].to_numpy(), ranked["score"].to_numpy()
        starts = np.flatnonzero(np.diff(asked, prepend=-1))  # lists are contiguous
        for start, stop in zip(starts, [*starts[1:], len(asked)], strict=True):
            yield int(asked[start]), ids[start:stop], scores[start:stop]


def rank(folder: Folder, k: int, *, exact: bool, seed: int) -> None:
    """A round's vectors, searched by its queries exactly or by an index."""
    database = folder.child(EMBEDDINGS).uri
    if not exact:
        build.run([database], folder.child(INDEX).uri, IndexConfig(seed=seed))
        database = folder.child(INDEX).uri
    queries, rankings = folder.child(QUERIES).uri, folder.child(RANKINGS).uri
    search.run([database], [queries], rankings, search.SearchConfig(k=k))
