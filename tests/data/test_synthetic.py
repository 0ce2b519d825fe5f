"""The procedural world is the same everywhere and fit to be a benchmark."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import numpy as np

from iir_dist.data import groundtruth, synthetic

TINY = synthetic.World(
    landmarks=2, queries=1, views=3, train_landmarks=2, train_views=2, unlabelled=3, distractors=4, side=64, seed=5
)
NAMES = ("benchmark.tar", "train.tar", "unlabelled.tar", "distractors.tar", "groundtruth.json")


def test_the_world_is_a_function_of_its_seed(tmp_path: Path) -> None:
    for name, world in (("a", TINY), ("b", TINY), ("c", dataclasses.replace(TINY, seed=6))):
        synthetic.write(world, tmp_path / name)
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        if name != "groundtruth.json":
            assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_layout_and_ground_truth_fit_together(world: Path) -> None:
    truth = groundtruth.read(world / "groundtruth.json")
    with tarfile.open(world / "benchmark.tar") as tar:
        names = {Path(n).stem for n in tar.getnames()}
    assert names == truth.images()
    assert len(truth.queries) == 8
    assert list(truth.levels()) == ["easy", "medium", "hard"]
    assert all(q.labels["easy"] for q in truth.queries)
    with tarfile.open(world / "train.tar") as tar:
        assert len({Path(n).parent for n in tar.getnames()}) == 5


def test_boxes_hold_the_landmark() -> None:
    """The drawing differs from the bare scene only inside the box."""
    drawing = synthetic.facade(0, 3)
    for view in range(5):
        shot = synthetic.photograph(drawing, np.random.default_rng([1, view]), 160)
        x1, y1, x2, y2 = shot.box
        assert 0 <= x1 < x2 <= shot.image.width
        assert 0 <= y1 < y2 <= shot.image.height
        assert shot.label in ("easy", "hard", "junk")


def test_landmarks_differ_and_views_differ() -> None:
    drawings = [np.asarray(synthetic.facade(0, n)) for n in range(30)]
    assert len({d.tobytes() for d in drawings}) == 30
    assert np.array_equal(drawings[4], np.asarray(synthetic.facade(0, 4)))
    views = {synthetic.shoot(TINY, 0, 0, v, synthetic.facade(5, 0)).image.tobytes() for v in range(5)}
    assert len(views) == 5
