"""Ingest as a stage: list and plan in the driver, check and write on Ray, close the books."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest, Marker
from iir_dist.config import fingerprint
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.data.images import REASONS
from iir_dist.data.listing import list_sources
from iir_dist.errors import ArtifactError, ConfigError, InputError
from iir_dist.ingest.execute import execute, write_plan
from iir_dist.ingest.known import check_count, expand
from iir_dist.ingest.labels import read_labels
from iir_dist.ingest.ledger import LEDGER, gather
from iir_dist.ingest.plan import IngestConfig, plan
from iir_dist.ingest.retry import retry_rejected
from iir_dist.storage import split_uri

log = logging.getLogger(__name__)


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
            inputs["labels"] = InputRef(uri=str(labels_uri), fingerprint=_content(str(labels_uri)))
        if retry:
            manifest = retry_rejected(out, config, inputs, listing, labels, retry)
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
                        marker = write_plan(work.folder, todo, totals, 0, 0)
                        del todo
                    del listing, labels  # a name for each image; the plan is on file
                    pa.default_memory_pool().release_unused()
                    execute(work.folder, marker, config, work.done())
                    manifest = _finish(work, marker, truth)
                else:
                    manifest = work.finished
    _check_rejected(out, manifest, config)
    return manifest


def _content(uri: str) -> str:
    folder, name = split_uri(uri)
    return hashlib.sha256(folder.read(name)).hexdigest()


def _finish(work: artifact.Work, planned: Marker, truth: GroundTruth | None) -> Manifest:
    markers = work.done()
    shards = sorted(name for marker in markers.values() for name in marker.files)
    counts, files, info = gather(work.folder, planned, markers, shards, truth)
    if truth is not None:
        with work.folder.publish(groundtruth.FILE) as file:
            file.path.write_text(truth.to_json())
        files[groundtruth.FILE] = artifact.entry_of(file)
    info["split"] = work.config.resolved()["split"]
    return work.publish(counts, files, info, shards=len(planned.info["sizes"]))


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
