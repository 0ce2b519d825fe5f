"""Ingest as a stage: list and plan in the driver, check and write on Ray, gather the ledger.

Ids are dense over the accepted images, so shard k is written once the number accepted before it is known; until then
its checked rows wait in the object store, not in a worker's heap.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, InputRef, Manifest, Marker, shard_name
from iir_dist.config import fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.data.images import REASONS
from iir_dist.data.listing import Listing, list_sources
from iir_dist.errors import ArtifactError, ConfigError, GroundTruthError, InputError, MismatchError
from iir_dist.ingest.check import PLAN, Checked, check, write
from iir_dist.ingest.known import check_count, expand
from iir_dist.ingest.labels import read_labels
from iir_dist.ingest.plan import IngestConfig, Plan, ledger, plan, where
from iir_dist.lock import lock
from iir_dist.progress import Progress
from iir_dist.storage import Folder

log = logging.getLogger(__name__)

LEDGER = "rejected.parquet"
DUPLICATES = "duplicates.parquet"
TRANSIENT = ("unreadable", "changed")
"""Reasons that may be gone at the next try."""


def run(
    sources: Sequence[str],
    out: str,
    config: IngestConfig,
    *,
    groundtruth_uri: str | None = None,
    labels_uri: str | None = None,
    retry: Sequence[str] = (),
    force: bool = False,
) -> Manifest:
    """Ingest `sources` into one images artifact.

    Args:
        sources: folders, archives and lists; paths, s3:// or http(s)://; or one name of the catalog.
        labels_uri: CSV or Parquet with `name` and `label`.
        retry: reasons; the images that a finished artifact rejected for one of them are tried again and appended.

    Raises:
        InputError: no source, no image, or none that can be used.
        ConfigError: options that exclude each other.
        GroundTruthError: the ground truth does not fit.
        StorageError: the store is gone or refuses; the same command goes on.
        ArtifactError: more than `config.max_rejected` of the images were rejected; the artifact is there.
    """
    if not sources:
        raise InputError("no SOURCE given; expected folders, archives or lists of images, local, s3:// or http(s)://")
    if groundtruth_uri and (config.split == "query" or config.dedupe):
        key = "dedupe = true" if config.dedupe else "split = 'query'"
        why = "may leave out images that" if config.dedupe else "makes queries of all images, also of those that"
        raise ConfigError(f"ingest.{key} {why} the ground truth expects in the database; give one of the two")
    unknown = sorted(set(retry) - set(REASONS))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not a reason of the ledger; known: {', '.join(sorted(REASONS))}")
    started = time.monotonic()
    request = expand(sources, config, groundtruth_uri, labels_uri)
    config, groundtruth_uri, labels_uri = request.config, request.groundtruth, request.labels
    with tempfile.TemporaryDirectory(prefix="iir-list-") as scratch:
        listing = list_sources(request.sources, Path(scratch), config.any_ending)
        log.info("ingest: %d images, listed in %.1f s", len(listing), time.monotonic() - started)
        inputs = {"sources": InputRef(uri=" ".join(sources), fingerprint=listing.fingerprint)}
        truth = groundtruth.read(groundtruth_uri) if groundtruth_uri else None
        if truth is not None:
            inputs["groundtruth"] = InputRef(uri=str(groundtruth_uri), fingerprint=fingerprint(truth.to_json()))
        labels = read_labels(labels_uri) if labels_uri else None
        if labels is not None:
            inputs["labels"] = InputRef(uri=str(labels_uri), fingerprint=fingerprint(labels.to_pydict()))
        if retry:
            manifest = _retry(out, config, inputs, listing, labels, retry)
        else:
            with artifact.begin(out, "ingest", config, inputs, force=force) as work:
                if work.finished is None:
                    marker = work.step("plan")
                    if marker is None:
                        todo = plan(listing, config, truth, labels)
                        if request.dataset is not None:
                            check_count(request.dataset, todo.num_images)
                        left_out = len(listing) - todo.num_images
                        totals = {
                            "in": todo.num_images, "ignored_files": listing.ignored + left_out, "queries": len(todo.boxes)
                        }  # fmt: skip
                        marker = _write_plan(work.folder, todo, totals, 0, 0)
                    _execute(work.folder, marker, config, work.done())
                    manifest = _finish(work, marker, truth)
                else:
                    manifest = work.finished
    _check_rejected(out, manifest, config)
    return manifest


# ------------------------------------------------------------------------------------------------ plan files


def _write_plan(folder: Folder, todo: Plan, totals: Mapping[str, int], first: int, base: int) -> Marker:
    """Put the plan on file, a shard each, so that workers read their part and a later run goes on with this plan."""
    for number in range(len(todo.shards)):
        with folder.publish(f"{PLAN}{shard_name(first + number)}") as file:
            pq.write_table(todo.rows(number), file.path, compression="zstd")
    _write_table(folder, f"{PLAN}{LEDGER}", todo.rejected)
    sizes = [stop - start for start, stop in todo.shards]
    marker = Marker(
        shard="plan", files={}, counts={key: totals[key] for key in ("in", "ignored_files", "queries")},
        info={"sizes": sizes, "first": first, "base": base},
    )  # fmt: skip
    artifact.commit(folder, "plan", {}, marker.counts, marker.info)
    return marker


def _write_table(folder: Folder, name: str, table: pa.Table) -> FileEntry:
    with folder.publish(name) as file:
        pq.write_table(table, file.path)
    return artifact.entry_of(file)


def _read_table(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    with folder.open(name) as file:
        return pq.read_table(file, columns=columns)


# ------------------------------------------------------------------------------------------------ execute


class _Seen:
    """The first name of every digest, for --dedupe; half of a SHA-256 tells a billion images apart."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def note(self, digest: bytes, name: str) -> str | None:
        """The name that has these bytes already, None where this is the first."""
        first = self._names.setdefault(digest[:16], name)
        return None if first is name else first


