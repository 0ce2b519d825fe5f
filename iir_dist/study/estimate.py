"""What a plan will cost and what must be there before it: arithmetic on stated constants, not promises.

The cost of a stage is the pixels that go through a network, times the passes, times the seconds of a megapixel, and what it
takes to start. The constants of the CPU are from runs of this project on two cores; those of the GPU follow from the
operations of a network and an assumed rate, and nothing of them was measured in a training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iir_dist.data import catalog
from iir_dist.study.config import PhotoSet, StudyConfig
from iir_dist.study.plan import Node, Plan

GFLOP_PER_MEGAPIXEL = {
    "efficientnet_lite0": 16.0, "efficientnet_lite1": 24.0, "efficientnet_lite2": 34.0, "resnet18": 72.0, "resnet34": 146.0,
    "resnet50": 163.0, "resnet101": 311.0, "convnext_tiny": 178.0, "convnext_small": 346.0, "convnext_base": 613.0,
}  # fmt: skip
"""Of one forward pass, two operations for a multiplication and addition; from the published operations at 224 px."""
CPU_SECONDS_PER_MEGAPIXEL = {"efficientnet_lite0": 0.285, "resnet18": 0.39}
"""Of one forward pass, float32, two cores: Lite0 embeds 70 photos/s of 224 px, ResNet-18 15 of 480 px."""
CPU_GFLOP_PER_SECOND = 150.0
"""Of other networks on two cores; as ResNet-18."""
GPU_GFLOP_PER_SECOND = 60_000.0
"""Assumed of one GPU: ResNet-50 embeds 844 photos/s of 768 x 1024 px on an H100 in bfloat16, which is 110 TFLOP/s; about half of it
is left where photos must be decoded, or a training keeps its gradients."""
PASSES = {"embed": 1.0, "finetune": 4.0, "classify": 7.0, "pretrain": 10.0}
"""Forward passes that a photo costs. A backward pass counts two; fine-tuning embeds a batch twice; pretraining has two views; and
batch norm that takes statistics makes a pass about one and two thirds as dear."""
START = {"embed": 13.0, "finetune": 25.0, "classify": 25.0, "pretrain": 25.0, "index": 10.0, "ingest": 3.0}
"""Seconds until the first photo; of others 2."""
INGEST_PER_SECOND = 2000.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Photos that go through a network and seconds; None where the config does not say how many."""

    photos: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Needed:
    """A file or set that comes from outside: what it is, where from, its size in bytes, and what else is known."""

    name: str
    address: str
    bytes: int | None
    exact: bool
    remark: str = ""


def cost(node: Node, machine: str) -> Cost:
    """Of one node."""
    start = START.get(node.stage, 2.0)
    if node.stage == "ingest":
        return Cost(node.photos, None if node.photos is None else start + node.photos / INGEST_PER_SECOND)
    if node.stage not in PASSES:
        return Cost(0, start)
    if not node.backbone:  # vectors that are there, through a whitening
        return Cost(0, 2.0)
    if not node.size:
        return Cost(None, None)
    if node.photos is None or (node.stage != "embed" and not (node.steps and node.photos)):
        return Cost(None, None)
    photos = node.photos * (1 if node.stage == "embed" else node.steps)
    megapixels = photos * node.size**2 / 1e6
    return Cost(photos, start + megapixels * PASSES[node.stage] * seconds_per_megapixel(node.backbone, machine))


def seconds_per_megapixel(backbone: str, machine: str) -> float:
    """Of one forward pass; networks that are not listed are taken for a ResNet-50."""
    gflop = GFLOP_PER_MEGAPIXEL.get(backbone, GFLOP_PER_MEGAPIXEL["resnet50"])
    if machine == "gpu":
        return gflop / GPU_GFLOP_PER_SECOND
    return CPU_SECONDS_PER_MEGAPIXEL.get(backbone, gflop / CPU_GFLOP_PER_SECOND)


def total(plan: Plan, machine: str) -> str:
    """Of all nodes whose cost is known, one after another, in words."""
    return _duration(sum(cost(node, machine).seconds or 0.0 for node in plan.nodes))


def needed(config: StudyConfig) -> list[Needed]:
    """What a study takes from outside, each once: photos, ground truths, weights."""
    found: dict[str, Needed] = {}
    for name in _used(config):
        for item in _of_photos(name, config.photos[name]):
            found.setdefault(item.address, item)
    for start in {arm.start: config.starts[arm.start] for arm in config.arms.values()}.values():
        if start.weights not in ("imagenet", "random"):
            remote = start.weights.startswith(("http://", "https://"))
            remark = "" if remote else "below --data"
            found.setdefault(start.weights, Needed(f"weights of {start.backbone}", start.weights, None, False, remark))
    return list(found.values())


