"""The stages that only studies have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact
from iir_dist.config import build
from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.study.subset import SubsetConfig, chosen
from iir_dist.vectors import F32, normalize

# ------------------------------------------------------------------------------------------------ a fraction of the labels


def test_a_fraction_of_each_class_and_larger_ones_add() -> None:
    labels = ["a"] * 10 + ["b"] * 4 + ["c"] * 2 + [None] * 3
    names = [f"n{i}" for i in range(len(labels))]
    picks = [set(chosen(names, labels, SubsetConfig(fraction=f)).tolist()) for f in (0.1, 0.3, 0.6, 1.0)]
    counts = [[sum(labels[i] == c for i in pick) for c in "abc"] for pick in picks]
    assert counts == [[2, 2, 2], [3, 2, 2], [6, 3, 2], [10, 4, 2]]
    assert picks[0] <= picks[1] <= picks[2] <= picks[3]
    assert picks[1] != set(chosen(names, labels, SubsetConfig(fraction=0.3, seed=1)).tolist())
    turned = chosen(names[::-1], labels[::-1], SubsetConfig(fraction=0.3))
    assert {names[::-1][i] for i in turned} == {names[i] for i in picks[1]}


@pytest.mark.ray
def test_a_subset_is_an_images_artifact(images: Path, tmp_path: Path) -> None:
    from iir_dist.data.cache import Photos
    from iir_dist.study.subset import run

    whole = Photos([artifact.require(str(images / "train"), "ingest")])
    manifest = run(str(images / "train"), str(tmp_path / "half"), SubsetConfig(fraction=0.5))
    assert manifest.counts["rows"] == 15
    half = Photos([artifact.require(str(tmp_path / "half"), "ingest")])
    assert len(half.labels) == 15
    where = {whole.name(i): i for i in range(len(whole.labels))}
    for i in range(15):
        assert half.labels[i] == whole.labels[where[half.name(i)]]
    ids = [v for name in manifest.shards() for v in pq.read_table(tmp_path / "half" / name)["id"].to_pylist()]
    assert ids == list(range(15))
    assert artifact.verify(str(tmp_path / "half")).fingerprint == manifest.fingerprint
    with pytest.raises(InputError, match="no labelled photo"):
        run(str(images / "distractors"), str(tmp_path / "none"), SubsetConfig(fraction=0.5))


# ------------------------------------------------------------------------------------------------ another reading


def test_another_reading_has_the_same_weights(encoder: Path, tmp_path: Path) -> None:
    import torch

    from iir_dist.models.encoder import load
    from iir_dist.study.reading import ReadingConfig, run

    run(str(encoder), str(tmp_path / "r"), ReadingConfig(size=96, scales=(1.0, 0.5), flip=True))
    one, two = (load(*artifact.require(str(uri), "encoder")) for uri in (encoder, tmp_path / "r"))
    assert (two.spec.size, two.spec.scales, two.spec.flip, two.spec.resize) == (96, (1.0, 0.5), True, "long")
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(one.describe(x), two.describe(x))
        assert not torch.allclose(one(x), two(x), atol=1e-4)


# ------------------------------------------------------------------------------------------------ near duplicates


def vectors(folder: Path, names: list[str], x: F32) -> str:
    folder.mkdir()
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"name": names, "embedding": embedding}), folder / "a.parquet")
    return str(folder)


def test_planted_duplicates_are_found(tmp_path: Path) -> None:
    from iir_dist.study.near import FILE, NearConfig, search

    rng = np.random.default_rng(0)
    test = normalize(rng.normal(size=(40, 64)))
    train = normalize(rng.normal(size=(2000, 64)))
    train[7] = normalize(test[3:4] + 0.01 * rng.normal(size=(1, 64)))[0]
    train[1500] = test[39]
    ours = vectors(tmp_path / "train", [f"t{i}" for i in range(2000)], train)
    theirs = vectors(tmp_path / "test", [f"q{i}" for i in range(40)], test)
    manifest = search(ours, theirs, str(tmp_path / "near"), NearConfig(similarity=0.95))
    assert (manifest.counts["near"], manifest.counts["photos"]) == (2, 2000)
    pairs = json.loads((tmp_path / "near" / FILE).read_text())["pairs"]
    assert [pair[1:] for pair in pairs] == [["t1500", "q39"], ["t7", "q3"]]
    assert pairs[1][0] == pytest.approx(float(train[7] @ test[3]), abs=1e-6)
    other = vectors(tmp_path / "other", ["x"], normalize(rng.normal(size=(1, 32))))
    with pytest.raises((MismatchError, InputError)):
        search(ours, other, str(tmp_path / "no"), NearConfig())


# ------------------------------------------------------------------------------------------------ a classifier from nothing


CLASSIFIER = {
    "size": 32, "chunk": 8, "steps": 3, "loss": {"name": "arcface", "margin": 0.0},
    "batches": {"name": "balanced", "size": 16, "per_class": 2}, "optim": {"optimizer": "adam", "lr": 1e-3},
}  # fmt: skip


@pytest.mark.ray
def test_a_classifier_learns_its_batch_norm(images: Path, encoder: Path) -> None:
    """One step: running statistics move by the mean over the chunks, once, though each goes through the network twice."""
    import torch

    from iir_dist.data.cache import Photos
    from iir_dist.models.encoder import load
    from iir_dist.study.classify import ClassifierTask, ClassifyConfig

    photos = Photos([artifact.require(str(images / "train"), "ingest")])
    network = load(*artifact.require(str(encoder), "encoder"))
    task = ClassifierTask(photos, network, ClassifyConfig.model_validate(CLASSIFIER))
    first = network.trunk.net.bn1
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().mean((0, 2, 3))))
    outcome = task.step(0, 1.0)
    hook.remove()
    assert np.isfinite(outcome.loss)
    assert len(seen) == 4  # two chunks, two passes
    assert torch.allclose(seen[0], seen[2])
    assert torch.allclose(first.running_mean, 0.1 * (seen[0] + seen[1]) / 2, atol=1e-6)
    assert first.weight.grad is not None
    assert network.pool.p.grad is None  # averages are trained, as in pretraining
    assert task.loss.weight.grad is not None  # type: ignore[union-attr]


def test_a_classifier_is_not_a_fine_tuning() -> None:
    from iir_dist.study.classify import ClassifyConfig

    for more in ({"projection": 16}, {"validation": {"classes": 2}}, {"batches": {"name": "mined"}}):
        with pytest.raises(ConfigError, match="a classifier has no projection, held-out classes or mined batches"):
            build(ClassifyConfig, {**CLASSIFIER, **more}, "classify")
