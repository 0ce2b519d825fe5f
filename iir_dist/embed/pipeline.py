"""Ray Data between decoders and workers: shards in, tables of vectors out, each as soon as it is complete.

What travels is a batch made by the decoder, as one row and one block. Rows carry (shard, row), the driver gathers the
rows of a shard, so memory holds only the vectors of the shards in flight, and a task that is tried again adds nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iir_dist import artifact, session
from iir_dist.artifact import Manifest
from iir_dist.embed.config import EmbedConfig
from iir_dist.embed.decode import batches
from iir_dist.embed.plan import EmbedPlan
from iir_dist.errors import CorruptError, IirError
from iir_dist.progress import Progress
from iir_dist.storage import Folder

if TYPE_CHECKING:  # this module is loaded by decoders, which need no torch
    from iir_dist.models.encoder import EncoderSpec

log = logging.getLogger(__name__)

RESTARTS = 4
"""Deaths of workers without a batch done in between, after which the work is held to be the cause. Ray would go on."""


class EmbedderActor:
    """A worker: `forward.Embedder`, which is loaded once the start is counted, so that a death while loading counts too."""

    def __init__(self, starts: Any, most_starts: int, encoder_uri: str, threads: int, config: EmbedConfig) -> None:
        import ray

        self.starts = starts
        # Both are said at the first batch: an error of the constructor would be tried again, and come as one of Ray's.
        self.failure: IirError | None = None
        if ray.get(starts.add.remote()) > most_starts:
            self.failure = IirError(
                "worker processes died again and again before or at their first batch, probably for want of memory (dmesg "
                "and Ray's logs tell); --set workers=1, a smaller batch_megapixels or size. What is done is kept: the same "
                "command goes on"
            )
            return
        try:
            from iir_dist.embed.forward import Embedder

            self.embedder = Embedder(encoder_uri, threads, config)
        except IirError as error:
            self.failure = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """One batch, as `forward.Embedder` does it."""
        if self.failure:
            raise self.failure
        rows = self.embedder(table)
        starts, self.starts = self.starts, None  # of two threads, the other may be here too
        if starts is not None:
            starts.reset.remote()
        return rows


class Starts:
    """An actor that counts the starts of workers since the last one that did a batch."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        """Count a start."""
        self.count += 1
        return self.count

    def reset(self) -> None:
        """A worker did its first batch."""
        self.count = 0


def vectors(
    images: Folder,
    manifest: Manifest,
    pending: list[int],
    encoder_uri: str,
    spec: EncoderSpec,
    plan: EmbedPlan,
    config: EmbedConfig,
    progress: Progress,
) -> Iterator[pa.Table]:
    """The table of each pending shard, in the order in which they become complete.

    Raises:
        CorruptError: a shard is not what its manifest says.
        IirError: a worker failed for good.
    """
    ray = session.connect()
    import ray.data as data

    names = manifest.shards()
    # Not the spec itself: unpickling it would load torch into every decoder.
    size, resize, pixels = spec.size, spec.resize, config.batch_megapixels * 1e6

    def decode_shard(item: dict[str, Any]) -> Iterator[pa.Table]:
        number = int(item["shard"][0])
        with artifact.verified(images, names[number], manifest.files[names[number]]) as path:
            yield from batches(path, number, size, resize, pixels)

    pinned = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": session.here()}
    starts = ray.remote(**pinned)(Starts).remote()
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    # One batch a block: with Ray's 128 MB a small set would be a single block, and all but one worker idle. A block is
    # closed once it is larger than this; a full batch has more than half of the pixels, three bytes each.
    context.target_max_block_size = int(1.5 * pixels)
    # Without the one, what is spilled is not counted; without the other, not told.
    context.enable_get_object_locations_for_metrics = context.verbose_stats_logs = True
    context.raise_original_map_exception = True  # one of ours is to be known below
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors come as exceptions too
    rows = (
        data.from_items([{"shard": n} for n in pending], override_num_blocks=len(pending))
        .map_batches(
            decode_shard, batch_size=1, num_cpus=plan.decoder_cpus, compute=data.TaskPoolStrategy(plan.decoders)
        )
        .map_batches(
            EmbedderActor,
            fn_constructor_args=(starts, plan.workers + RESTARTS, encoder_uri, plan.threads, config),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(
                min_size=1, max_size=plan.workers, initial_size=plan.workers,
                # The second call of a worker on a GPU copies while the first computes.
                max_concurrent_calls_per_actor=2 if plan.worker_gpus else 1,
                enable_true_multi_threading=bool(plan.worker_gpus),
            ),
            num_cpus=plan.worker_cpus,
            num_gpus=plan.worker_gpus,
            resources=session.accelerator(),
        )
    )  # fmt: skip
    options = rows.context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=plan.in_flight_bytes)
    waiting: dict[int, list[pa.Table]] = {}
    noted: set[str] = set()
    try:
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            progress.advance(len(table))
            for note in set(pc.unique(table.column("note").drop_null()).to_pylist()) - noted:
                noted.add(note)
                log.warning("embed: %s", note)
            for shard in np.unique(table.column("shard").to_numpy()):
                part = table.filter(pc.equal(table.column("shard"), int(shard)))
                parts = waiting.setdefault(int(shard), [])
                parts.append(part)
                if sum(map(len, parts)) == part.column("total")[0].as_py():
                    yield pa.concat_tables(waiting.pop(int(shard))).sort_by("row")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, IirError):
            raise _without_advice(error.cause) from None
        raise
    if waiting:
        raise CorruptError(f"{images.uri}: shards {sorted(waiting)} gave fewer rows than they hold")
    _warn_of_spilling(rows.stats(), plan)


def _without_advice(error: IirError) -> IirError:
    """Ray Data appends to the message how its own settings could be changed."""
    error.args = (str(error).partition("\nFailed to apply UDF transform")[0], *error.args[1:])
    return error


def _warn_of_spilling(stats: str, plan: EmbedPlan) -> None:
    """Ray Data's own figures of what it wrote to disk because its object store was full."""
    spilled = sum(int(size) for size in re.findall(r"'obj_store_mem_spilled': (\d+)", stats))
    if spilled:
        log.warning(
            "embed: Ray spilled %s MB of decoded batches to disk, its object store has %d MB: start Ray with a larger "
            "--object-store-memory, or --set batch_megapixels to less", spilled >> 20, plan.store_bytes >> 20,
        )  # fmt: skip
