"""Ground truth as it is published, and nothing that runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iir_dist.data import groundtruth
from iir_dist.errors import GroundTruthError

LISTS: dict[str, Any] = {
    "imlist": ["d0", "d1", "d2", "d3"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"bbx": [0, 0, 10.5, 20], "easy": [0], "hard": [1], "junk": [3]},
        {"bbx": [1, 2, 3, 4], "easy": [], "hard": [2], "junk": []},
    ],
}


def write_pickle(path: Path, value: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def test_pickle_and_json_say_the_same(tmp_path: Path) -> None:
    truth = groundtruth.read(write_pickle(tmp_path / "gnd_x.pkl", LISTS))
    (tmp_path / "x.json").write_text(json.dumps(LISTS))
    assert truth == groundtruth.read(tmp_path / "x.json")
    assert truth.protocol == "revisited"
    assert truth.database == ("d0", "d1", "d2", "d3")
    assert truth.queries[0].labels == {"easy": ("d0",), "hard": ("d1",), "junk": ("d3",)}
    assert truth.queries[0].box == (0.0, 0.0, 10.5, 20.0)
    assert list(truth.levels()) == ["easy", "medium", "hard"]
    assert truth.images() == {"d0", "d1", "d2", "d3", "q0", "q1"}


def test_what_ingest_writes_reads_back(tmp_path: Path) -> None:
    truth = groundtruth.read(write_pickle(tmp_path / "gnd_x.pkl", LISTS))
    (tmp_path / "groundtruth.json").write_text(truth.to_json())
    assert groundtruth.read(tmp_path) == truth


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_arrays_are_admitted(tmp_path: Path, protocol: int) -> None:
    value = {**LISTS, "gnd": [{k: np.array(v) for k, v in entry.items()} for entry in LISTS["gnd"]]}
    value["gnd"][0]["bbx"] = [np.float64(v) for v in (0, 0, 10.5, 20)]
    assert groundtruth.read(write_pickle(tmp_path / "a.pkl", value, protocol)) == groundtruth.read(
        write_pickle(tmp_path / "b.pkl", LISTS)
    )


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Evil(os.system, "touch {path}"),
        Evil(eval, "open('{path}', 'w')"),
        Evil(open, "{path}", "w"),
        Evil(io.open_code, "{path}"),
        Evil(np.loadtxt, "{path}"),
        [Evil(os.mkdir, "{path}")],
    ],
)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, attack: Any) -> None:
    target = tmp_path / "ran"
    inner = attack[0] if isinstance(attack, list) else attack
    inner.call = inner.call[0], tuple(a.format(path=target) for a in inner.call[1])
    path = write_pickle(tmp_path / "gnd_x.pkl", {**LISTS, "extra": attack})
    with pytest.raises(GroundTruthError, match="only lists, dicts, strings, numbers and arrays"):
        groundtruth.read(path)
    assert not target.exists()


def test_an_object_array_cannot_smuggle_code(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    value = {**LISTS, "extra": np.array([Evil(os.mkdir, str(target))], dtype=object)}
    with pytest.raises(GroundTruthError, match="only lists"):
        groundtruth.read(write_pickle(tmp_path / "gnd_x.pkl", value))
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"imlist": None}, "expected a dict"),
        ({"qimlist": ["q0"]}, "1 query names but 2 entries"),
        ({"gnd": [1, 2]}, "must be a dict"),
        ({"gnd": [{"bbx": None}, {}]}, "no 'easy' lists"),
        ({"gnd": [{"easy": [9]}, {"easy": []}]}, "outside imlist"),
        ({"gnd": [{"easy": [-1]}, {"easy": []}]}, "outside imlist"),
        ({"gnd": [{"easy": [0], "bbx": [1, 2, 3]}, {"easy": []}]}, "x1 y1 x2 y2"),
        ({"gnd": [{"easy": [0], "bbx": [10, 10, 5, 30]}, {"easy": []}]}, "corners, not width"),
    ],
)
def test_wrong_structures_are_explained(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    with pytest.raises(GroundTruthError, match=part):
        groundtruth.read(write_pickle(tmp_path / "gnd_x.pkl", {**LISTS, **change}))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(GroundTruthError, match=r"no ground truth at .*nothing"):
        groundtruth.read(tmp_path / "nothing")
    with pytest.raises(GroundTruthError, match="no ground truth at"):
        groundtruth.read(tmp_path / "nothing.pkl")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(LISTS)[:-20])
    with pytest.raises(GroundTruthError, match="not a readable pickle"):
        groundtruth.read(tmp_path / "cut.pkl")
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(GroundTruthError, match="not a ground truth"):
        groundtruth.read(tmp_path / "x.json")


def test_original_text_files(tmp_path: Path) -> None:
    (tmp_path / "gate_1_query.txt").write_text("oxc1_gate_000013 1.5 2 30 40\n")
    (tmp_path / "gate_1_good.txt").write_text("gate_000013\ngate_000002\ngate_000002\n")  # Oxford repeats names
    (tmp_path / "gate_1_ok.txt").write_text("")
    (tmp_path / "gate_1_junk.txt").write_text("gate_000009\n")
    truth = groundtruth.read(tmp_path)
    (query,) = truth.queries
    assert (query.name, query.image, query.box) == ("gate_1", "gate_000013", (1.5, 2.0, 30.0, 40.0))
    assert query.labels == {"good": ("gate_000013", "gate_000002"), "ok": (), "junk": ("gate_000009",)}
    assert (truth.protocol, truth.database, list(truth.levels())) == ("original", None, ["original"])
    (tmp_path / "gate_1_ok.txt").unlink()
    with pytest.raises(GroundTruthError, match="gate_1_ok"):
        groundtruth.read(tmp_path)


def test_real_sets_have_their_published_sizes(shared: Path) -> None:
    truths = {
        name: groundtruth.read(shared / "groundtruth" / name)
        for name in (
            "revisitop/gnd_roxford5k.pkl",
            "revisitop/gnd_rparis6k.pkl",
            "oxford5k_gt_files",
            "paris6k_gt_files",
        )
    }
    sizes = [(len(t.queries), len(t.database or ())) for t in truths.values()]
    assert sizes == [(70, 4993), (70, 6322), (55, 0), (55, 0)]
    for truth in truths.values():  # in the original sets the query is one of the good images; in the revisited in none
        inside = {q.image in {n for names in q.labels.values() for n in names} for q in truth.queries}
        assert inside == {truth.protocol == "original"}


def test_a_set_of_one_difficulty_has_one_level(shared: Path) -> None:
    assert list(groundtruth.read(shared / "groundtruth/wonders11/gnd_wonders11.pkl").levels()) == ["easy"]


def test_match_by_unique_last_component() -> None:
    available = ["oxford/all_souls_1", "oxford/new_1", "paris/new_1", "plain"]
    assert groundtruth.match(["all_souls_1", "new_1", "plain", "none"], available) == {
        "all_souls_1": "oxford/all_souls_1", "plain": "plain"
    }  # fmt: skip
