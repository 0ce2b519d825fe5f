"""From a config to the stages that it takes, as a graph; pure, and without torch or Ray.

A stage that is given the same things is the same stage: its folder is named by a hash of what it is given, so arms share what
they have in common, and a changed config makes anew only what depends on the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iir_dist.config import fingerprint
from iir_dist.study import config as conf
from iir_dist.study.config import Arm, Settings, StudyConfig, Training

FOLDERS = {
    "ingest": "images", "subset": "images", "encoder": "encoders", "reading": "encoders", "pretrain": "encoders",
    "classify": "encoders", "finetune": "encoders", "whiten": "encoders", "embed": "embeddings", "index": "indexes",
    "search": "rankings", "rerank": "rankings", "evaluate": "metrics", "overlap": "overlap", "near": "overlap",
}  # fmt: skip
"""Where a stage writes, below the study's folder."""
_TRAINING = frozenset({"checkpoint_every", "keep", "workers", "loaders", "pixels_gb", "tensorboard"})
EXECUTION = {
    "ingest": frozenset({"max_rejected"}), "pretrain": _TRAINING - {"pixels_gb"}, "classify": _TRAINING, "finetune": _TRAINING,
    "embed": frozenset({"workers"}),
}  # fmt: skip
"""Keys that change how a stage runs and not what it writes (`execution` of its config, which cannot be read without torch)."""