def _used(config: StudyConfig) -> list[str]:
    names = [*config.tests, *config.distractors]
    names += [config.whitening_photos] if config.whitening_photos else []
    chosen = {part for arm in config.arms.values() for part in (arm.pretraining, arm.finetuning) if part}
    chosen |= {entry.finetuning for entry in config.leaderboard if entry.finetuning}
    names += [photos for name, training in config.trainings.items() if name in chosen for photos in training.photos]
    return list(dict.fromkeys(names))


def _of_photos(name: str, photos: PhotoSet) -> list[Needed]:
    dataset = photos.known
    if dataset is None:
        remark = "" if "://" in photos.source else "below --data"
        items = [Needed(f"photos {name}", photos.source, None, False, remark)]
        if photos.groundtruth:
            items.append(Needed(f"ground truth of {name}", photos.groundtruth, None, False, remark))
        return items
    items = []
    if dataset.groundtruth:
        items.append(
            Needed(f"ground truth of {name}", dataset.groundtruth.url, dataset.groundtruth.size, True, dataset.licence)
        )
    items += [Needed(f"list of {name}", file.url, file.size, True, dataset.licence) for file in dataset.lists]
    if not dataset.archives:
        items.append(Needed(f"photos {name}", dataset.page, None, False, "published as lists of addresses alone"))
    elif len(dataset.archives) > catalog.LISTED_FILES:
        first, last = dataset.archives[0].url, dataset.archives[-1].url
        remark = f"{len(dataset.archives)} files, to {last}; {dataset.licence}"
        items.append(Needed(f"photos {name}", first, dataset.approximate_bytes, False, remark))
    else:
        share = dataset.approximate_bytes and dataset.approximate_bytes // len(dataset.archives)
        for archive in dataset.archives:
            size, exact = (archive.size, True) if archive.size else (share, False)
            items.append(Needed(f"photos {name}", archive.url, size, exact, dataset.licence))
    return items


# ------------------------------------------------------------------------------------------------ for people


def describe(plan: Plan, config: StudyConfig) -> str:
    """Every stage with its inputs and cost, and what must be there; for a terminal."""
    lines = [f"{config.title}: {len(plan.nodes)} stages, {len(plan.measured)} evaluations", ""]
    total, unknown = 0.0, 0
    for number, node in enumerate(plan.nodes, 1):
        found = cost(node, config.machine)
        total, unknown = total + (found.seconds or 0.0), unknown + (found.seconds is None)
        lines.append(f"{number:>4}  {node.stage:<9} {node.key}")
        given = [*_inputs(node.inputs), *(f"{role}: {source}" for role, source in node.sources.items())]
        lines += [f"      {'':<9} {text}" for text in given]
        if node.config:
            lines.append(f"      {'':<9} {', '.join(f'{key}={value}' for key, value in _flat(node.config).items())}")
        lines.append(f"      {'':<9} {_cost_in_words(node, found)}")
    lines += ["", f"Estimate for {_machine(config.machine)}: {_duration(total)} one after another" + (
        f", and {unknown} stages whose cost the config does not say" if unknown else ""
    ) + "; from constants, not from a run.", "", "Must be there, or is downloaded:"]  # fmt: skip
    items = needed(config)
    for item in items:
        size = "size not published" if item.bytes is None else f"{'' if item.exact else 'about '}{_bytes(item.bytes)}"
        if item.remark.startswith("below"):
            size = item.remark
        lines += [f"  {item.name}: {size}", f"    {item.address}"]
        if item.remark and item.remark != size:
            lines.append(f"    {item.remark}")
    known = sum(item.bytes or 0 for item in items)
    if known:
        lines.append(f"About {_bytes(known)} of those whose size is known.")
    return "\n".join(lines)


def _inputs(inputs: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{role}: {', '.join(keys)}" for role, keys in inputs.items()]


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _cost_in_words(node: Node, found: Cost) -> str:
    if found.seconds is None:
        return "cost not known: steps, batch, size or the number of photos are not in the config"
    photos = f"{found.photos:,} photos" if found.photos else ""
    steps = f"{node.steps:,} steps" if node.steps else ""
    passes = f"{PASSES[node.stage]:g} passes at {node.size} px" if node.stage in PASSES and node.size else ""
    return ", ".join(filter(None, [steps, photos, passes, f"about {_duration(found.seconds)}"]))


def _machine(machine: str) -> str:
    return "two CPU cores" if machine == "cpu" else "one GPU at an assumed 60 TFLOP/s"


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> _duration(7.2), _duration(600), _duration(36000)
    ('7 s', '10 min', '10 h')
    """
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.3g} GB" if size >= 1e8 else f"{size / 1e6:,.3g} MB"
