"""Self-supervised pretraining on N workers: any method of `iir_dist.train.methods`, labels not used."""

from __future__ import annotations

import json
import logging
from typing import Any

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.cache import Photos
from iir_dist.errors import ConfigError
from iir_dist.models.encoder import Encoder, create, load
from iir_dist.storage import Folder, open_folder
from iir_dist.train import checkpoints, launch, stage
from iir_dist.train.loop import Run, train
from iir_dist.train.methods import METHODS
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.pretrain_task import PretrainTask
from iir_dist.train.probe import Probe

log = logging.getLogger(__name__)


def _start(init: str | None, config: PretrainConfig) -> Encoder:
    return create(config.encoder) if init is None else load(*artifact.require(init, *artifact.ENCODERS))


def body(arguments: dict[str, Any], on_step: Any) -> None:
    """What each worker runs."""
    config = PretrainConfig.model_validate(arguments["config"])
    photos = Photos([artifact.require(uri, "ingest") for uri in arguments["images"]])
    encoder = _start(arguments["init"], config)
    watch, probe = config.probe, None
    if arguments["probe"] is not None:
        probe = Probe(artifact.require(arguments["probe"], "ingest"), encoder, watch.neighbours)
    run_ = Run(
        config.steps, config.optim, config.checkpoint_every, config.seed, keep=config.keep,
        validate_every=watch.every if probe else None, patience=watch.patience, keep_best=watch.keep == "best",
        precision=config.precision, tensorboard=arguments["tensorboard"],
    )  # fmt: skip
    train(PretrainTask(photos, encoder, config, probe), run_, open_folder(arguments["out"]), on_step)


def run(
    images: list[str],
    out: str,
    config: PretrainConfig,
    *,
    init: str | None = None,
    probe: str | None = None,
    force: bool = False,
) -> Manifest:
    """Pretrain an encoder on one or more images artifacts; labels and queries are not used.

    Args:
        init: an encoder artifact to go on from, in place of `config.encoder`.
        probe: an images artifact with ground truth or labels to search while training.

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
            "init": init and open_folder(init).uri, "probe": probe and open_folder(probe).uri,
            # Made absolute: workers run in a folder of their own.
            "tensorboard": config.tensorboard and open_folder(config.tensorboard).uri,
        }  # fmt: skip
        done = checkpoints.latest(work.folder)
        launch.launch(body, arguments, what="pretrain", steps=config.steps, workers=config.workers, done=done)
        _warn(work.folder)
        encoder = _start(init, config)
        published = METHODS[config.method.name][1].published
        stage.load_weights(encoder, checkpoints.final_weights(work.folder), published)
        encoder.spec = encoder.spec.model_copy(update={"weights": f"{config.method.name}:{encoder.spec.weights}"})
        counts = {"images": sum(m.counts["rows"] for _, m in sources), "steps": checkpoints.latest(work.folder)}
        return stage.publish(work, encoder, counts)


def _warn(folder: Folder) -> None:
    """What the last probe warned of."""
    for text in reversed(folder.read(checkpoints.LOG).decode().splitlines()):
        line = json.loads(text)
        if "val_map" in line:
            if line["val_warning"]:
                log.warning("pretrain: at step %d %s", line["step"] + 1, line["val_warning"])
            return
