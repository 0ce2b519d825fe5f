"""Raw photos to `images/`: Parquet shards of original bytes, with a ledger of everything that was refused.

plan (pure): number the members and cut them into shards. execute (Ray): check each shard's images. merge: ids are
dense over the accepted images, so shard k is written once the number accepted before it is known; the checked rows
wait in the object store, not in a worker's heap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, InputRef, Manifest, shard_name
from iir_dist.config import StageConfig, fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth, Query
from iir_dist.data.images import MAX_MEGAPIXELS, decode
from iir_dist.data.sources import Listing, Member, Reader, label_of, list_sources
from iir_dist.errors import ConfigError, GroundTruthError, ImageError, InputError
from iir_dist.progress import Progress
from iir_dist.storage import Folder

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),
    ]
)
REJECTED = pa.schema([(name, pa.string()) for name in ("name", "source", "reason", "detail")])
ROW_GROUP_BYTES = 16 * 2**20


class IngestConfig(StageConfig):
    """`[ingest]`."""

    split: Literal["db", "query", "train", "distractor"] = "db"
    """Split of the rows: `query` for photos to search with; queries of a ground truth have it anyway."""
    shard_mb: float = Field(256, gt=0, le=1024)
    """Target size of a shard, in MB of image bytes."""
    max_megapixels: float = Field(MAX_MEGAPIXELS, gt=0, le=178)
    """Larger images are rejected (a decompression bomb is small as a file)."""
    allow_missing: bool = False
    """Accept a ground truth that names images which are not there; they count as never found."""
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Row:
    """A planned row: which member becomes it, under which name and split, with which box."""

    member: Member
    name: str
    split: str
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """One line of the ledger."""

    name: str
    source: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows cut into shards, and what the listing alone refuses."""

    shards: tuple[tuple[Row, ...], ...]
    rejected: tuple[Rejected, ...]
    num_images: int
    queries: tuple[Query, ...]


# ------------------------------------------------------------------------------------------------ plan


def plan(listing: Listing, config: IngestConfig, truth: GroundTruth | None = None) -> Plan:
    """Decide every row before a byte is read; pure.

    Database rows come in the listing's order, then one row for each query. A query's image is a database row as
    well if the ground truth labels it (original Oxford and Paris: it is one of the Good ones), and is not otherwise
    (revisited: queries are not in the database).

    Raises:
        GroundTruthError: it names images that are not there, and `config.allow_missing` is not set.
    """
    rejected: list[Rejected] = []
    usable: dict[str, Member] = {}
    for member, name in zip(listing.members, listing.names, strict=True):
        if member.problem:
            rejected.append(Rejected(name, _where(member), member.problem, f"{member.size} bytes"))
        elif name in usable:
            detail = f"already taken by {_where(usable[name])}"
            rejected.append(Rejected(name, _where(member), "duplicate_name", detail))
        else:
            usable[name] = member
    query_rows: list[Row] = []
    only_queries: set[str] = set()
    queries: tuple[Query, ...] = ()
    if truth is not None:
        queries, only_queries = _queries(truth, usable, config)
        query_rows = [Row(usable[q.image], q.name, "query", q.box) for q in queries]
    rows = [Row(m, n, config.split) for n, m in usable.items() if n not in only_queries] + query_rows
    return Plan(tuple(_cut(rows, config.shard_mb * 2**20)), tuple(rejected), len(listing.members), queries)


def _queries(
    truth: GroundTruth, usable: Mapping[str, Member], config: IngestConfig
) -> tuple[tuple[Query, ...], set[str]]:
    found = groundtruth.match(truth.images(), usable)
    missing = sorted(truth.images() - set(found))
    missing_queries = [q.image for q in truth.queries if q.image not in found]
    if missing and not config.allow_missing:
        raise GroundTruthError(
            f"the ground truth names {len(missing)} of {len(truth.images())} images that are not in the source "
            f"(first: {', '.join(missing[:3])}); complete the source, or --set allow_missing=true to count them as "
            "never found"
        )
    if missing_queries:
        raise GroundTruthError(
            f"{len(missing_queries)} query images are not in the source, first {missing_queries[0]!r}"
        )
    queries = tuple(Query(q.name, found[q.image], q.box, q.labels) for q in truth.queries)
    labelled = {found.get(name, name) for q in truth.queries for names in q.labels.values() for name in names}
    return queries, {q.image for q in queries} - labelled


