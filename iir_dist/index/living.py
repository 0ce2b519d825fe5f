"""A finished index that changes: rows are added, deleted and compacted away, and no row ever gets another number.

No file is written over. A change writes new files and then replaces the manifest, all under the lock, so that it is
there as a whole or not at all; a change that was killed goes on when it is asked for again, and what it has written is
dropped when another is asked for. Files that are no part of the index any more stay until the next change begins, so
that whoever has opened it keeps what is needed to answer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, InputRef, Manifest, shard_name
from iir_dist.config import StageConfig
from iir_dist.data.collection import Collection, open_collection
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.errors import InputError, MismatchError, NotFoundError
from iir_dist.index import points
from iir_dist.index.build import fill
from iir_dist.index.fanout import opened_on, searching_actors
from iir_dist.index.plan import IndexConfig
from iir_dist.index.rows import names_files, read_names, read_tombstones, rows_of
from iir_dist.index.shard import IDS, IDS_SUFFIX, TEMPLATE, Shard, ShardInfo, shards_of, write_kept
from iir_dist.lock import LEASE, lock
from iir_dist.progress import Progress
from iir_dist.storage import Folder
from iir_dist.vectors import I64

log = logging.getLogger(__name__)

COMPACT_ABOVE = 0.2
"""Fraction of deleted rows above which a shard is rewritten."""
PLAN = artifact.WORK + "plan.json"
_OURS = re.compile(
    r"(shard|vectors|ids|names|tombstones)-\d{5,}\.(faiss|f16|i64|parquet)|\d{5,}-operating_points\.json"
)
"""Files that a change may have left; others in the folder are not ours to delete."""


def add(embeddings: Sequence[str], out: str) -> Manifest:
    """Append the database rows of more embeddings folders as new shards, filled from the same template.

    Folders that are in the index already are not added again, so that the same command may be given twice.

    Raises:
        MismatchError: they were made by another encoder.
        InputError: they have another dimension, or names that the index has.
    """
    collection, names = open_collection(embeddings)
    with _locked(out) as (work, old):
        _check_space(collection, old, work.folder)
        there = [source.fingerprint for source in _sources(old)]
        known = [s for s in collection.sources if s.ref.fingerprint in there]
        if len(known) == len(collection.sources) or collection.ref.fingerprint in there:
            log.info("index: %s is in %s already", " ".join(embeddings), work.folder.uri)
            return old
        table = read_names(work.folder, old)
        _check_new(names, table, read_tombstones(work.folder, old), work.folder)
        _start(work, old, {"change": "add", "embeddings": collection.ref.fingerprint})
        artifact.check_file(work.folder, TEMPLATE, old.files[TEMPLATE])
        base, count = old.counts["rows"], collection.num_rows
        shards = shards_of(work.folder, old)
        pieces = -(-count // max([s.stop - s.start for s in shards], default=count))
        cuts = [base + count * i // pieces for i in range(pieces + 1)]
        first, template, shifted = _next_shard(old), old.info["template"], collection.shifted(base)
        new = [ShardInfo(first + i, cuts[i], cuts[i + 1], cuts[i + 1] - cuts[i], template, None) for i in range(pieces)]
        _run(work, fill, {s: (work.folder, template, s.number, (s.start, s.stop), shifted) for s in new})
        file = _publish_names(work.folder, _generation(old), names, table)
        sources = [*_sources(old), *(s.ref for s in collection.sources)]
        info = {
            "shards": [s.entry() for s in (*shards, *new)], "names": [*names_files(old), *file], "next_shard": first + pieces,
            "sources": [source.model_dump() for source in sources],
        }  # fmt: skip
        inputs = {**old.inputs, "embeddings": artifact.combine(sources)}
        return _finish(work, old, {"rows": base + count}, file, info, inputs=inputs)


def delete(out: str, names: Sequence[str] = (), ids: Sequence[int] = ()) -> Manifest:
    """Have rows never be returned again, by name or by id (as rankings show it); deleting twice changes nothing.

    Raises:
        InputError: the index has no such name or id; then nothing is deleted.
    """
    with _locked(out) as (work, old):
        rows = rows_of(read_names(work.folder, old), names, ids, work.folder.uri)
        before = read_tombstones(work.folder, old)
        tombstones = np.union1d(before, rows)
        if len(tombstones) == len(before):
            log.info("index: %d of %d rows were deleted before", len(rows), len(rows))
            return old
        _start(work, old, {"change": "delete"})
        name = f"tombstones-{_generation(old):05d}{IDS_SUFFIX}"
        with work.folder.publish(name) as file:
            file.path.write_bytes(tombstones.astype("<i8").tobytes())
        removed = [old.info["tombstones"]] if old.info.get("tombstones") else []
        counts = {"deleted": len(tombstones)}
        return _finish(work, old, counts, {name: artifact.entry_of(file)}, {"tombstones": name}, removed=removed)


def compact(out: str, above: float = COMPACT_ABOVE) -> Manifest:
    """Rewrite the shards with more than the fraction `above` of deleted rows, without these and under new numbers."""
    with _locked(out) as (work, old):
        shards, tombstones = shards_of(work.folder, old), read_tombstones(work.folder, old)
        dead = {s.number: _inside(s, tombstones) - (s.stop - s.start - s.count) for s in shards}
        chosen = [s for s in shards if dead[s.number] > above * s.count]
        if not chosen:
            log.info("index: no shard of %s has more than %g of its rows deleted", work.folder.uri, above)
            return old
        _start(work, old, {"change": "compact", "above": above})
        first = _next_shard(old)
        new = {
            s: ShardInfo(
                first + i, s.start, s.stop, s.count - dead[s.number], s.template, shard_name(first + i, IDS_SUFFIX, IDS)
            )
            for i, s in enumerate(chosen)
            if dead[s.number] < s.count
        }
        dim = int(old.info["dim"])
        tasks = {n: (work.folder, s, n, dim, {f: old.files[f] for f in s.files}, tombstones) for s, n in new.items()}
        _run(work, compact_shard, tasks)
        left = [new.get(s, s) for s in shards if s in new or s not in chosen]
        info = {"shards": [s.entry() for s in left], "next_shard": first + len(chosen)}
        return _finish(work, old, {}, {}, info, removed=[name for s in chosen for name in s.files])


def compact_shard(
    folder: Folder, old: ShardInfo, new: ShardInfo, dim: int, files: Mapping[str, FileEntry], tombstones: I64
) -> None:
    """Write a shard again without its deleted rows; then commit it."""
    shard = Shard(folder, old, dim, files)
    vectors, rows = shard.open_vectors(), shard.rows()
    kept = np.isin(rows, tombstones, invert=True)
    names = new.files
    with folder.publish(names[0]) as codes:
        write_kept(shard, rows[~kept], codes.path)
    with folder.publish(names[1]) as half, open(half.path, "wb") as out:
        for start in range(0, len(rows), 65536):
            part = slice(start, start + 65536)
            out.write(vectors[part][kept[part]].tobytes())
    with folder.publish(names[2]) as ids:
        ids.path.write_bytes(rows[kept].astype("<i8").tobytes())
    entries = dict(zip(names, map(artifact.entry_of, (codes, half, ids)), strict=True))
    artifact.commit(folder, new.number, entries, {"rows": new.count})


def measure(out: str, queries: Sequence[str] = ()) -> Manifest:
    """Measure the operating points again, and choose nprobe and refine by them as the build did.

    Args:
        queries: embeddings folders with queries of another distribution than the database; their rows of split `query`.

    Raises:
        MismatchError, InputError: they are of another encoder or dimension.
    """
    with _locked(out) as (work, old):
        sources = tuple(open_embeddings(uri) for uri in queries)
        for source in sources:
            _check_space(source, old, work.folder)
        _start(work, old, {"change": "measure"})
        config = IndexConfig.model_validate(old.config)
        with opened_on(work.folder, old, searching_actors()) as index:
            found = points.measure(index, points.other_queries(sources, index.dim, config.seed), config.seed)
        name, before = f"{_generation(old):05d}-{points.POINTS}", old.info.get("points", points.POINTS)
        info = {**points.choose(found, config), points.MEASURED: _generation(old), "points": name}
        removed = [before] if before in old.files else []
        return _finish(work, old, {}, points.write_points(work.folder, found, name), info, removed=removed)


def describe(out: str) -> str:
    """What an index is, for a person to read."""
    folder, manifest = artifact.require(out, "index")
    info, files = manifest.info, manifest.files
    shards = shards_of(folder, manifest)
    deleted, held = manifest.counts.get("deleted", 0), sum(s.count for s in shards)
    size = sum(entry.size for entry in files.values())
    lines = [
        f"rows       {manifest.counts['rows'] - deleted:,} ({deleted:,} deleted, {held:,} in the shards)",
        f"size       {size:,} bytes, {size / max(held, 1):.1f} a row in the shards",
        f"dimension  {info['dim']}",
        f"factory    {info['factory']}",
        f"search     nprobe {info['nprobe']} of {info['nlist']} lists, refine {info['refine']}",
        f"recall     {_recall(folder, manifest)}",
        f"encoder    {info['encoder_fingerprint'] or 'unknown'}",
        f"template   {info['template']}",
        "",
        f"{'shard':>5}  {'rows':>23}  {'held':>11}  {'codes':>15}  {'vectors':>15}",
    ]
    for s in shards:
        codes, vectors = (f"{files[name].size:,} B" for name in s.files[:2])
        rows = f"{s.start:,} to {s.stop - 1:,}"
        lines.append(f"{s.number:>5}  {rows:>23}  {s.count:>11,}  {codes:>15}  {vectors:>15}")
    return "\n".join(lines)


def _recall(folder: Folder, manifest: Manifest) -> str:
    if points.stale(manifest):
        return f"not known, the index has changed since it was measured: iir index --out {folder.uri} --measure"
    recall = points.recall_of(folder, manifest, manifest.info["nprobe"], manifest.info["refine"])
    if not recall:
        return f"not measured for this nprobe and refine: iir index --out {folder.uri} --measure"
    return ", ".join(f"{value:.3f} ({kind})" for kind, value in recall.items()) + " at 10"


# ------------------------------------------------------------------------------------------------ one change


@contextlib.contextmanager
def _locked(out: str) -> Iterator[tuple[artifact.Work, Manifest]]:
    """The index and its manifest, held for one change."""
    folder, _ = artifact.require(out, "index")
    with lock(folder):
        folder, old = artifact.require(out, "index")  # as the one that held the lock before us left it
        shards_of(folder, old)  # or an edited manifest would be given a new fingerprint
        yield artifact.Work(folder, "index", StageConfig(), {}), old


def _start(work: artifact.Work, old: Manifest, plan: Mapping[str, Any]) -> None:
    """Go on with the change that `plan` describes, if it was begun from this manifest; else drop what is left of another."""
    folder, plan = work.folder, {**plan, "base": old.fingerprint}
    with contextlib.suppress(NotFoundError):
        there = json.loads(folder.read(PLAN))
        if there == plan:
            log.info("index: the %s that was interrupted goes on", plan["change"])
            artifact.sweep(folder)
            return
        if there.get("base") == old.fingerprint:
            log.warning("index: the %s that was interrupted is dropped; give its command again", there["change"])
    for entry in list(folder.list(artifact.WORK)):
        if entry.name != LEASE:
            folder.delete(entry.name)
    artifact.sweep(folder)
    for entry in list(folder.list()):
        if _OURS.fullmatch(entry.name) and entry.name not in old.files:
            folder.delete(entry.name)
    folder.write(PLAN, json.dumps(plan).encode())


def _finish(
    work: artifact.Work,
    old: Manifest,
    counts: Mapping[str, int],
    files: Mapping[str, FileEntry],
    info: Mapping[str, Any],
    *,
    removed: Sequence[str] = (),
    inputs: Mapping[str, InputRef] | None = None,
) -> Manifest:
    artifact.sweep(work.folder)  # of workers that were killed, and whose tasks Ray gave to others
    info = {**info, points.GENERATION: _generation(old), "superseded": list(removed)}
    return work.amend(old, {**old.counts, **counts}, files, info, inputs, removed)


def _run(work: artifact.Work, function: Callable[..., None], tasks: Mapping[ShardInfo, tuple[Any, ...]]) -> None:
    """Write the shards that are not committed: several on Ray, a single one here."""
    done = work.done()
    todo = {shard: arguments for shard, arguments in tasks.items() if shard.number not in done}
    finished = sum(marker.counts["rows"] for marker in done.values())
    with Progress("index", sum(s.count for s in tasks), "vectors", done=finished) as progress:
        if len(todo) == 1:
            ((shard, arguments),) = todo.items()
            function(*arguments)
            progress.advance(shard.count)
        elif todo:
            ray = session.connect()
            task = ray.remote(function)
            running = {task.remote(*arguments): shard for shard, arguments in todo.items()}
            try:
                while running:
                    (ref,), _ = ray.wait(list(running), num_returns=1)
                    session.result_of(ref)
                    progress.advance(running.pop(ref).count)
            finally:  # what goes on to write without the lock would become part of the next change
                for ref in running:
                    ray.cancel(ref, force=True)
                if running:
                    ray.wait(list(running), num_returns=len(running))


def _generation(old: Manifest) -> int:
    """Number of the change that follows `old`."""
    return int(old.info.get(points.GENERATION, 0)) + 1


def _next_shard(old: Manifest) -> int:
    """First shard number that was never used."""
    return int(old.info.get("next_shard", len(old.info["shards"])))


def _sources(old: Manifest) -> list[InputRef]:
    """The embeddings folders that an index was made of."""
    known = old.info.get("sources")
    return [InputRef.model_validate(s) for s in known] if known else [old.inputs["embeddings"]]


def _inside(shard: ShardInfo, tombstones: I64) -> int:
    first, last = np.searchsorted(tombstones, [shard.start, shard.stop])
    return int(last - first)


def _check_space(new: Collection | Embeddings, old: Manifest, folder: Folder) -> None:
    encoder, dim = old.info["encoder_fingerprint"], old.info["dim"]
    if encoder and new.encoder and encoder != new.encoder:
        raise MismatchError(
            f"{folder.uri} holds vectors of encoder {encoder[:12]}, {new.ref.uri} of {new.encoder[:12]}; embed with the "
            "encoder of the index, or build another index"
        )
    if dim != new.dim:
        raise InputError(
            f"{folder.uri} holds vectors of dimension {dim}, {new.ref.uri} of {new.dim}; embed with the encoder of the "
            "index, or build another index"
        )


def _check_new(names: pa.Table, table: pa.Table, tombstones: I64, folder: Folder) -> None:
    alive = np.ones(len(table), bool)
    alive[tombstones] = False
    there = pc.is_in(table["name"], value_set=names["name"].combine_chunks()).to_numpy()
    twice = pc.unique(table["name"].filter(pa.array(there & alive)))
    if len(twice):
        raise InputError(
            f"{folder.uri} holds {len(twice)} of the {len(names)} names already (first {twice[0].as_py()!r}); to replace "
            "them, --delete them first"
        )


def _publish_names(folder: Folder, generation: int, names: pa.Table, table: pa.Table) -> dict[str, FileEntry]:
    """Write the names of added rows; ids and sources go on after those that are there."""
    for column in ("id", "source"):
        offset = pc.add(pc.max(table[column]), 1)
        position = names.schema.get_field_index(column)
        shifted = pc.add(names[column], offset).cast(names.schema.field(position).type)
        names = names.set_column(position, names.schema.field(position), shifted)
    name = f"names-{generation:05d}.parquet"
    with folder.publish(name) as file:
        pq.write_table(names, file.path, compression="zstd")
    return {name: artifact.entry_of(file)}
