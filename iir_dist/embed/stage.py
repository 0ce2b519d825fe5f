"""Embed as a stage: what is to be done, the plan of it, and closing the books."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import Manifest, read_manifest
from iir_dist.embed.config import EmbedConfig
from iir_dist.embed.output import REJECTED, finish, write_ledger, write_shard
from iir_dist.embed.plan import EmbedPlan, plan
from iir_dist.embed.project import project
from iir_dist.lock import lock
from iir_dist.progress import Progress
from iir_dist.storage import Folder, open_folder

if TYPE_CHECKING:
    from iir_dist.models.encoder import EncoderSpec

log = logging.getLogger(__name__)


def run(inputs: str, encoder_uri: str, out: str, config: EmbedConfig, *, force: bool = False) -> Manifest:
    """Embed an images artifact; or, given embeddings of the same network before whitening, whiten those.

    Raises:
        InputError: the input is neither, or the encoder is none.
        MismatchError: the embeddings are not those that the encoder's whitening belongs to.
    """
    encoder_folder, encoder = artifact.require(encoder_uri, *artifact.ENCODERS)
    manifest = read_manifest(open_folder(inputs))
    if manifest is not None and manifest.stage == "embed":
        return project(inputs, encoder_folder, encoder, out, config, force)
    images, manifest = artifact.require(inputs, "ingest")
    refs = {"images": artifact.reference(images, manifest), "encoder": artifact.reference(encoder_folder, encoder)}
    old = None if force else _of_fewer_shards(out, config, refs, manifest)
    if old is not None:
        return _extend(old, out, config, refs, images, manifest, (encoder_folder, encoder))
    with artifact.begin(out, "embed", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        planned = _embed(work, images, manifest, (encoder_folder, encoder), config, range(len(manifest.shards())))
        info = {"input_shards": _input_shards(manifest), **planned}
        return finish(work, encoder, len(manifest.shards()), info)


def _embed(
    work: artifact.Work,
    images: Folder,
    manifest: Manifest,
    encoder: tuple[Folder, Manifest],
    config: EmbedConfig,
    shards: range,
) -> dict[str, Any]:
    """Write the vectors of those of `shards` that are not done; what was planned, for the manifest."""
    from iir_dist.embed.pipeline import vectors
    from iir_dist.models.encoder import read_spec

    done = work.done()
    pending = [n for n in shards if n not in done]
    if not pending:
        return {}
    spec = read_spec(encoder[0])
    todo = _plan(manifest, pending, spec, encoder[1], config)
    log.info("embed: %s", todo.summary())
    if todo.in_flight_bytes > todo.store_bytes / 2:  # Ray Data uses half of it
        log.warning(
            "embed: batches in flight may take %d MB, and Ray's object store has %d MB: start Ray with a larger "
            "--object-store-memory, or --set batch_megapixels to less; else they go to disk and back",
            todo.in_flight_bytes >> 20, todo.store_bytes >> 20,
        )  # fmt: skip
    rows = manifest.counts["rows"] if shards.start == 0 else None
    finished = sum(marker.counts["in"] for marker in done.values())
    with Progress("embed", rows, "images", done=finished) as progress:
        for table in vectors(images, manifest, pending, encoder[0].uri, spec, todo, config, progress):
            write_shard(work.folder, table, config.dtype)
            finished += len(table)
            progress.in_flight(progress.done - finished)  # images whose vectors wait for the rest of their shard
    return {"memory_plan": todo.manifest()}


def _plan(
    manifest: Manifest, pending: list[int], spec: EncoderSpec, encoder: Manifest, config: EmbedConfig
) -> EmbedPlan:
    from iir_dist.embed.forward import activation_bytes
    from iir_dist.models.encoder import WEIGHTS

    names = manifest.shards()
    n = max(1, int(config.batch_megapixels * 1e6 / spec.size**2))
    return plan(
        rows=math.ceil(manifest.counts["rows"] * len(pending) / len(names)), shards=len(pending), size=spec.size,
        dim=spec.dim, batch_megapixels=config.batch_megapixels, network_bytes=encoder.files[WEIGHTS].size,
        forward_bytes=activation_bytes(spec, n, spec.size, spec.size),
        shard_bytes=max(manifest.files[names[number]].size for number in pending),
        store_bytes=session.object_stores_bytes(), cpus=session.cluster_cpus(), node_cpus=session.largest_node_cpus(),
        gpus=session.cluster_gpus(), workers=config.workers,
    )  # fmt: skip


def _input_shards(images: Manifest) -> dict[str, str]:
    return {name: images.files[name].sha256 for name in images.shards()}


def _of_fewer_shards(
    out: str, config: EmbedConfig, refs: Mapping[str, artifact.InputRef], images: Manifest
) -> Manifest | None:
    """The finished embeddings in `out`, if they are of this encoder and config, and of the first shards of `images`."""
    old = read_manifest(open_folder(out))
    if old is None or old.stage != "embed" or "images" not in old.inputs:
        return None
    there = {k: v for k, v in old.config.items() if k not in config.execution}
    if there != config.resolved() or old.inputs["encoder"].fingerprint != refs["encoder"].fingerprint:
        return None
    before, now = list(old.info.get("input_shards", {}).items()), list(_input_shards(images).items())
    return old if before and len(before) < len(now) and before == now[: len(before)] else None


def _extend(
    old: Manifest,
    out: str,
    config: EmbedConfig,
    refs: Mapping[str, artifact.InputRef],
    images: Folder,
    manifest: Manifest,
    encoder: tuple[Folder, Manifest],
) -> Manifest:
    """Add the shards that the images got since; what is there is not computed again."""
    folder = open_folder(out)
    with lock(folder):
        work = artifact.Work(folder, "embed", config, refs)
        first = len(old.info["input_shards"])
        log.info("embed: %s has %d of %d shards, the others are added", folder.uri, first, len(manifest.shards()))
        _embed(work, images, manifest, encoder, config, range(first, len(manifest.shards())))
        markers = work.done()
        counts = {key: old.counts[key] + sum(m.counts[key] for m in markers.values()) for key in old.counts}
        with folder.open(REJECTED) as file:
            lost = pq.read_table(file).to_pylist()
        for number in sorted(markers):  # a run that was killed here may have written them already
            lost += [line for line in markers[number].info["rejected"] if line not in lost]
        files = {REJECTED: write_ledger(folder, lost)}
        return work.amend(old, counts, files, {"input_shards": _input_shards(manifest)}, refs)
