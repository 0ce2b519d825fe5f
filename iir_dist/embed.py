"""Images to unit vectors on Ray Data: decode on CPUs, forward on GPUs (or CPUs), one output shard an input shard.

The unit of work that travels is a *batch made by the decoder*: images of one shard that have one shape, up to a pixel
budget. What is computed together therefore depends on the shard alone, not on scheduling, and a run that was killed
and continued gives the same bits on a CPU. Rows carry (shard, row); the driver writes a shard when all its rows
are there, so memory holds only the vectors of the shards in flight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, Manifest, read_manifest, shard_name
from iir_dist.config import StageConfig
from iir_dist.data.embeddings import Embeddings, check_unit, open_embeddings, schema
from iir_dist.data.images import MAX_MEGAPIXELS, Resize, decode, prepare
from iir_dist.errors import CorruptError, ImageError, InputError, MismatchError
from iir_dist.lock import lock
from iir_dist.progress import Progress
from iir_dist.storage import Folder, open_folder

log = logging.getLogger(__name__)

REJECTED = "rejected.parquet"
BATCH_FIELDS = pa.schema(
    [
        ("shard", pa.int64()), ("total", pa.int64()), ("row", pa.list_(pa.int64())), ("id", pa.list_(pa.int64())),
        ("name", pa.list_(pa.string())), ("split", pa.list_(pa.string())), ("shape", pa.list_(pa.int64())),
        ("pixels", pa.large_binary()), ("error", pa.string()),
    ]
)  # fmt: skip
"""One decoded batch as a row: `pixels` is (n, height, width, 3) uint8; with `error`, n = 1 and there are none."""


class EmbedConfig(StageConfig):
    """`[embed]`."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    batch_megapixels: float = Field(0.41, gt=0)
    """Pixels in one forward pass, in millions (8 images of 224 x 224, enough for a CPU); a GPU wants about 13."""
    workers: int | None = Field(None, ge=1)
    """Embedding actors; all GPUs, else all CPUs, where not set."""
    execution: ClassVar[frozenset[str]] = frozenset({"workers"})


# ------------------------------------------------------------------------------------------------ decode


def batches(path: Path, shard: int, size: int, resize: Resize, pixels: float) -> Iterator[pa.Table]:
    """Decode one images shard, row group by row group, into batches of one shape; a pure function of the shard."""
    buckets: dict[tuple[int, int], list[tuple[int, Any, Any]]] = {}
    # Mapped and without reading ahead: one row group is held at a time.
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as parquet:
        total = parquet.metadata.num_rows
        row = 0
        columns = ["id", "name", "split", "box", "bytes"]
        for group in range(parquet.num_row_groups):
            for item in parquet.read_row_group(group, columns, use_threads=False).to_pylist():
                try:
                    image = prepare(decode(item.pop("bytes"), MAX_MEGAPIXELS * 2), size, resize, item["box"])
                except ImageError as error:
                    yield _batch(shard, total, [(row, item, None)], str(error))
                    row += 1
                    continue
                bucket = buckets.setdefault(image.shape[:2], [])
                bucket.append((row, item, image))
                row += 1
                if (len(bucket) + 1) * image.shape[0] * image.shape[1] > pixels:
                    yield _batch(shard, total, buckets.pop(image.shape[:2]))
    for bucket in buckets.values():
        yield _batch(shard, total, bucket)


def _batch(shard: int, total: int, rows: list[tuple[int, Any, Any]], error: str | None = None) -> pa.Table:
    stack = np.zeros((0, 0, 0, 3), np.uint8) if error else np.stack([image for _, _, image in rows])
    values = {
        "shard": [shard], "total": [total], "row": [[row for row, _, _ in rows]],
        **{key: [[item[key] for _, item, _ in rows]] for key in ("id", "name", "split")},
        "shape": [list(stack.shape)], "pixels": [stack.tobytes()], "error": [error],
    }  # fmt: skip
    return pa.table(values, schema=BATCH_FIELDS)


# ------------------------------------------------------------------------------------------------ forward