@dataclass(frozen=True, slots=True)
class Node:
    """One run of a stage.

    Args:
        key: its folder, relative to the study's.
        inputs: keys of other nodes by role.
        sources: what comes from outside by role: paths below --data, addresses, names of known sets.
        config: keys of the stage's table that are not defaults.
        photos, size, backbone, steps: what its cost is estimated from; photos is None where nobody knows.
    """

    key: str
    stage: str
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    photos: int | None = 0
    size: int = 0
    backbone: str = ""
    steps: int = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of the nodes that must be done before."""
        return tuple(dict.fromkeys(key for keys in self.inputs.values() for key in keys))


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluation and what it says something of.

    Args:
        part: arm, distractors, ablation or leaderboard.
        name: of the arm or entry.
        axis, value: of an ablation.
        metrics: key of the node.
    """

    part: str
    name: str
    seed: int
    test: str
    metrics: str
    search: str = "exact"
    axis: str = ""
    value: Any = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Nodes, each behind those that it needs; and the evaluations by what they are for."""

    nodes: tuple[Node, ...]
    measured: tuple[Measured, ...]

    def of(self, part: str) -> list[Measured]:
        """The evaluations of one part of the result."""
        return [m for m in self.measured if m.part == part]


def plan(config: StudyConfig) -> Plan:
    """Expand a study.

    >>> from iir_dist.study.config import StudyConfig
    >>> photos = {"t": {"source": "t.tar", "split": "db", "groundtruth": "t.json"}}
    >>> arms = {"A": {"start": "r"}, "B": {"start": "r"}}
    >>> starts = {"r": {"backbone": "resnet18", "weights": "random"}}
    >>> study = StudyConfig(photos=photos, starts=starts, arms=arms, tests=["t"])
    >>> [node.stage for node in plan(study).nodes]
    ['ingest', 'encoder', 'embed', 'search', 'evaluate']
    """
    return _Planner(config).run()


class _Planner:
    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        self.measured: list[Measured] = []

    def run(self) -> Plan:
        config = self.config
        for test in config.tests:
            self._ingest(test)
        for seed in config.seeds:
            for name, arm in config.arms.items():
                encoder = self._encoder(arm, conf.settings_of(config, arm.settings), seed)
                for test in config.tests:
                    self._measure("arm", name, seed, test, self._searched(encoder, test))
                    if (
                        config.distractors
                        and seed == config.seeds[0]
                        and name in (config.distractor_arms or config.arms)
                    ):
                        self._among(name, seed, test, encoder)
        self._ablations()
        self._leaderboard()
        self._near()
        return Plan(tuple(self.nodes.values()), tuple(self.measured))

    # -------------------------------------------------------------------------------------------- the graph

    def _add(self, stage: str, name: str, **parts: Any) -> Node:
        node = Node("", stage, **parts)
        decisive = {k: v for k, v in node.config.items() if k not in EXECUTION.get(stage, ())}
        given = fingerprint([stage, node.inputs, node.sources, decisive])
        key = f"{FOLDERS[stage]}/{name}-{given[:8]}"
        return self.nodes.setdefault(key, Node(key, stage, **parts))

    def _ingest(self, name: str) -> Node:
        photos = self.config.photos[name]
        sources = {"source": photos.source} | ({"groundtruth": photos.groundtruth} if photos.groundtruth else {})
        split = {} if photos.known else {"split": photos.split}
        return self._add("ingest", name, sources=sources, config={**split, **photos.ingest}, photos=photos.count)

    def _images(self, names: Sequence[str], labels: float = 1.0) -> list[Node]:
        found = [self._ingest(name) for name in names]
        if labels == 1:
            return found
        return [
            self._add(
                "subset", f"{name}-{labels:g}", inputs={"images": (node.key,)}, config={"fraction": labels},
                photos=node.photos and round(labels * node.photos),
            )
            for name, node in zip(names, found, strict=True)
        ]  # fmt: skip

    # -------------------------------------------------------------------------------------------- networks

    def _encoder(self, arm: Arm, settings: Settings, seed: int, other: Mapping[str, Training] | None = None) -> Node:
        """The network of an arm, read by `settings`; `other` trainings take the place of the arm's own."""
        start = self.config.starts[arm.start]
        base = self.config.settings
        table = {
            "backbone": start.backbone, "pooling": settings.pooling, "p": settings.p, "size": base.size, "resize": base.resize,
        }  # fmt: skip
        sources = {}
        if start.weights in ("imagenet", "random"):
            table["weights"] = start.weights
        else:
            sources["weights"] = start.weights
        if start.weights == "random":
            table["seed"] = seed
        name = arm.start + (f"-s{seed}" if start.weights == "random" else "")
        node = self._add("encoder", name, sources=sources, config=table, backbone=start.backbone)
        for part in conf.TRAININGS:
            chosen = getattr(arm, part)
            if chosen is not None:
                training = (other or {}).get(part, self.config.trainings[chosen])
                node = self._trained(node, f"{arm.start}-{_chain(arm, part)}-s{seed}", training, seed, start.backbone)
        return self._read(node, settings, start.backbone)

    def _trained(self, init: Node, name: str, training: Training, seed: int, backbone: str) -> Node:
        images = self._images(training.photos, training.labels)
        table = {**training.settings, "seed": seed}
        tests = tuple(self._ingest(test).key for test in self.config.tests)
        whole = tuple(self._ingest(photos).key for photos in training.photos)
        overlap = self._add(
            "overlap", "+".join(training.photos), inputs={"images": whole, "tests": tests},
            config={"allow": True} if self.config.allow_overlap else {},
        )  # fmt: skip
        inputs = {"images": tuple(n.key for n in images), "init": (init.key,), "overlap": (overlap.key,)}
        size, batch = _view(training)
        return self._add(
            training.stage, name, inputs=inputs, config=table, steps=int(table.get("steps", 0)), photos=batch, size=size,
            backbone=backbone,
        )  # fmt: skip

    def _read(self, node: Node, settings: Settings, backbone: str) -> Node:
        base = {key: getattr(self.config.settings, key) for key in ("size", "resize")}
        wanted = {key: getattr(settings, key) for key in ("size", "resize", "scales", "scale_rule", "flip")}
        usual = {**base, "scales": (1.0,), "scale_rule": "mean", "flip": False}
        table = {key: list(v) if isinstance(v, tuple) else v for key, v in wanted.items() if v != usual[key]}
        if table:
            node = self._add("reading", _stem(node), inputs={"encoder": (node.key,)}, config=table, backbone=backbone)
        whitening = settings.whitening
        if whitening.method == "none":
            return node
        assert self.config.whitening_photos is not None
        vectors = self._embedded(node, self.config.whitening_photos)
        images = self._ingest(self.config.whitening_photos).key
        inputs = {"encoder": (node.key,), "embeddings": (vectors.key,)}
        if whitening.method == "lw":
            inputs["images"] = (images,)
        table = {k: v for k, v in whitening.model_dump().items() if v is not None}
        return self._add("whiten", _stem(node), inputs=inputs, config=table, backbone=backbone)

    # -------------------------------------------------------------------------------------------- searching

    def _embedded(self, encoder: Node, photos: str) -> Node:
        """Vectors of a set; those of a whitened network are made from the vectors of the network before."""
        table = self.config.embed
        name = f"{_stem(encoder)}-{photos}"
        if encoder.stage == "whiten":
            before = self._embedded(self.nodes[encoder.inputs["encoder"][0]], photos)
            inputs = {"images": (before.key,), "encoder": (encoder.key,)}
            return self._add("embed", name, inputs=inputs, config=table)
        images = self._ingest(photos)
        size, scales = self._pixels(encoder)
        return self._add(
            "embed", name, inputs={"images": (images.key,), "encoder": (encoder.key,)}, config=table, photos=images.photos,
            size=round(size * sum(s * s for s in scales) ** 0.5), backbone=encoder.backbone,
        )  # fmt: skip

    def _pixels(self, encoder: Node) -> tuple[int, tuple[float, ...]]:
        table = encoder.config if encoder.stage == "reading" else {}
        twice = 2 if table.get("flip") else 1
        return int(table.get("size", self.config.settings.size)), tuple(table.get("scales", (1.0,))) * twice

    def _searched(self, encoder: Node, test: str, rerank: Mapping[str, Any] | None = None) -> Node:
        vectors = self._embedded(encoder, test)
        return self._ranked((vectors.key,), vectors, {}, test, rerank)

    def _ranked(
        self, database: tuple[str, ...], queries: Node, table: Mapping[str, Any], test: str,
        rerank: Mapping[str, Any] | None = None,
    ) -> Node:  # fmt: skip
        name = _stem(queries)
        inputs = {"database": database, "queries": (queries.key,)}
        rankings = self._add("search", name, inputs=inputs, config=table)
        if rerank is not None:
            rankings = self._add("rerank", name, inputs={"rankings": (rankings.key,), **inputs}, config=rerank)
        inputs = {"rankings": (rankings.key,), "groundtruth": (self._ingest(test).key,)}
        return self._add("evaluate", name, inputs=inputs)

    def _among(self, name: str, seed: int, test: str, encoder: Node) -> None:
        """Among distractors, exactly and by an index."""
        queries = self._embedded(encoder, test)
        database = (queries.key, *(self._embedded(encoder, photos).key for photos in self.config.distractors))
        self._measure("distractors", name, seed, test, self._ranked(database, queries, {}, test))
        index = self._add("index", _stem(queries), inputs={"embeddings": database}, config=self.config.index)
        found = self._ranked((index.key,), queries, {}, test)
        self._measure("distractors", name, seed, test, found, search="index")

    def _measure(self, part: str, name: str, seed: int, test: str, node: Node, **more: Any) -> None:
        self.measured.append(Measured(part, name, seed, test, node.key, **more))

    # -------------------------------------------------------------------------------------------- beside the arms

    def _ablations(self) -> None:
        config, seed = self.config, self.config.seeds[0]
        for ablation in config.ablations:
            for name in ablation.arms:
                arm = config.arms[name]
                own = conf.value_at(config, arm, ablation.axis)
                for value in (own, *(v for v in ablation.values if v != own)):
                    encoder = self._encoder(*self._varied(arm, ablation.axis, value, seed))
                    for test in config.tests:
                        found = self._searched(encoder, test)
                        self._measure("ablation", name, seed, test, found, axis=ablation.axis, value=value)

    def _varied(self, arm: Arm, axis: str, value: Any, seed: int) -> tuple[Arm, Settings, int, dict[str, Training]]:
        part, _, path = axis.partition(".")
        if part not in conf.TRAININGS:
            return arm, conf.settings_of(self.config, {**arm.settings, part: value}), seed, {}
        training = conf.changed(self.config.trainings[getattr(arm, part)], path, value)
        return arm, conf.settings_of(self.config, arm.settings), seed, {part: training}

    def _leaderboard(self) -> None:
        seed = self.config.seeds[0]
        for entry in self.config.leaderboard:
            arm = self.config.arms[entry.arm]
            if entry.finetuning is not None:
                arm = arm.model_copy(update={"finetuning": entry.finetuning})
            encoder = self._encoder(arm, conf.settings_of(self.config, {**arm.settings, **entry.settings}), seed)
            for test in self.config.tests:
                self._measure("leaderboard", entry.name, seed, test, self._searched(encoder, test, entry.rerank))

    def _near(self) -> None:
        """Training photos that look like test photos, by the network of the first arm."""
        if not self.config.near_duplicates:
            return
        seed, arm = self.config.seeds[0], next(iter(self.config.arms.values()))
        encoder = self._encoder(arm, conf.settings_of(self.config, arm.settings), seed)
        trained = dict.fromkeys(name for photos in self._trained_on() for name in photos)
        for test in self.config.tests:
            for name in trained:
                inputs = {"train": (self._embedded(encoder, name).key,), "test": (self._embedded(encoder, test).key,)}
                self._add("near", f"{name}-{test}", inputs=inputs, config={"similarity": self.config.near_duplicates})

    def _trained_on(self) -> Iterator[tuple[str, ...]]:
        """Photos of the trainings that are run."""
        chosen = {getattr(arm, part) for arm in self.config.arms.values() for part in conf.TRAININGS}
        chosen |= {entry.finetuning for entry in self.config.leaderboard}
        for name, training in self.config.trainings.items():
            if name in chosen:
                yield training.photos


def _chain(arm: Arm, until: str) -> str:
    """Names of an arm's trainings up to one of them."""
    parts = conf.TRAININGS[: conf.TRAININGS.index(until) + 1]
    return "-".join(getattr(arm, part) for part in parts if getattr(arm, part))


def _stem(node: Node) -> str:
    """A node's name without folder and hash."""
    return node.key.partition("/")[2].rpartition("-")[0]


def _view(training: Training) -> tuple[int, int]:
    """px of the photos of a training and photos of a step; 0 where the config does not say, which then is a default."""
    table = training.settings
    if training.stage == "pretrain":
        return int(table.get("crop", 0)), int(table.get("batch", 0))
    batches = table.get("batches", {})
    count = batches.get("size") or batches.get("classes", 0) * batches.get("per_class", 0) or batches.get("tuples", 0)
    return int(table.get("size", 0)), int(count)
