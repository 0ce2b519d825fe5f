"""The main job, on one machine or as a job on a cluster: raw photos to a retrieval report.

Four encoders are compared, as the paper does and with the control that it leaves out: an ImageNet classifier and a
contrastively pretrained network, each off the shelf and after the same AP fine-tuning. The best of them by design, the
fine-tuned classifier, is then whitened, indexed among distractors and searched both ways. Every step is a stage like
any other, run by the functions behind `iir`; a second run finds them finished.

Sizes are chosen so that it takes minutes on two cores; they are far too small to judge the methods by.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from iir_dist import artifact
from iir_dist.config import StageConfig, fingerprint
from iir_dist.errors import InputError
from iir_dist.storage import LocalFolder, open_folder

log = logging.getLogger(__name__)


class DemoConfig(StageConfig):
    """`[demo]`."""

    pretrain_steps: int = Field(45, ge=1)
    """Of 64 photos in two views of 64 px, about 1.2 s each on two cores."""
    finetune_steps: int = Field(16, ge=1)
    """Of 76 photos, 3 s each for the classifier at 192 px and 2.3 s for the contrastive network at 128 px."""
    workers: int = Field(2, ge=1)
    """Training workers."""
    shards: int = Field(2, ge=1)
    """Index shards."""
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Data:
    """Where the photos of the demo are."""

    benchmark: str
    groundtruth: str
    train: str
    unlabelled: str
    distractors: str


def world_data(out: str | Path) -> Data:
    """The procedural world, written to `out/world` if it is not there."""
    from iir_dist.data.synthetic import World, write

    folder, world = open_folder(out).child("world"), World()
    expected = json.dumps(fingerprint(dataclasses.asdict(world))).encode()
    names = ("benchmark.tar", "groundtruth.json", "train.tar", "unlabelled.tar", "distractors.tar")
    if not (folder.exists("world.json") and folder.read("world.json") == expected):
        with tempfile.TemporaryDirectory(prefix="iir-") as scratch:
            write(world, Path(scratch))
            for name in names:
                folder.write(name, Path(scratch, name).read_bytes())
        folder.write("world.json", expected)
    return Data(*(folder.address(name) for name in names))


def real_data(uri: str) -> Data:
    """The development photos: wonders11 as benchmark, train19, unlabelled3k, distractors2k.

    Raises:
        InputError: one is missing.
    """
    names = (
        "wonders11.tar",
        "groundtruth/wonders11/gnd_wonders11.pkl",
        "train19.tar",
        "unlabelled3k.tar",
        "distractors2k.tar",
    )
    folder = open_folder(uri)
    missing = [name for name in names if not folder.exists(name)]
    if missing:
        raise InputError(f"{folder.uri} lacks {', '.join(missing)}; the demo's real data are {', '.join(names)}")
    return Data(*(folder.address(name) for name in names))


def run(
    out: str, config: DemoConfig, *, data: str | None = None, force: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """Run the chain below `out`; the rows of its results table and the path of the report."""
    from iir_dist import embed, evaluate, ingest, report, whiten
    from iir_dist.index import build, search
    from iir_dist.index.plan import IndexConfig
    from iir_dist.models.encoder import EncoderConfig
    from iir_dist.models.encoder import run as make_encoder
    from iir_dist.train import finetune, pretrain
    from iir_dist.train.finetune_config import ClassBatches, FinetuneConfig
    from iir_dist.train.optim import Optimization
    from iir_dist.train.pretrain_config import PretrainConfig

    started = time.monotonic()
    root = open_folder(out)
    if isinstance(root, LocalFolder):
        os.environ.setdefault("IIR_CACHE", str(root.path / "cache"))
    photos = real_data(data) if data else world_data(out)

    def at(*parts: str) -> str:
        return root.address("/".join(parts))

    # 1. Raw photos to shards. Small shards, so that two workers share the work.
    for name, source, split in (
        ("benchmark", photos.benchmark, "db"), ("train", photos.train, "train"),
        ("unlabelled", photos.unlabelled, "train"), ("distractors", photos.distractors, "distractor"),
    ):  # fmt: skip
        settings = ingest.IngestConfig(split=split, shard_mb=8)
        truth = photos.groundtruth if name == "benchmark" else None
        ingest.run([source], at("images", name), settings, groundtruth_uri=truth, force=force)

    # 2. Four encoders.
    make_encoder(at("encoders", "classifier"), EncoderConfig(backbone="efficientnet_lite0", size=224), force=force)
    pretrain.run(
        [at("images", "unlabelled"), at("images", "train")], at("encoders", "contrastive"),
        PretrainConfig(
            encoder=EncoderConfig(backbone="resnet18", weights="random", size=128), crop=64, batch=64,
            steps=config.pretrain_steps, workers=config.workers, checkpoint_every=10,
            optim=Optimization(optimizer="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup_steps=5),
        ), force=force,
    )  # fmt: skip
    for name, size, projection in (("contrastive", 128, 512), ("classifier", 192, 1280)):
        finetune.run(
            [at("images", "train")], at("encoders", name), at("encoders", f"{name}-ap"),
            FinetuneConfig(
                projection=projection, size=size, batches=ClassBatches(classes=19, per_class=4), chunk=4,
                steps=config.finetune_steps,
                workers=config.workers, checkpoint_every=10,
            ), force=force,
        )  # fmt: skip

    # 3. Each searched exactly on the benchmark alone.
    runs = {
        "ImageNet classifier": "classifier", "contrastive": "contrastive", "contrastive + AP": "contrastive-ap",
        "ImageNet classifier + AP": "classifier-ap",
    }  # fmt: skip

    def measure(database: list[str], queries: str, name: str, settings: search.SearchConfig) -> None:
        search.run(database, [queries], at("rankings", name), settings, force=force)
        evaluate.run(
            at("rankings", name), at("images", "benchmark"), at("metrics", name), evaluate.EvaluateConfig(), force=force
        )

    for name in runs.values():
        vectors = at("embeddings", f"benchmark-{name}")
        embed.run(at("images", "benchmark"), at("encoders", name), vectors, embed.EmbedConfig(), force=force)
        measure([vectors], vectors, name, search.SearchConfig())

    # 4. The fine-tuned classifier, whitened, among distractors: exact search and a sharded index side by side.
    best, white = "classifier-ap", "classifier-ap-white"
    embed.run(
        at("images", "train"), at("encoders", best), at("embeddings", f"train-{best}"), embed.EmbedConfig(), force=force
    )
    # Half as many dimensions as training images at the most: a covariance needs more images than that.
    count = artifact.require(at("embeddings", f"train-{best}"), "embed")[1].counts["out"]
    dim = 256 if count >= 512 else 128
    whiten.run(
        at("embeddings", f"train-{best}"), at("encoders", best), at("encoders", white), whiten.WhitenConfig(dim=dim),
        force=force,
    )  # fmt: skip
    benchmark, distractors = at("embeddings", f"benchmark-{white}"), at("embeddings", f"distractors-{white}")
    embed.run(at("embeddings", f"benchmark-{best}"), at("encoders", white), benchmark, embed.EmbedConfig(), force=force)
    embed.run(at("images", "distractors"), at("encoders", white), distractors, embed.EmbedConfig(), force=force)
    build.run([benchmark, distractors], at("index"), IndexConfig(shards=config.shards), force=force)
    measure([benchmark], benchmark, white, search.SearchConfig())
    measure([benchmark, distractors], benchmark, f"{white}-distractors-exact", search.SearchConfig())
    measure([at("index")], benchmark, f"{white}-distractors-index", search.SearchConfig())
    runs |= {
        "… whitened": white, "… among distractors, exact": f"{white}-distractors-exact",
        "… among distractors, index": f"{white}-distractors-index",
    }  # fmt: skip

    # 5. One page.
    title = "wonders11, real photos" if data else "procedural landmark world"
    report.run(
        [at("metrics", name) for name in runs.values()], [at("images", "benchmark"), at("images", "distractors")],
        at("report"), report.ReportConfig(title=f"Demo: {title}", labels=tuple(runs)), force=force,
    )  # fmt: skip
    log.info("demo: %.0f s", time.monotonic() - started)
    evaluations = [
        report.Evaluation(label, *_result(at("metrics", name))) for label, name in runs.items()
    ]  # fmt: skip
    return report.table_rows(evaluations), at("report", "index.html")


def _result(uri: str) -> tuple[Any, dict[str, Any]]:
    folder, _ = artifact.require(uri, "evaluate")
    return folder, json.loads(folder.read("metrics.json"))