class Embedder:
    """An actor that holds the network and turns one decoded batch into rows of vectors."""

    def __init__(self, encoder_uri: str, threads: int) -> None:
        import torch

        from iir_dist.models import encoder

        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        folder, manifest = artifact.require(encoder_uri, *artifact.ENCODERS)
        network = encoder.load(folder, manifest).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)
        self.dim = network.spec.dim

    def __call__(self, table: pa.Table) -> pa.Table:
        import torch

        batch = table.to_pylist()[0]
        n = len(batch["row"])
        vectors = np.full((n, self.dim), np.nan, np.float32)
        if not batch["error"]:
            pixels = np.frombuffer(batch["pixels"], np.uint8).reshape(batch["shape"])
            with torch.inference_mode():
                x = torch.from_numpy(pixels.copy()).to(self.device).permute(0, 3, 1, 2)
                vectors = self.network(x.float().div(255)).float().cpu().numpy()
        lost = ~np.isfinite(vectors).all(axis=1) | (np.linalg.norm(vectors, axis=1) < 0.5)
        reasons = [(batch["error"] or "the network gave no finite, non-zero vector") if bad else None for bad in lost]
        return pa.table(
            {
                "shard": np.full(n, batch["shard"]), "total": np.full(n, batch["total"]), "row": batch["row"],
                "id": batch["id"], "name": batch["name"], "split": batch["split"],
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dim),
                "error": pa.array(reasons, pa.string()),
            }
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the stage


def run(inputs: str, encoder_uri: str, out: str, config: EmbedConfig, *, force: bool = False) -> Manifest:
    """Embed an images artifact; or, given embeddings of the same network before whitening, whiten those.

    Raises:
        InputError: the input is neither, or the encoder is none.
        MismatchError: the embeddings are not those that the encoder's whitening belongs to.
    """
    encoder_folder, encoder = artifact.require(encoder_uri, *artifact.ENCODERS)
    manifest = read_manifest(open_folder(inputs))
    if manifest is not None and manifest.stage == "embed":
        return _project(inputs, encoder_folder, encoder, out, config, force)
    images, manifest = artifact.require(inputs, "ingest")
    refs = {"images": artifact.reference(images, manifest), "encoder": artifact.reference(encoder_folder, encoder)}
    old = None if force else _of_fewer_shards(out, config, refs, manifest)
    if old is not None:
        return _extend(old, out, config, refs, images, manifest)
    with artifact.begin(out, "embed", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        _embed(work, images, manifest, encoder_folder.uri, config, range(len(manifest.shards())))
        return _finish(work, encoder, len(manifest.shards()), {"input_shards": _input_shards(manifest)})


def _embed(
    work: artifact.Work, images: Folder, manifest: Manifest, encoder_uri: str, config: EmbedConfig, shards: range
) -> None:
    """Write the vectors of those of `shards` that are not done."""
    done = work.done()
    pending = [n for n in shards if n not in done]
    if pending:
        rows = manifest.counts["rows"] if shards.start == 0 else None
        finished = sum(marker.counts["in"] for marker in done.values())
        with Progress("embed", rows, "images", done=finished) as progress:
            for table in _vectors(images, manifest, pending, encoder_uri, config, progress):
                _write_shard(work.folder, table, config.dtype)


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
) -> Manifest:
    """Add the shards that the images got since; what is there is not computed again."""
    folder = open_folder(out)
    with lock(folder):
        work = artifact.Work(folder, "embed", config, refs)
        first = len(old.info["input_shards"])
        log.info("embed: %s has %d of %d shards, the others are added", folder.uri, first, len(manifest.shards()))
        _embed(work, images, manifest, refs["encoder"].uri, config, range(first, len(manifest.shards())))
        markers = work.done()
        counts = {key: old.counts[key] + sum(m.counts[key] for m in markers.values()) for key in old.counts}
        with folder.open(REJECTED) as file:
            lost = pq.read_table(file).to_pylist()
        for number in sorted(markers):  # a run that was killed here may have written them already
            lost += [line for line in markers[number].info["rejected"] if line not in lost]
        files = {REJECTED: _write_ledger(folder, lost)}
        return work.amend(old, counts, files, {"input_shards": _input_shards(manifest)}, refs)