def _execute(folder: Folder, planned: Marker, config: IngestConfig, done: Mapping[int, Marker]) -> None:
    sizes: list[int] = planned.info["sizes"]
    first, base = planned.info["first"], planned.info["base"]
    numbers = range(first, first + len(sizes))
    pending = [n for n in numbers if n not in done]
    if not pending:
        return
    seen = _Seen() if config.dedupe else None
    counts = {number: done[number].counts["rows"] for number in numbers if number in done}
    ray = session.connect()
    check_task = ray.remote(num_returns=2)(check)
    write_task = ray.remote(write)
    tables: dict[int, object] = {}
    checked: dict[int, Checked] = {}
    checking: dict[object, int] = {}
    writing: dict[object, int] = {}
    window = session.cluster_cpus() + 1
    next_write, queue = first, list(reversed(pending))
    finished = sum(sizes[n - first] for n in counts)
    with Progress("ingest", sum(sizes), "images", finished) as progress:
        while queue or checking or writing:
            # Not further ahead than `window` of the first shard that is not counted: checked tables wait in memory.
            while queue and queue[-1] < next_write + window and len(checking) + len(writing) < window:
                number = queue.pop()
                tables[number], result = check_task.remote(folder, number, config.max_megapixels)
                checking[result] = number
            for ref in ray.wait([*checking, *writing], num_returns=1)[0] if checking or writing else []:
                result = session.result_of(ref)
                if ref in writing:
                    progress.advance(sizes[writing.pop(ref) - first])
                else:
                    checked[checking.pop(ref)] = result
            while next_write in counts or next_write in checked:
                if next_write in checked:
                    one = checked.pop(next_write)
                    keep = _keep(one, seen)
                    counts[next_write] = int(keep.sum())
                    ref = write_task.remote(
                        folder, next_write, base, tables.pop(next_write), one.rejected, None if keep.all() else keep
                    )
                    writing[ref] = next_write
                elif seen is not None:
                    _recall(folder, done[next_write], seen)
                base += counts[next_write]
                next_write += 1


