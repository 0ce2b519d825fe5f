"""Studies of the small world that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "title": "Tiny",
    "seeds": [0],
    "tests": ["benchmark"],
    "photos": {
        "benchmark": {"source": "benchmark.tar", "split": "db", "groundtruth": "groundtruth.json", "images": 40},
        "train": {"source": "train.tar", "images": 30},
        "distractors": {"source": "distractors.tar", "split": "distractor", "images": 16},
    },
    "starts": {"scratch": {"backbone": "resnet18", "weights": "random"}},
    "settings": {"size": 64},
    "trainings": {
        "ap": {
            "stage": "finetune", "photos": ["train"],
            "settings": {
                "projection": 32, "size": 32, "chunk": 8, "steps": 2, "workers": 1,
                "batches": {"name": "classes", "classes": 4, "per_class": 2}, "loss": {"name": "smooth_ap"},
            },
        },
        "classifier": {
            "stage": "classify", "photos": ["train"],
            "settings": {
                "size": 32, "chunk": 8, "steps": 2, "workers": 1, "loss": {"name": "arcface"},
                "batches": {"name": "balanced", "size": 16, "per_class": 2},
            },
        },
    },
    "arms": {"OTS": {"start": "scratch"}, "FT": {"start": "scratch", "finetuning": "ap"}},
    "hypotheses": [{"name": "H2", "a": "FT", "b": "OTS", "axis": "finetuning"}],
}  # fmt: skip


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The table [study] of a study of the small world: two arms, two steps."""
    import json

    values: dict[str, Any] = json.loads(json.dumps(TINY))
    return values


@pytest.fixture
def write_config(tmp_path: Path) -> Any:
    """write_config(values): the path of a TOML file with them as its table [study]."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "study.toml"
        path.write_text("".join(_lines("study", values)))
        return path

    return write


def _lines(name: str, table: dict[str, Any]) -> list[str]:
    return [f"[{name}]\n", *(f"{key} = {_value(value)}\n" for key, value in table.items() if value is not None)]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f'"{k}" = {_value(v)}' for k, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    import json

    return json.dumps(value)
