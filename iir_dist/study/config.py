"""`[study]`: photos, arms, what they share, and what is asked of them.

An arm is a start (backbone and weights), then perhaps a pretraining, then perhaps a fine-tuning. Arms differ in these and in
nothing else: input size, pooling, scales and whitening are those of `[study.settings]` for all, or the config is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from iir_dist.config import StageConfig, build, merge, read_toml
from iir_dist.data import catalog
from iir_dist.errors import ConfigError

Method = Literal["none", "pca", "lw"]
TRAININGS = ("pretraining", "finetuning")
"""Parts of an arm that are trainings."""
RERANKERS = ("qe", "dba", "diffusion", "superglobal")


class _Table(StageConfig):
    """Frozen, and unknown keys are refused."""


class PhotoSet(_Table):
    """`[study.photos.NAME]`: one set of photos."""

    source: str
    """Path below --data, s3:// or http(s):// address, or the name of a known set (`iir ingest --list`)."""
    split: Literal["db", "train", "distractor"] = "train"
    groundtruth: str | None = None
    """Of a test set; that of the catalog where the source is a known set."""
    images: int | None = Field(None, ge=1)
    """Photos in it, for the estimate of cost; those of the catalog where the source is a known set."""
    ingest: dict[str, Any] = Field({})
    """Other keys of [ingest]."""

    @property
    def known(self) -> catalog.Dataset | None:
        """The set of the catalog that it is."""
        return catalog.DATASETS.get(self.source.lower())

    @property
    def count(self) -> int | None:
        """Photos in it, as far as is known."""
        return self.images or (self.known and (self.known.listed or self.known.images)) or None

    @property
    def has_groundtruth(self) -> bool:
        """Whether it can be a test."""
        return bool(self.groundtruth or (self.known and self.known.groundtruth))


class Start(_Table):
    """`[study.starts.NAME]`: the network before any training of ours."""

    backbone: str
    weights: str = "imagenet"
    """"imagenet" (from a package), "random" (of the study's seed), a path below --data, or an https:// address."""


class Training(_Table):
    """`[study.trainings.NAME]`."""

    stage: Literal["pretrain", "classify", "finetune"]
    """classify is [finetune] with batch norm that learns its statistics, for networks without weights."""
    photos: tuple[str, ...] = Field(min_length=1)
    labels: float = Field(1.0, gt=0, le=1)
    """Fraction of each class's photos that it is given."""
    settings: dict[str, Any] = Field({})
    """Keys of [pretrain], or of [finetune]."""


class Whitening(_Table):
    """`whitening`: learnt on `study.whitening_photos`, for each network anew."""

    method: Method = "none"
    dim: int = Field(256, ge=1)
    power: float | None = None
    """Of pca; [whiten]'s default where not set."""
    shrinkage: float | None = None
    """Of lw."""


class Settings(_Table):
    """`[study.settings]`: how every network is read. These are the controlled variables."""

    pooling: str = "gem"
    p: float = 3.0
    size: int = 224
    """px of the photos that are searched."""
    resize: Literal["squash", "long"] = "squash"
    scales: tuple[float, ...] = (1.0,)
    scale_rule: Literal["mean", "max"] = "mean"
    flip: bool = False
    whitening: Whitening = Whitening()


class Arm(_Table):
    """`[study.arms]`: one way to make a network."""

    start: str
    pretraining: str | None = None
    finetuning: str | None = None
    settings: dict[str, Any] = Field({})
    """Where it departs from [study.settings]; refused unless that is an axis of the study."""


class Hypothesis(_Table):
    """`[[study.hypotheses]]`: is arm `a` better than arm `b`? They differ in `axis` and in nothing else."""

    name: str
    a: str
    b: str
    axis: str
    """pretraining (weights of the start, and what was pretrained), finetuning, backbone, or a key of [study.settings]."""


class Ablation(_Table):
    """`[[study.ablations]]`: arms again with another value of one thing; first seed only."""

    axis: str
    """A key of [study.settings], or a path such as finetuning.labels or finetuning.settings.steps."""
    values: tuple[Any, ...] = Field(min_length=1)
    """Beside the arm's own."""
    arms: tuple[str, ...] = Field(min_length=1)


class Entry(_Table):
    """`[[study.leaderboard]]`: an arm with whatever helps, in no comparison; first seed only."""

    name: str
    arm: str
    finetuning: str | None = None
    """In place of the arm's."""
    settings: dict[str, Any] = Field({})
    """On top of [study.settings]."""
    rerank: dict[str, Any] | None = None
    """Its name (qe, dba, diffusion, superglobal) and its keys."""


