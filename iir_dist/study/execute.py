"""The stages of a plan, in order; one that fails keeps back only what needs it."""

from __future__ import annotations

import concurrent.futures
import importlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iir_dist.config import StageConfig, build, fingerprint
from iir_dist.errors import ConfigError, IirError
from iir_dist.study.plan import Node, Plan

log = logging.getLogger(__name__)

MODELS = {
    "ingest": "iir_dist.ingest:IngestConfig", "subset": "iir_dist.study.subset:SubsetConfig",
    "encoder": "iir_dist.models.encoder:EncoderConfig", "reading": "iir_dist.study.reading:ReadingConfig",
    "pretrain": "iir_dist.train.pretrain_config:PretrainConfig",
    "classify": "iir_dist.study.classify:ClassifyConfig",
    "finetune": "iir_dist.train.finetune_config:FinetuneConfig", "embed": "iir_dist.embed:EmbedConfig",
    "whiten": "iir_dist.whiten:WhitenConfig", "index": "iir_dist.index.plan:IndexConfig",
    "search": "iir_dist.index.search:SearchConfig", "evaluate": "iir_dist.evaluate:EvaluateConfig",
    "overlap": "iir_dist.study.near:OverlapConfig", "near": "iir_dist.study.near:NearConfig",
    "qe": "iir_dist.rerank.expansion:QueryExpansion", "dba": "iir_dist.rerank.augmentation:Augmentation",
    "diffusion": "iir_dist.rerank.diffusion:Diffusion", "superglobal": "iir_dist.rerank.superglobal:SuperGlobal",
}  # fmt: skip
"""Config of each stage, imported when it is needed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a study is written, and where its photos and weights are."""

    out: str
    data: str | None = None

    def of(self, key: str) -> str:
        """Address of a node's folder."""
        return f"{self.out.rstrip('/')}/{key}"

    def source(self, name: str, known: bool = False) -> str:
        """Address of what comes from outside."""
        if known or "://" in name or os.path.isabs(name):
            return name
        return os.path.join(self.data or ".", name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run went: seconds of each node that was done, why others failed, and which were not tried for their sake."""

    seconds: dict[str, float]
    failed: dict[str, str]
    skipped: tuple[str, ...]


def model_of(node: Node) -> StageConfig:
    """The checked config of a node.

    Raises:
        ConfigError: a key or value is wrong; says of which stage.
        ImportError: the stage needs a package that is not installed.
    """
    name = str(node.config.get("name", "")) if node.stage == "rerank" else node.stage
    if name not in MODELS:
        raise ConfigError(f"{node.key}: no stage is called {name!r}")
    module, _, attribute = MODELS[name].partition(":")
    try:
        model: type[StageConfig] = getattr(importlib.import_module(module), attribute)
        return build(model, node.config, name)
    except ConfigError as error:
        raise ConfigError(f"{node.key}: {error}") from error


def run_node(node: Node, place: Place) -> None:
    """Run one stage; at once where it is finished."""
    config: Any = model_of(node)
    out, given = place.of(node.key), {role: [place.of(key) for key in keys] for role, keys in node.inputs.items()}
    RUNNERS[node.stage](node, place, config, out, given)


def execute(plan: Plan, place: Place, *, jobs: int = 1) -> Outcome:
    """Run all nodes.

    Args:
        jobs: nodes that run at a time; more than one, each in a process of its own, on the cluster of RAY_ADDRESS.
    """
    if jobs > 1 and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"--jobs {jobs} without a cluster: stages on one machine would share its cores; set RAY_ADDRESS, or leave --jobs out"
        )
    state = _State(plan)
    for node, error, seconds in _done(state, place, jobs):
        state.finished(node, error, seconds)
    return Outcome(state.seconds, state.failed, tuple(state.skipped))


class _State:
    """Which nodes are left, and which of them can start."""

    def __init__(self, plan: Plan) -> None:
        self.left = {node.key: node for node in plan.nodes}
        self.total = len(self.left)
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []

    def ready(self) -> list[Node]:
        """Nodes all of whose inputs are done, in the order of the plan; those that never will be are dropped."""
        for key, node in list(self.left.items()):
            if any(need in self.failed or need in self.skipped for need in node.needs):
                self.skipped.append(key)
                del self.left[key]
        return [node for node in self.left.values() if all(need in self.seconds for need in node.needs)]

    def start(self, node: Node) -> None:
        """The node is running."""
        del self.left[node.key]
        log.info("study: %s (%d of %d)", node.key, self.total - len(self.left), self.total)

    def finished(self, node: Node, error: str | None, seconds: float) -> None:
        """The node has ended."""
        if error is None:
            self.seconds[node.key] = round(seconds, 3)
        else:
            self.failed[node.key] = error
            log.error("study: %s failed: %s", node.key, error)


def _done(state: _State, place: Place, jobs: int) -> Iterator[tuple[Node, str | None, float]]:
    if jobs == 1:
        while ready := state.ready():
            state.start(ready[0])
            yield ready[0], *_timed(ready[0], place)
        return
    running: dict[concurrent.futures.Future[tuple[str | None, float]], Node] = {}
    # A node that kills its process must not end the others: one process each, begun afresh.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while True:
            for node in state.ready()[: jobs - len(running)]:
                state.start(node)
                running[pool.submit(_in_a_process, context, node, place)] = node
            if not running:
                return
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), *future.result()


def _timed(node: Node, place: Place) -> tuple[str | None, float]:
    """Why it failed, if it did, and how long it took. An error that no stage raises on purpose is logged in full."""
    started = time.monotonic()
    try:
        run_node(node, place)
    except IirError as error:
        return str(error), time.monotonic() - started
    except Exception as error:  # a night's other stages are worth more than an early end
        log.exception("study: %s", node.key)
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return None, time.monotonic() - started


def _in_a_process(context: Any, node: Node, place: Place) -> tuple[str | None, float]:
    level = logging.getLogger("iir_dist").level
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_log, initargs=(level,)) as one:
        try:
            return one.submit(_timed, node, place).result()
        except BrokenProcessPool as error:
            return f"its process died: {error}", 0.0


def _log(level: int) -> None:
    """Log in a process of its own as the command does."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("iir_dist").setLevel(level)


# ------------------------------------------------------------------------------------------------ stage by stage

Runner = Callable[[Node, Place, Any, str, Mapping[str, list[str]]], object]


def _ingest(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist import ingest
    from iir_dist.data import catalog

    known = node.sources["source"].lower() in catalog.DATASETS
    truth = node.sources.get("groundtruth")
    source = place.source(node.sources["source"], known)
    return ingest.run([source], out, config, groundtruth_uri=place.source(truth) if truth else None)


def _encoder(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist import artifact
    from iir_dist.data.downloads import downloads_folder, fetch
    from iir_dist.models.encoder import run
    from iir_dist.storage import open_folder, sha256_of

    weights = node.sources.get("weights")
    if weights is not None:
        remote = weights.startswith(("http://", "https://"))
        # A folder for each address: several publishers call their file resnet50.pth.
        folder = downloads_folder() / "weights" / fingerprint(weights)[:12]
        path = Path(fetch(weights, folder) if remote else place.source(weights))
        there = artifact.read_manifest(open_folder(out))
        # The manifest holds a path; the same weights elsewhere, of another --data or machine, are the same encoder.
        if there and path.is_file() and there.inputs["weights"].fingerprint == sha256_of(path):
            return there
        config = config.model_copy(update={"weights": str(path)})
    return run(out, config)


def _subset(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.study.subset import run

    return run(given["images"][0], out, config)


def _reading(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.study.reading import run

    return run(given["encoder"][0], out, config)


def _pretrain(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.mine import neighbours
    from iir_dist.train.pretrain import run

    return run(given["images"], out, config, init=given["init"][0], find=neighbours)


def _classify(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.study.classify import run

    return run(given["images"], given["init"][0], out, config)


def _finetune(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.mine import mine
    from iir_dist.train.finetune import run

    return run(given["images"], given["init"][0], out, config, mine=mine)


def _embed(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist import embed

    return embed.run(given["images"][0], given["encoder"][0], out, config)


def _whiten(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist import whiten

    images = given.get("images", [None])[0]
    return whiten.run(given["embeddings"][0], given["encoder"][0], out, config, images_uri=images)


def _index(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.index.build import run

    return run(given["embeddings"], out, config)


def _search(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.index.search import run

    return run(given["database"], given["queries"], out, config)


def _rerank(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.rerank.stage import run

    return run(given["rankings"][0], given["database"], given["queries"], out, config)


def _evaluate(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist import evaluate

    return evaluate.run(given["rankings"][0], given["groundtruth"][0], out, config)


def _overlap(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.study.near import check

    return check(given["images"], given["tests"], out, config)


def _near(node: Node, place: Place, config: Any, out: str, given: Mapping[str, list[str]]) -> object:
    from iir_dist.study.near import search

    return search(given["train"][0], given["test"][0], out, config)


RUNNERS: dict[str, Runner] = {
    "ingest": _ingest, "subset": _subset, "encoder": _encoder, "reading": _reading, "pretrain": _pretrain,
    "classify": _classify, "finetune": _finetune, "embed": _embed, "whiten": _whiten, "index": _index, "search": _search,
    "rerank": _rerank, "evaluate": _evaluate, "overlap": _overlap, "near": _near,
}  # fmt: skip
"""How each stage is called."""