def _vectors(
    images: Folder, manifest: Manifest, pending: list[int], encoder_uri: str, config: EmbedConfig, progress: Progress
) -> Iterator[pa.Table]:
    """Run the pipeline and yield the table of each shard once it is complete."""
    session.connect()
    import ray.data

    from iir_dist.models.encoder import read_spec

    spec = read_spec(open_folder(encoder_uri))
    cpus, gpus = session.cluster_cpus(), session.cluster_gpus()
    workers = config.workers or gpus or cpus
    # No more actors than there are batches: each costs seconds and a gigabyte to start.
    batches_at_most = manifest.counts["rows"] * spec.size**2 / (config.batch_megapixels * 1e6)
    workers = max(1, min(workers, math.ceil(batches_at_most)))
    # On CPUs the forward passes take four fifths of each core; decoding, a tenth of the work, runs in what is left.
    share = {"num_gpus": min(1.0, gpus / workers), "num_cpus": 1.0} if gpus else {"num_cpus": 0.8 * cpus / workers}
    threads = 1 if gpus else max(1, cpus // workers)
    names = manifest.shards()

    def decode_shard(item: dict[str, Any]) -> Iterator[pa.Table]:
        number = int(item["shard"][0])
        with artifact.verified(images, names[number], manifest.files[names[number]]) as path:
            yield from batches(path, number, spec.size, spec.resize, config.batch_megapixels * 1e6)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # One batch a block: with Ray's 128 MB a small set would be a single block, and all but one actor idle.
    context.target_max_block_size = int(config.batch_megapixels * 3e6)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = (
        ray.data.from_items([{"shard": n} for n in pending], override_num_blocks=len(pending))
        .map_batches(decode_shard, batch_size=1, num_cpus=1.0 if gpus else 0.2 * cpus / workers)
        .map_batches(
            Embedder,
            fn_constructor_args=(encoder_uri, threads),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
            **share,
        )
    )
    waiting: dict[int, list[pa.Table]] = {}
    try:
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            progress.advance(len(table))
            for shard in np.unique(table.column("shard").to_numpy()):
                part = table.filter(pa.compute.equal(table.column("shard"), int(shard)))
                parts = waiting.setdefault(int(shard), [])
                parts.append(part)
                if sum(map(len, parts)) == part.column("total")[0].as_py():
                    yield pa.concat_tables(waiting.pop(int(shard))).sort_by("row")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (CorruptError, InputError)):
            raise error.cause from None
        raise
    if waiting:
        raise CorruptError(f"{images.uri}: shards {sorted(waiting)} gave fewer rows than they hold")


def _write_shard(folder: Folder, table: pa.Table, dtype: str) -> None:
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


def _finish(work: artifact.Work, encoder: Manifest, shards: int, extra: Mapping[str, Any] | None = None) -> Manifest:
    markers = work.done()
    counts = {key: sum(m.counts[key] for m in markers.values()) for key in ("in", "out", "rejected")}
    if not counts["out"]:
        raise InputError(f"none of {counts['in']} images could be embedded; first: {markers[0].info['rejected'][0]}")
    lost = [line for number in sorted(markers) for line in markers[number].info["rejected"]]
    ledger = _write_ledger(work.folder, lost)
    info = {"encoder_fingerprint": encoder.fingerprint, "encoder": encoder.info["encoder"], **(extra or {})}
    return work.publish(counts, {REJECTED: ledger}, info, shards=shards)


def _write_ledger(folder: Folder, lost: list[dict[str, str]]) -> FileEntry:
    fields = pa.schema([("name", pa.string()), ("error", pa.string())])
    with folder.publish(REJECTED) as file:
        pq.write_table(pa.Table.from_pylist(lost, schema=fields), file.path)
    return artifact.entry_of(file)


# ------------------------------------------------------------------------------------------------ whitening alone


def _project(
    inputs: str, encoder_folder: Folder, encoder: Manifest, out: str, config: EmbedConfig, force: bool
) -> Manifest:
    """Whiten finished embeddings: the network need not run again, because whitening is its last, linear step."""
    source = open_embeddings(inputs)
    whitening = encoder.info["encoder"]["whitening"]
    if whitening is None or whitening["base"] != source.encoder:
        raise MismatchError(
            f"{inputs} holds vectors of encoder {str(source.encoder)[:12]}; {encoder_folder.uri} whitens those of "
            f"{str(whitening and whitening['base'])[:12]}: give the images, or the encoder that was whitened"
        )
    refs = {"embeddings": source.ref, "encoder": artifact.reference(encoder_folder, encoder)}
    with artifact.begin(out, "embed", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        done = work.done()
        network = _whitener(encoder_folder, encoder)
        for number, shard in enumerate(source.shards):
            if number not in done:
                _write_shard(work.folder, _whitened(source, shard, number, network), config.dtype)
        return _finish(work, encoder, len(source.shards))


def _whitener(folder: Folder, manifest: Manifest) -> Any:
    from iir_dist.models import encoder

    return encoder.load(folder, manifest)


def _whitened(source: Embeddings, shard: str, number: int, network: Any) -> pa.Table:
    import torch

    block = source.read(shard)
    assert block.vectors is not None
    with torch.inference_mode():
        x = network.whiten(torch.from_numpy(block.vectors)).numpy()
    n = len(block.ids)
    return pa.table(
        {
            "shard": np.full(n, number), "total": np.full(n, n), "row": np.arange(n), "id": block.ids,
            "name": block.names, "split": block.splits,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
            "error": pa.nulls(n, pa.string()),
        }
    )  # fmt: skip