class StudyConfig(StageConfig):
    """`[study]`."""

    title: str = "Study"
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Of trainings and random starts; with the same seed, arms get the same batches."""
    axes: tuple[str, ...] = ("pretraining", "finetuning")
    """In what arms may differ."""
    machine: Literal["cpu", "gpu"] = "cpu"
    """What costs are estimated for (`estimate`)."""
    photos: dict[str, PhotoSet] = Field({})
    starts: dict[str, Start] = Field({})
    trainings: dict[str, Training] = Field({})
    settings: Settings = Settings()
    arms: dict[str, Arm] = Field({})
    tests: tuple[str, ...] = ()
    distractors: tuple[str, ...] = ()
    """Sets that arms are also searched among, exactly and by an index; first seed only."""
    distractor_arms: tuple[str, ...] = ()
    """Which arms; all where empty."""
    whitening_photos: str | None = None
    embed: dict[str, Any] = Field({})
    """Keys of [embed]."""
    index: dict[str, Any] = Field({})
    """Keys of [index], for the search among distractors."""
    near_duplicates: float = Field(0.0, ge=0, le=1)
    """Report training photos this similar (cosine) to a test photo, by the first arm's network; 0: not looked for."""
    allow_overlap: bool = False
    """Train although photos or landmarks of a test are trained on; the result says so."""
    hypotheses: tuple[Hypothesis, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    leaderboard: tuple[Entry, ...] = ()
    report_queries: int = Field(8, ge=0)
    """Queries whose lists the page shows."""
    fast: dict[str, Any] = Field({})
    """What --fast puts in place of keys above, for a quick look; trainings and settings are merged key by key."""
    execution: ClassVar[frozenset[str]] = frozenset({"fast", "machine"})


def read_config(file: str | Path, settings: Iterable[str] = (), *, fast: bool = False) -> StudyConfig:
    """The table [study] of a file; with `fast`, its `fast` table on top; then `settings`.

    Raises:
        ConfigError: a key is wrong, or arms are compared that differ in more than is asked.
    """
    tables = read_toml(file)
    if "study" not in tables:
        raise ConfigError(f"{file} has no table [study]; expected a study such as jobs/configs/study_cpu.toml")
    values = merge(tables["study"], [])
    if fast:
        if not values.get("fast"):
            raise ConfigError(f"{file} has no table [study.fast], which says what --fast leaves out")
        values = overlay(values, values["fast"])
    return checked(merge(values, settings))


def checked(values: Mapping[str, Any]) -> StudyConfig:
    """The study of a table.

    Raises:
        ConfigError: a key is wrong, or arms are compared that differ in more than is asked.
    """
    config = build(StudyConfig, values, "study")
    check(config)
    return config


def overlay(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `over` in their place; of `arms` all, of other tables key by key.

    >>> overlay({"trainings": {"x": 1, "y": 2}, "arms": {"A": {}}}, {"trainings": {"y": 3}, "arms": {"B": {}}})
    {'trainings': {'x': 1, 'y': 3}, 'arms': {'B': {}}}
    """
    merged = dict(values)
    for key, value in over.items():
        both = key != "arms" and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


# ------------------------------------------------------------------------------------------------ arms


def settings_of(config: StudyConfig, own: Mapping[str, Any]) -> Settings:
    """[study.settings] with an arm's or an entry's own on top; a whole table replaces a table."""
    return build(Settings, {**config.settings.model_dump(), **own}, "study.settings")


def variables(config: StudyConfig, arm: Arm) -> dict[str, Any]:
    """All that an arm's figures depend on, by the name of the variable."""
    start = config.starts[arm.start]
    return {
        "backbone": start.backbone,
        "pretraining": (start.weights, arm.pretraining),
        "finetuning": arm.finetuning,
        **settings_of(config, arm.settings).model_dump(),
    }


def differing(config: StudyConfig, a: Arm, b: Arm) -> dict[str, tuple[Any, Any]]:
    """Variables in which two arms differ, with the value of each."""
    one, two = variables(config, a), variables(config, b)
    return {name: (one[name], two[name]) for name in one if one[name] != two[name]}


# ------------------------------------------------------------------------------------------------ what is refused


def check(config: StudyConfig) -> None:
    """Refuse names that nothing has, and comparisons of more than one thing at a time.

    Raises:
        ConfigError: says what and where.
    """
    if not config.arms or not config.tests:
        raise ConfigError('a study needs arms and tests: [study.arms] and tests = ["NAME of a photo set"]')
    _names(config)
    arms = list(config.arms.items())
    for name, arm in arms[1:]:
        found = {k: v for k, v in differing(config, arms[0][1], arm).items() if k not in config.axes}
        if found:
            raise ConfigError(
                f"arms {arms[0][0]} and {name} differ in {_listed(found)}, which is controlled: set it in [study.settings] for "
                f"all, or declare it as what the study compares, axes = {[*config.axes, *found]}"
            )
    for question in config.hypotheses:
        found = differing(config, config.arms[question.a], config.arms[question.b])
        more = {k: v for k, v in found.items() if k != question.axis}
        if more:
            raise ConfigError(
                f"{question.name} compares {question.a} with {question.b} by {question.axis}, but they also differ in "
                f"{_listed(more)}; compare arms that differ in one thing"
            )
        if question.axis not in found:
            raise ConfigError(f"{question.name}: {question.a} and {question.b} do not differ in {question.axis}")


def _listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} ({a!r} and {b!r})" for name, (a, b) in found.items())


def _names(config: StudyConfig) -> None:
    def known(name: str | None, table: Mapping[str, Any], what: str, where: str) -> None:
        if name is not None and name not in table:
            raise ConfigError(f"{where} names {what} {name!r}; known: {', '.join(table) or 'none'}")

    for name, training in config.trainings.items():
        for photos in training.photos:
            known(photos, config.photos, "photos", f"trainings.{name}")
        if training.stage == "pretrain" and training.labels != 1:
            raise ConfigError(f"trainings.{name}.labels is for trainings that use labels; a pretrain does not")
        if "seed" in training.settings:
            raise ConfigError(f"trainings.{name}.settings.seed: the seeds of a study are study.seeds")
    for name, arm in config.arms.items():
        known(arm.start, config.starts, "start", f"arms.{name}")
        for part in TRAININGS:
            known(getattr(arm, part), config.trainings, "training", f"arms.{name}.{part}")
    for name in (*config.tests, *config.distractors):
        known(name, config.photos, "photos", "tests or distractors")
    known(config.whitening_photos, config.photos, "photos", "whitening_photos")
    if config.whitening_photos in config.tests:
        raise ConfigError(f"whitening_photos = {config.whitening_photos!r} is a test; learn whitening on another set")
    for test in config.tests:
        if not config.photos[test].has_groundtruth:
            raise ConfigError(f"photos.{test} has no groundtruth, so it cannot be a test")
    for name in config.distractor_arms:
        known(name, config.arms, "arm", "distractor_arms")
    for question in config.hypotheses:
        for arm_name in (question.a, question.b):
            known(arm_name, config.arms, "arm", f"hypothesis {question.name}")
    for ablation in config.ablations:
        for arm_name in ablation.arms:
            known(arm_name, config.arms, "arm", f"ablation of {ablation.axis}")
            value_at(config, config.arms[arm_name], ablation.axis)
        part, _, path = ablation.axis.partition(".")
        if part in TRAININGS and path.partition(".")[0] not in ("labels", "settings"):
            raise ConfigError(f"an ablation of {ablation.axis} is not one; known below {part}: labels, settings")
    for entry in config.leaderboard:
        known(entry.arm, config.arms, "arm", f"leaderboard entry {entry.name!r}")
        known(entry.finetuning, config.trainings, "training", f"leaderboard entry {entry.name!r}")
        if entry.rerank is not None and entry.rerank.get("name") not in RERANKERS:
            raise ConfigError(
                f"leaderboard entry {entry.name!r} re-ranks by {entry.rerank.get('name')!r}; known: {', '.join(RERANKERS)}"
            )
    labels = [*config.arms, *(entry.name for entry in config.leaderboard)]
    if len(set(labels)) < len(labels):
        raise ConfigError("an arm or leaderboard entry has the name of another one")
    whitened = [settings_of(config, own) for own in (*(a.settings for a in config.arms.values()),
                *(e.settings for e in config.leaderboard))]  # fmt: skip
    if any(s.whitening.method != "none" for s in whitened) and config.whitening_photos is None:
        raise ConfigError("whitening needs whitening_photos, the name of a set to learn it on")


def value_at(config: StudyConfig, arm: Arm, axis: str) -> Any:
    """The arm's own value of what an ablation changes.

    Raises:
        ConfigError: there is no such thing, or the config does not say its value.
    """
    part, _, path = axis.partition(".")
    if part not in TRAININGS:
        if path or part not in Settings.model_fields:
            raise ConfigError(
                f"{axis!r} is nothing to ablate; known: {', '.join(Settings.model_fields)}, and paths that begin with "
                f"{' or '.join(TRAININGS)}"
            )
        return settings_of(config, arm.settings).model_dump()[part]
    chosen = getattr(arm, part)
    if chosen is None:
        raise ConfigError(f"an ablation of {axis} names an arm that has no {part}")
    value: Any = config.trainings[chosen].model_dump()
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ConfigError(f"trainings.{chosen} does not set {path}, which an ablation changes; set it")
        value = value[key]
    return value


def changed(training: Training, path: str, value: Any) -> Training:
    """The training with another value at a dotted path."""
    values = training.model_dump()
    table = values
    *parents, last = path.split(".")
    for key in parents:
        table = table[key]
    table[last] = value
    return build(Training, values, "study.trainings")
