"""Published figures of Oxford and Paris, for beside ours where set and protocol are the same.

`published.csv` holds mAP in per cent with queries cropped, as the source prints it: a paper, or its authors' repository.
Stage 1 searches once with one global vector an image, stage 2 re-ranks or matches local features. A set is known by the
fingerprint of its ground truth, so that no other one, however it is named, gets figures that are not its own.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

SETS = {
    "f152b5f96f5ccc680876b98bb8db74e42f05658d4de6a1e1859502e9301e5815": "roxford5k",
    "4af7462869229f9bd773c8f605ad16f97fe3a7e873b79536fd9c2f673f1ba29a": "rparis6k",
    "55e26013bf9448031c4d4e76c9b06b5b478776e3cfbcc52181169359b4505e37": "oxford5k",
    "26c1b35f620f3c5cff03e5efc56404746650b01346bc29fbc0e63de43286aa8a": "paris6k",
}
"""Fingerprint of a published ground truth -> the set."""
TITLES = {"roxford5k": "ROxford5k", "rparis6k": "RParis6k", "oxford5k": "Oxford5k", "paris6k": "Paris6k"}
MILLION = 1_001_001
"""Distractors of revisitop1m."""


@dataclass(frozen=True, slots=True)
class Published:
    """One published figure; `map` is a fraction."""

    method: str
    descriptor: str
    trained_on: str
    source: str
    stages: int
    map: float


def set_of(protocol: Mapping[str, Any]) -> str | None:
    """Which of the published sets an evaluation is of, by its protocol; None for all others."""
    return SETS.get(protocol["ground_truth"]["fingerprint"])


def beside(protocol: Mapping[str, Any], level: str) -> list[Published]:
    """Published figures that an evaluation may be put beside: of its set, level and distractors.

    None where it differs from the published protocol in anything; re-ranking alone asks for those of two stages.
    """
    name = set_of(protocol)
    differs = {d["choice"] for d in protocol["differences"]}
    if name is None or differs - {"re-ranking"} or protocol["distractors"] not in (0, MILLION):
        return []
    column = name if level == "original" else f"{name} {level}"
    column += " +1m" if protocol["distractors"] else ""
    stages = 2 if differs else 1
    text = resources.files("iir_dist.report").joinpath("published.csv").read_text()
    return [
        Published(row["method"], row["descriptor"], row["trained on"], row["source"], stages, float(row[column]) / 100)
        for row in csv.DictReader(text.splitlines())
        if row.get(column) and int(row["stages"]) == stages
    ]