def _cut(rows: Sequence[Row], shard_bytes: float) -> Iterable[tuple[Row, ...]]:
    shard: list[Row] = []
    size = 0
    for row in rows:
        if shard and size + row.member.size > shard_bytes:
            yield tuple(shard)
            shard, size = [], 0
        shard.append(row)
        size += row.member.size
    if shard:
        yield tuple(shard)


# ------------------------------------------------------------------------------------------------ execute


def check(rows: Sequence[Row], max_megapixels: float) -> tuple[pa.Table, list[Rejected]]:
    """Read and fully decode the images of one shard; the table lacks only the ids."""
    from hashlib import sha256

    columns: dict[str, list[Any]] = {field.name: [] for field in SCHEMA if field.name != "id"}
    rejected = []
    with Reader() as reader:
        for row in rows:
            try:
                data = reader.read(row.member)
                image = decode(data, max_megapixels)
            except ImageError as error:
                rejected.append(Rejected(row.name, _where(row.member), error.reason, error.detail))
                continue
            digest, label = sha256(data).hexdigest(), label_of(row.name)
            values = (row.name, label, row.split, row.box, image.width, image.height, digest, data)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    schema = pa.schema([field for field in SCHEMA if field.name != "id"])
    return pa.table(columns, schema=schema), rejected


def write(folder: Folder, number: int, base: int, table: pa.Table, rejected: list[Rejected]) -> None:
    """Write one shard with ids from `base`, and commit it."""
    ids = pa.array(range(base, base + len(table)), pa.int64())
    table = table.add_column(0, SCHEMA.field("id"), ids)
    files: dict[str, FileEntry] = {}
    if len(table):
        name = shard_name(number)
        with folder.publish(name) as file:
            rows = max(1, int(len(table) * ROW_GROUP_BYTES / max(table.nbytes, 1)))
            # JPEG does not compress again, and statistics over bytes would store images in the footer.
            pq.write_table(
                table, file.path, row_group_size=rows, compression="none", use_dictionary=["label", "split"],
                write_statistics=["id", "name"],
            )  # fmt: skip
        files[name] = artifact.entry_of(file)
    ledger = [[r.name, r.source, r.reason, r.detail] for r in rejected]
    artifact.commit(folder, number, files, {"rows": len(table)}, {"rejected": ledger})


def run(
    sources: Sequence[str], out: str, config: IngestConfig, *, groundtruth_uri: str | None = None, force: bool = False
) -> Manifest:
    """Ingest `sources` (folders, tars, zips; local or S3) into one images artifact.

    Raises:
        InputError: no source, no image, or none that can be used.
        GroundTruthError: the ground truth does not fit.
    """
    if groundtruth_uri and config.split == "query":
        raise ConfigError(
            "ingest.split = 'query' makes every photo a query, and a ground truth needs a database to search; "
            "give one of the two"
        )
    if not sources:
        raise InputError("no SOURCE given; expected folders, .tar or .zip files, local or s3://")
    started = time.monotonic()
    listing = list_sources(sources)
    inputs = {"sources": InputRef(uri=" ".join(sources), fingerprint=listing.fingerprint)}
    truth = groundtruth.read(groundtruth_uri) if groundtruth_uri else None
    if truth is not None:
        inputs["groundtruth"] = InputRef(uri=str(groundtruth_uri), fingerprint=fingerprint(truth.to_json()))
    with artifact.begin(out, "ingest", config, inputs, force=force) as work:
        if work.finished:
            return work.finished
        todo = plan(listing, config, truth)
        log.info(
            "ingest: %d images in %d shards, listed in %.1f s",
            todo.num_images,
            len(todo.shards),
            time.monotonic() - started,
        )
        _execute(work.folder, todo, config, work.done())
        return _finish(work, todo, listing, truth)