def _keep(one: Checked, seen: _Seen | None) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which rows of a shard stay; the others are added to its rejected ones."""
    keep = np.ones(len(one.rows), bool)
    if seen is not None:
        for i, (name, place, digest) in enumerate(one.rows):
            first = seen.note(digest, name)
            if first is not None:
                keep[i] = False
                one.rejected.append((name, place, "duplicate", f"the same bytes as {first}"))
    return keep


def _recall(folder: Folder, marker: Marker, seen: _Seen) -> None:
    """Note what an earlier run wrote."""
    for name in marker.files:
        table = _read_table(folder, name, ["name", "sha256"])
        for image, digest in zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True):
            seen.note(bytes.fromhex(digest), image)


# ------------------------------------------------------------------------------------------------ finish


def _finish(work: artifact.Work, planned: Marker, truth: GroundTruth | None) -> Manifest:
    markers = work.done()
    shards = sorted(name for marker in markers.values() for name in marker.files)
    counts, files, info = _gather(work.folder, planned, markers, shards, truth)
    if truth is not None:
        with work.folder.publish(groundtruth.FILE) as file:
            file.path.write_text(truth.to_json())
        files[groundtruth.FILE] = artifact.entry_of(file)
    info["split"] = work.config.resolved()["split"]
    return work.publish(counts, files, info, shards=len(planned.info["sizes"]))


def _gather(
    folder: Folder, planned: Marker, markers: Mapping[int, Marker], shards: Sequence[str], truth: GroundTruth | None
) -> tuple[dict[str, int], dict[str, FileEntry], dict[str, object]]:
    """Counts and ledgers of all shards.

    Raises:
        InputError: no row is left.
        GroundTruthError: the image of a query cannot be used.
        ArtifactError: the counts do not add up.
    """
    # A query's image may be tried twice, as a query and as a database row; it is one image, so one line.
    late = ledger({tuple(line) for marker in markers.values() for line in marker.info["rejected"]})
    early = _read_table(folder, f"{PLAN}{LEDGER}")
    rejected = pa.concat_tables([early, late]).sort_by([("name", "ascending"), ("source", "ascending")])
    images = planned.counts["in"]
    rows = planned.info["base"] + sum(marker.counts["rows"] for marker in markers.values())
    if not rows:
        first = rejected.slice(0, 1).to_pylist()[0]
        raise InputError(
            f"none of {images} images can be used; the first, {first['source']}: {first['reason']}, {first['detail']}"
        )
    if truth is not None:
        refused = {line["name"]: line for line in late.to_pylist()}
        for query in truth.queries:
            bad = next((refused[n] for n in refused if n == query.image or n.endswith("/" + query.image)), None)
            if bad is not None:
                raise GroundTruthError(
                    f"the image of query {query.name!r} cannot be used: {bad['reason']}, {bad['detail']}; "
                    "mend it and run again with --force"
                )
    duplicates, distinct = _duplicates(folder, shards)
    reasons = {
        f"rejected_{reason['values']}": reason["counts"]
        for reason in rejected["reason"].value_counts().to_pylist()
    }  # fmt: skip
    counts = {
        "in": images, "out": images - len(rejected), "rejected": len(rejected), **dict(sorted(reasons.items())),
        "rows": rows, "queries": planned.counts["queries"], "duplicates": len(duplicates),
        "ignored_files": planned.counts["ignored_files"],
    }  # fmt: skip
    if distinct != counts["out"]:
        raise ArtifactError(
            f"{folder.uri}: {counts['in']} images went in, {counts['rejected']} were rejected and {distinct} came out; "
            "expected them to add up: report this, and run again with --force"
        )
    files = {LEDGER: _write_table(folder, LEDGER, rejected), DUPLICATES: _write_table(folder, DUPLICATES, duplicates)}
    return counts, files, {"shards": planned.info["first"] + len(planned.info["sizes"])}


def _duplicates(folder: Folder, shards: Sequence[str]) -> tuple[pa.Table, int]:
    """Images whose bytes an earlier one has (name, first, sha256), and how many distinct images the shards hold."""
    tables = [_read_table(folder, shard, ["name", "split", "sha256"]) for shard in shards]
    table = pa.concat_tables(tables)
    table = table.append_column("at", pa.array(np.arange(len(table))))
    # A query's image may be a database row as well; it is one image, under one name.
    one = table.group_by("name", use_threads=False).aggregate([("at", "min")])
    table = table.take(one["at_min"].take(pc.sort_indices(one["at_min"])))
    table = table.take(pc.sort_indices(table, [("sha256", "ascending"), ("at", "ascending")]))
    digest, names = table["sha256"], table["name"]
    same = np.zeros(len(table), bool)
    same[1:] = pc.equal(digest[1:], digest[:-1]).to_numpy() if len(table) > 1 else False
    runs, again = np.flatnonzero(~same), np.flatnonzero(same)
    first = runs[np.searchsorted(runs, again, side="right") - 1]
    found = {
        "name": names.take(pa.array(again)), "first": names.take(pa.array(first)), "sha256": digest.take(pa.array(again))
    }  # fmt: skip
    return pa.table(found).sort_by("name"), len(table)


def _check_rejected(out: str, manifest: Manifest, config: IngestConfig) -> None:
    rejected, images = manifest.counts["rejected"], manifest.counts["in"]
    if rejected > config.max_rejected * images:
        reasons = ", ".join(
            f"{count} {key.removeprefix('rejected_')}"
            for key, count in manifest.counts.items()
            if key.startswith("rejected_")
        )
        raise ArtifactError(
            f"{rejected} of {images} images were rejected ({reasons}), more than --max-rejected {config.max_rejected:g}; "
            f"{out} holds the others: see its {LEDGER}, then --retry-rejected, or allow more"
        )


# ------------------------------------------------------------------------------------------------ try again


def _retry(
    out: str,
    config: IngestConfig,
    inputs: Mapping[str, InputRef],
    listing: Listing,
    labels: pa.Table | None,
    reasons: Sequence[str],
) -> Manifest:
    """Append what can be had now of the images that were rejected for one of `reasons`; ids of the others stay."""
    folder, manifest = artifact.require(out, "ingest")
    differences = artifact.differences(
        {k: v for k, v in manifest.config.items() if k in ("split", "dedupe")},
        {k: v for k, v in config.resolved().items() if k in ("split", "dedupe")},
    )
    if differences:
        raise MismatchError(f"{folder.uri} was ingested with another config: {'; '.join(differences)}")
    with lock(folder):
        work = artifact.Work(folder, "ingest", config, inputs)
        planned = work.step("plan")
        if planned is None:
            artifact.check_file(folder, LEDGER, manifest.files[LEDGER])
            todo = _again(plan(listing, config, labels=labels), _read_table(folder, LEDGER), reasons, config.shard_mb)
            if not todo.shards:
                log.info(
                    "ingest: nothing to try again: no image that is still there was rejected for %s", ", ".join(reasons)
                )
                return manifest
            first, base = manifest.info["shards"], manifest.counts["rows"]
            planned = _write_plan(folder, todo, manifest.counts, first, base)
        _execute(folder, planned, config, work.done())
        markers = work.done()
        shards = [*manifest.shards(), *sorted(name for marker in markers.values() for name in marker.files)]
        counts, files, info = _gather(folder, planned, markers, shards, None)
        return work.amend(manifest, counts, files, info)


def _again(todo: Plan, old: pa.Table, reasons: Sequence[str], shard_mb: float) -> Plan:
    """The part of a plan that an old ledger rejected for one of `reasons`, with the rest of that ledger."""
    chosen = old.filter(pc.is_in(old["reason"], pa.array(reasons)))
    likely = todo.places[
        pc.is_in(todo.listing.names.take(pa.array(todo.places)), chosen["name"]).to_numpy(zero_copy_only=False)
    ]
    wanted = set(zip(chosen["name"].to_pylist(), chosen["source"].to_pylist(), strict=True))
    table = todo.listing.take(likely)
    keys = list(zip(table["name"].to_pylist(), where(table), strict=True))
    places = likely[[key in wanted for key in keys]]
    tried = wanted & set(keys)
    rest = [
        line for line in zip(*old.to_pydict().values(), strict=True) if line[:2] not in tried or line[2] not in reasons
    ]
    return todo.only(places, ledger(rest), int(shard_mb * 2**20))
