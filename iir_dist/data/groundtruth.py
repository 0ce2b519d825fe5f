"""Ground truth of retrieval benchmarks: who asks, what is right, what is ignored.

Read as published: the revisited pickles (`imlist`, `qimlist`, `gnd` with `bbx`, `easy`, `hard`, `junk`), the same
structure as JSON, the original Oxford/Paris text files (`*_query.txt`, `*_good.txt`, `*_ok.txt`, `*_junk.txt`), tables
of a set of one's own (`groundtruth_tables`), and the `groundtruth.json` that ingest writes. A pickle is code, so it is
read by `pickles`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iir_dist.data import groundtruth_tables, pickles
from iir_dist.errors import GroundTruthError, InputError, NotFoundError
from iir_dist.storage import Folder, open_folder, split_uri

Protocol = Literal["revisited", "original", "custom"]
FILE = "groundtruth.json"

LEVELS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "revisited": {
        "easy": (("easy",), ("junk", "hard")),
        "medium": (("easy", "hard"), ("junk",)),
        "hard": (("hard",), ("junk", "easy")),
    },
    "original": {"original": (("good", "ok"), ("junk",))},
    "custom": {"custom": (("positive",), ("ignored",))},
}
"""protocol -> level -> (labels that are positive, labels that are ignored)."""


@dataclass(frozen=True, slots=True)
class Query:
    """One query: its image, the box of the thing in it (x1 y1 x2 y2 in px, upright), and labelled image names."""

    name: str
    image: str
    box: tuple[float, float, float, float] | None
    labels: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """All queries of one benchmark.

    `database` names the images to search where the ground truth lists them (revisited), else None.
    """

    protocol: Protocol
    queries: tuple[Query, ...]
    database: tuple[str, ...] | None

    def levels(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """The levels that can be told apart: a set without any hard image has only the easy one."""
        levels = LEVELS[self.protocol]
        if self.protocol == "revisited" and not any(q.labels.get("hard") for q in self.queries):
            return {"easy": levels["easy"]}
        return levels

    def images(self) -> set[str]:
        """Every image name that it mentions."""
        names = set(self.database or ())
        for query in self.queries:
            names.add(query.image)
            names.update(*query.labels.values())
        return names

    def to_json(self) -> str:
        """As `groundtruth.json`; `read` gives it back unchanged."""
        queries = [
            {"name": q.name, "image": q.image, "bbx": q.box, **{k: list(v) for k, v in q.labels.items()}}
            for q in self.queries
        ]
        database = None if self.database is None else list(self.database)
        return json.dumps({"protocol": self.protocol, "imlist": database, "queries": queries}, indent=1)


def read(uri: str | Path) -> GroundTruth:
    """The ground truth at a `.pkl`, `.json`, `.jsonl` or `.csv` file, in a folder of original text files, or in an
    images artifact.

    Raises:
        GroundTruthError: there is none, or it is not one of these.
    """
    text = str(uri)
    try:
        if text.endswith((".pkl", ".pickle")):
            folder, name = split_uri(text)
            try:
                value = pickles.loads(folder.read(name), text)
            except InputError as error:
                raise GroundTruthError(str(error)) from error
            return _from_lists(value, text)
        if text.endswith(".json"):
            folder, name = split_uri(text)
            return _from_json(folder.read(name), text)
        if text.endswith(groundtruth_tables.ENDINGS):
            folder, name = split_uri(text)
            return _from_table(folder.read(name), text)
        folder = open_folder(text)
        if folder.exists(FILE):
            return _from_json(folder.read(FILE), folder.address(FILE))
        return _from_text_files(folder)
    except NotFoundError as error:
        raise GroundTruthError(f"no ground truth at {text}: {error}") from error


def match(names: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """For each of `names` the available one that it means: the same, else one with the same, unique last component.

    >>> match(["eiffel_1", "louvre_2"], ["paris/eiffel_1", "a/louvre_2", "b/louvre_2"])
    {'eiffel_1': 'paris/eiffel_1'}
    """
    known = set(available)
    last: dict[str, str | None] = {}
    for name in known:
        tail = name.rpartition("/")[2]
        last[tail] = None if tail in last else name
    found = {}
    for name in names:
        target = name if name in known else last.get(name.rpartition("/")[2])
        if target is not None:
            found[name] = target
    return found


def match_queries(queries: Iterable[Query], available: Collection[str]) -> list[str | None]:
    """For each query what is named as it is, or as its image is; None where neither is there."""
    queries = list(queries)
    by_name = match([q.name for q in queries], available)
    by_image = match([q.image for q in queries], available)
    return [by_name.get(q.name) or by_image.get(q.image) for q in queries]


# ------------------------------------------------------------------------------------------------ formats


def _from_lists(value: Any, where: str) -> GroundTruth:
    """The revisited structure: labels are positions in `imlist`."""
    try:
        imlist = [str(n) for n in value["imlist"]]
        qimlist = [str(n) for n in value["qimlist"]]
        gnd = list(value["gnd"])
    except (TypeError, KeyError, IndexError) as error:
        raise GroundTruthError(f"{where}: expected a dict with imlist, qimlist and gnd ({error!r})") from error
    if len(qimlist) != len(gnd):
        raise GroundTruthError(f"{where}: {len(qimlist)} query names but {len(gnd)} entries in gnd")
    if any(not isinstance(g, Mapping) for g in gnd):
        raise GroundTruthError(f"{where}: each entry of gnd must be a dict with bbx, easy, hard and junk")
    if not any("easy" in g for g in gnd):
        raise GroundTruthError(
            f"{where}: gnd has no 'easy' lists; only the revisited structure is read from such a file"
        )
    queries = []
    for name, entry in zip(qimlist, gnd, strict=True):
        labels = {}
        for label in ("easy", "hard", "junk"):
            positions = np.asarray(entry.get(label, []), dtype=np.int64).ravel()
            if len(positions) and not (positions.min() >= 0 and positions.max() < len(imlist)):
                raise GroundTruthError(f"{where}: {label} of query {name} points outside imlist ({len(imlist)} names)")
            labels[label] = tuple(imlist[i] for i in np.unique(positions))
        queries.append(Query(name, name, _box(entry.get("bbx"), f"{where}: query {name}"), labels))
    return GroundTruth("revisited", tuple(queries), tuple(imlist))


def _from_json(data: bytes, where: str) -> GroundTruth:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise GroundTruthError(f"{where} is not JSON: {error}") from error
    if isinstance(value, dict) and "gnd" in value:
        return _from_lists(value, where)
    try:
        protocol: Protocol = value["protocol"]
        labels = sorted({label for level in LEVELS[protocol].values() for group in level for label in group})
        queries = tuple(
            Query(
                q["name"], q["image"], _box(q["bbx"], f"{where}: query {q['name']}"),
                {label: tuple(map(str, q.get(label, ()))) for label in labels},
            )
            for q in value["queries"]
        )  # fmt: skip
        database = None if value["imlist"] is None else tuple(map(str, value["imlist"]))
    except (TypeError, KeyError) as error:
        raise GroundTruthError(f"{where} is not a ground truth: {error!r} is missing or of the wrong kind") from error
    return GroundTruth(protocol, queries, database)


def _from_table(data: bytes, where: str) -> GroundTruth:
    queries = tuple(
        Query(
            line.query, line.image, _box(line.box, f"{where}: query {line.query}"),
            {"ignored": line.ignored, "positive": line.positive},
        )
        for line in groundtruth_tables.parse(data, where)
    )  # fmt: skip
    return GroundTruth("custom", queries, None)


def _from_text_files(folder: Folder) -> GroundTruth:
    """The original annotation: `<query>_query.txt` holds an image (Oxford's prefixed with `oxc1_`) and a box."""
    queries = []
    for entry in folder.list():
        if "/" in entry.name or not entry.name.endswith("_query.txt"):
            continue
        name = entry.name.removesuffix("_query.txt")
        words = folder.read(entry.name).decode().split()
        if len(words) != 5:
            raise GroundTruthError(
                f"{folder.address(entry.name)}: expected an image name and four numbers, got {words}"
            )
        labels = {}
        for label in ("good", "ok", "junk"):
            lines = folder.read(f"{name}_{label}.txt").decode().split()
            labels[label] = tuple(dict.fromkeys(lines))  # Oxford's lists repeat some names
        box = _box(words[1:], folder.address(entry.name))
        queries.append(Query(name, words[0].removeprefix("oxc1_"), box, labels))
    if not queries:
        raise GroundTruthError(
            f"no ground truth at {folder.uri}: expected gnd_*.pkl, {FILE}, a .csv or .jsonl table, or a folder of "
            "*_query.txt files"
        )
    return GroundTruth("original", tuple(queries), None)


def _box(value: Sequence[Any] | None, where: str) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    try:
        x1, y1, x2, y2 = (float(v) for v in value)
    except (TypeError, ValueError) as error:
        raise GroundTruthError(f"{where}: a box is x1 y1 x2 y2 in px, got {value!r}") from error
    if not (x1 < x2 and y1 < y2):
        raise GroundTruthError(
            f"{where}: box {value!r} is empty; expected x1 < x2 and y1 < y2 (corners, not width, height)"
        )
    return x1, y1, x2, y2
