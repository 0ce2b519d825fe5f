"""Self-supervised pretraining on N workers: any method of `iir_dist.train.methods`, labels not used."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.cache import Photos
from iir_dist.data.parts import deal, photo_counts
from iir_dist.data.sampling import EpochSampler
from iir_dist.errors import ConfigError
from iir_dist.models.encoder import Encoder, create, load
from iir_dist.storage import Folder, open_folder
from iir_dist.train import checkpoints, collectives, launch, stage
from iir_dist.train.chunks import Chunks
from iir_dist.train.loop import Run, train
from iir_dist.train.methods import METHODS
from iir_dist.train.methods.insclr import InsCLRConfig
from iir_dist.train.neighbours import Finder, Neighbours
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.pretrain_task import PretrainTask
from iir_dist.train.probe import Probe

log = logging.getLogger(__name__)
MUCH = 0.05
"""Of the photos, left out in an epoch, that is worth a warning."""


def _start(init: str | None, config: PretrainConfig) -> Encoder:
    return create(config.encoder) if init is None else load(*artifact.require(init, *artifact.ENCODERS))


def open_photos(sources: Sequence[tuple[Folder, Manifest]], config: PretrainConfig, counts: Sequence[int]) -> Photos:
    """What this worker needs of the set: all of it, or the shards of the parts that its share of a batch is of.

    Args:
        counts: of each shard (`data.parts.photo_counts`), where there are several parts.
    """
    if config.parts == 1:
        return Photos(sources)
    chunks = Chunks(config.batch, config.chunk, config.parts, collectives.world_size())
    dealt = deal(counts, config.parts)
    return Photos(sources, counts, [shard for part in chunks.parts_of(collectives.rank()) for shard in dealt[part]])


def body(arguments: dict[str, Any], on_step: Any) -> None:
    """What each worker runs."""
    config = PretrainConfig.model_validate(arguments["config"])
    sources = [artifact.require(uri, "ingest") for uri in arguments["images"]]
    photos = open_photos(sources, config, arguments["counts"])
    encoder = _start(arguments["init"], config)
    watch, probe, neighbours = config.probe, None, None
    if arguments["probe"] is not None:
        probe = Probe(artifact.require(arguments["probe"], "ingest"), encoder, watch.neighbours)
    if arguments["neighbours"] is not None:
        neighbours = Neighbours.read(*arguments["neighbours"])
    run_ = Run(
        config.steps, config.optim, config.checkpoint_every, config.seed, stop=arguments["stop"], keep=config.keep,
        validate_every=watch.every if probe else None, patience=watch.patience, keep_best=watch.keep == "best",
        precision=config.precision, tensorboard=arguments["tensorboard"],
    )  # fmt: skip
    train(PretrainTask(photos, encoder, config, probe, neighbours), run_, open_folder(arguments["out"]), on_step)


def run(
    images: list[str],
    out: str,
    config: PretrainConfig,
    *,
    init: str | None = None,
    probe: str | None = None,
    find: Finder | None = None,
    force: bool = False,
) -> Manifest:
    """Pretrain an encoder on one or more images artifacts; labels and queries are not used.

    Args:
        init: an encoder artifact to go on from, in place of `config.encoder`.
        probe: an images artifact with ground truth or labels to search while training.
        find: what finds the neighbours that insclr learns from (`iir_dist.mine.neighbours`).

    Raises:
        ConfigError: the encoder to go on from is whitened or projected.
        InputError: there are fewer images than a batch has, or the probe cannot be searched.
    """
    sources = [artifact.require(uri, "ingest") for uri in images]
    refs = {"images": artifact.combine(artifact.reference(*source) for source in sources)}
    if init is not None:
        start = artifact.require(init, *artifact.ENCODERS)
        spec = start[1].info["encoder"]
        if spec["whitening"] is not None or spec["projection"] is not None:
            raise ConfigError(
                f"{init} has a projection or a whitening, which pretraining would leave behind; go on from the encoder before it"
            )
        refs["init"] = artifact.reference(*start)
    if probe is not None:
        refs["probe"] = artifact.reference(*artifact.require(probe, "ingest"))
    with artifact.begin(out, "pretrain", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        arguments = {
            "config": config.model_dump(mode="json"), "images": [f.uri for f, _ in sources], "out": work.folder.uri,
            "counts": _counts(sources, config),
            "init": init and open_folder(init).uri, "probe": probe and open_folder(probe).uri, "neighbours": None,
            "stop": config.steps,
            # Made absolute: workers run in a folder of their own.
            "tensorboard": config.tensorboard and open_folder(config.tensorboard).uri,
        }  # fmt: skip
        if isinstance(config.method, InsCLRConfig):
            assert find is not None
            _rounds(work, arguments, config, config.method, find)
        else:
            _launch(work, arguments, config)
        _warn(work.folder)
        encoder = _start(init, config)
        published = METHODS[config.method.name][1].published
        stage.load_weights(encoder, checkpoints.final_weights(work.folder), published)
        encoder.spec = encoder.spec.model_copy(update={"weights": f"{config.method.name}:{encoder.spec.weights}"})
        counts = {"images": sum(m.counts["rows"] for _, m in sources), "steps": checkpoints.latest(work.folder)}
        return stage.publish(work, encoder, counts)


def _counts(sources: Sequence[tuple[Folder, Manifest]], config: PretrainConfig) -> list[int]:
    """Photos of each shard, where the set is cut into parts; says what uneven parts cost."""
    if config.parts == 1:
        return []
    counts = photo_counts(sources)
    left_out, n = EpochSampler.of(counts, config.parts, config.batch, config.seed).left_out, sum(counts)
    if left_out - config.batch > MUCH * n:  # part of a batch is left out in any case
        log.warning(
            "pretrain: %d parts of %d shards are so uneven that an epoch leaves out %.0f%% of the photos, others each time; "
            "ingest with a smaller ingest.shard_mb, or take fewer pretrain.parts",
            config.parts, len(counts), 100 * left_out / n,
        )  # fmt: skip
    return counts


def _launch(work: artifact.Work, arguments: dict[str, Any], config: PretrainConfig) -> None:
    done = checkpoints.latest(work.folder)
    launch.launch(body, arguments, what="pretrain", steps=config.steps, workers=config.workers, done=done)


def _rounds(
    work: artifact.Work, arguments: dict[str, Any], config: PretrainConfig, method: InsCLRConfig, find: Finder
) -> None:
    """Find neighbours and train in turn. A round starts from the checkpoint that the one before ended with."""
    every = math.ceil(config.steps / method.rounds)
    for number, start in enumerate(range(0, config.steps, every)):
        stop = min(start + every, config.steps)
        if checkpoints.latest(work.folder) >= stop:
            continue
        home = work.folder.child(f"{artifact.WORK}round-{number:04d}")
        encoder = stage.encoder_after(work.folder, start, home, lambda: _start(arguments["init"], config))
        table = find(
            arguments["images"], encoder, home.uri, candidates=method.candidates, exact_rows=method.exact_rows,
            seed=config.seed,
        )  # fmt: skip
        _launch(work, arguments | {"neighbours": (table, start), "stop": stop}, config)
        if config.probe.patience is not None and arguments["probe"] is not None:
            last = checkpoints.read(work.folder, checkpoints.name_of(checkpoints.latest(work.folder)))
            if last["best"]["since"] >= config.probe.patience:
                break


def _warn(folder: Folder) -> None:
    """What the last probe warned of."""
    for text in reversed(folder.read(checkpoints.LOG).decode().splitlines()):
        line = json.loads(text)
        if "val_map" in line:
            if line["val_warning"]:
                log.warning("pretrain: at step %d %s", line["step"] + 1, line["val_warning"])
            return
