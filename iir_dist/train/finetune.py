"""Fine-tuning with a listwise AP loss: GeM, a projection (FC), and three-stage backpropagation over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iir_dist import artifact, overlap
from iir_dist.artifact import Manifest
from iir_dist.data.cache import Photos
from iir_dist.data.stored import Stored
from iir_dist.errors import ConfigError
from iir_dist.models.encoder import Encoder, centre, load, project
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints, launch, stage
from iir_dist.train.finetune_config import FinetuneConfig, MinedBatches
from iir_dist.train.finetune_task import FinetuneTask
from iir_dist.train.loop import Run, train
from iir_dist.train.mining import Miner
from iir_dist.train.validate import kept_aside


def _start(init: str, config: FinetuneConfig) -> Encoder:
    encoder = load(*artifact.require(init, *artifact.ENCODERS))
    return encoder if config.projection is None else project(encoder, config.projection)


def body(arguments: dict[str, Any], on_step: Any) -> None:
    """What each worker runs."""
    config = FinetuneConfig.model_validate(arguments["config"])
    photos = Photos([artifact.require(uri, "ingest") for uri in arguments["images"]])
    task = FinetuneTask(photos, _start(arguments["init"], config), config, arguments["tuples"])
    folder = open_folder(arguments["out"])
    if config.projection is not None and checkpoints.latest(folder) == 0:
        centre(task.encoder, task.sample())
    validation = config.validation
    run = Run(
        config.steps, config.optim, config.checkpoint_every, config.seed, stop=arguments["stop"],
        validate_every=validation.every if validation.classes else None, patience=validation.patience,
        keep=config.keep, precision=config.precision, tensorboard=arguments["tensorboard"],
    )  # fmt: skip
    train(task, run, folder, on_step)


def run(
    images: list[str],
    init: str,
    out: str,
    config: FinetuneConfig,
    *,
    mine: Miner | None = None,
    tests: Sequence[str] = (),
    force: bool = False,
) -> Manifest:
    """Fine-tune an encoder on labelled images.

    Args:
        mine: what makes the tuples of mined batches (`iir_dist.mine.mine`).
        tests: test sets (images artifacts or ground truth) that the training images must not overlap.

    Raises:
        ConfigError: the encoder is whitened already.
        InputError: the images have too few classes, or overlap a test set.
    """
    sources = [artifact.require(uri, "ingest") for uri in images]
    init_folder, init_manifest = artifact.require(init, *artifact.ENCODERS)
    if init_manifest.info["encoder"]["whitening"] is not None:
        raise ConfigError(
            f"{init} is whitened; fine-tune the encoder that it was made from, then learn whitening again"
        )
    refs = {
        "images": artifact.combine(artifact.reference(*source) for source in sources),
        "init": artifact.reference(init_folder, init_manifest),
    }
    shared = overlap.check(images, list(tests), allow=config.allow_overlap)
    with artifact.begin(out, "finetune", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        arguments = {
            "config": config.model_dump(mode="json"), "images": [f.uri for f, _ in sources], "init": init_folder.uri,
            "out": work.folder.uri, "stop": config.steps, "tuples": None,
            # Made absolute: workers run in a folder of their own.
            "tensorboard": config.tensorboard and open_folder(config.tensorboard).uri,
        }  # fmt: skip
        if isinstance(config.batches, MinedBatches):
            assert mine is not None
            _rounds(work, arguments, config, config.batches, mine)
        else:
            _launch(work, arguments, config)
        encoder = _start(init, config)
        stage.load_weights(encoder, checkpoints.final_weights(work.folder))
        encoder.spec = encoder.spec.model_copy(update={"weights": f"ap:{encoder.spec.weights}"})
        counts = {
            "images": sum(m.counts["rows"] for _, m in sources), "steps": checkpoints.latest(work.folder),
            "parameters": sum(p.numel() for p in encoder.parameters()),
        }  # fmt: skip
        return stage.publish(work, encoder, counts, {"overlap": shared})


def _launch(work: artifact.Work, arguments: dict[str, Any], config: FinetuneConfig) -> None:
    done = checkpoints.latest(work.folder)
    launch.launch(body, arguments, what="finetune", steps=config.steps, workers=config.workers, done=done)


def _rounds(
    work: artifact.Work, arguments: dict[str, Any], config: FinetuneConfig, batches: MinedBatches, mine: Miner
) -> None:
    """Mine and train in turn. A round starts from the checkpoint that the one before ended with."""
    init: str = arguments["init"]
    stored = Stored.read([artifact.require(uri, "ingest") for uri in arguments["images"]])
    aside = kept_aside(stored.labels, config.validation)
    for number, start in enumerate(range(0, config.steps, batches.every)):
        stop = min(start + batches.every, config.steps)
        done = checkpoints.latest(work.folder)
        if done >= stop:
            continue
        home = work.folder.child(f"{artifact.WORK}mining-{number:04d}")
        encoder = init
        if number > 0:
            encoder = stage.encoder_after(work.folder, start, home, lambda: _start(init, config))
        tuples = mine(arguments["images"], encoder, home.uri, number, batches.mining, without=aside)
        arguments |= {"tuples": (tuples, start), "stop": stop}
        _launch(work, arguments, config)
        if config.validation.patience is not None:
            last = checkpoints.read(work.folder, checkpoints.name_of(checkpoints.latest(work.folder)))
            if last["best"]["since"] >= config.validation.patience:
                break