def _execute(folder: Folder, todo: Plan, config: IngestConfig, done: Mapping[int, artifact.Marker]) -> None:
    counts = {number: marker.counts["rows"] for number, marker in done.items()}
    refused: dict[int, list[Rejected]] = {}
    pending = [n for n in range(len(todo.shards)) if n not in done]
    if not pending:
        return
    ray = session.connect()
    check_task = ray.remote(num_returns=2)(check)
    write_task = ray.remote(write)
    tables: dict[int, Any] = {}
    checking: dict[Any, int] = {}
    writing: dict[Any, int] = {}
    window = session.cluster_cpus() + 1
    next_write, base, queue = 0, 0, list(reversed(pending))
    with Progress("ingest", sum(map(len, todo.shards)), "images", sum(len(todo.shards[n]) for n in done)) as progress:
        while queue or checking or writing:
            # Not further ahead than `window` of the first shard that is not counted: checked tables wait in memory.
            while queue and queue[-1] < next_write + window and len(checking) + len(writing) < window:
                number = queue.pop()
                tables[number], rejected = check_task.remote(todo.shards[number], config.max_megapixels)
                checking[rejected] = number
            for ref in ray.wait([*checking, *writing], num_returns=1)[0]:
                result = session.result_of(ref)
                if ref in writing:
                    progress.advance(len(todo.shards[writing.pop(ref)]))
                    continue
                number = checking.pop(ref)
                counts[number] = len(todo.shards[number]) - len(result)
                refused[number] = result
            while next_write in counts:
                if next_write in tables:
                    table = tables.pop(next_write)
                    ref = write_task.remote(folder, next_write, base, table, refused.pop(next_write))
                    writing[ref] = next_write
                base += counts[next_write]
                next_write += 1


def _finish(work: artifact.Work, todo: Plan, listing: Listing, truth: GroundTruth | None) -> Manifest:
    markers = work.done()
    late = [Rejected(*line) for number in sorted(markers) for line in markers[number].info["rejected"]]
    rejected = {r.source: r for r in (*todo.rejected, *late)}  # a query's image may be tried twice
    num_out = todo.num_images - len(rejected)
    num_rows = sum(marker.counts["rows"] for marker in markers.values())
    if not num_rows:
        first = next(iter(rejected.values()))
        raise InputError(
            f"none of {todo.num_images} images can be used; the first, {first.source}: {first.reason}, {first.detail}"
        )
    for row in (row for shard in todo.shards for row in shard if row.split == "query"):
        bad = rejected.get(_where(row.member))
        if bad is not None:
            raise GroundTruthError(f"the image of query {row.name!r} cannot be used: {bad.reason}, {bad.detail}")
    files = {"rejected.parquet": _write_ledger(work.folder, rejected.values())}
    if truth is not None:
        files[groundtruth.FILE] = _write_truth(work.folder, truth)
    reasons: dict[str, int] = {}
    for line in rejected.values():
        reasons[f"rejected_{line.reason}"] = reasons.get(f"rejected_{line.reason}", 0) + 1
    counts = {
        "in": todo.num_images, "out": num_out, "rejected": len(rejected), **dict(sorted(reasons.items())),
        "rows": num_rows, "queries": len(todo.queries), "ignored_files": listing.ignored,
    }  # fmt: skip
    return work.publish(counts, files, {"split": work.config.resolved()["split"]}, shards=len(todo.shards))


def _where(member: Member) -> str:
    return f"{member.source}!{member.key}"


def _write_ledger(folder: Folder, rejected: Iterable[Rejected]) -> FileEntry:
    lines = sorted(rejected, key=lambda r: (r.name, r.source))
    table = pa.table({f: [getattr(r, f) for r in lines] for f in REJECTED.names}, schema=REJECTED)
    with folder.publish("rejected.parquet") as file:
        pq.write_table(table, file.path)
    return artifact.entry_of(file)


def _write_truth(folder: Folder, truth: GroundTruth) -> FileEntry:
    with folder.publish(groundtruth.FILE) as file:
        file.path.write_text(truth.to_json())
    return artifact.entry_of(file)
