"""Learnt whitening: equal to all pairs enumerated, and what it may be learnt on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from iir_dist import artifact, embed, whiten
from iir_dist.cli import main
from iir_dist.config import load
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.vectors import I64, normalize
from iir_dist.whiten import WhitenConfig

F64 = npt.NDArray[np.float64]

DIM = 6
CLASSES = np.array([0, 0, 0, 1, 1, 2, -1, 0, 1, 3, 3, 3, -1, 0], np.int64)
"""Five, three, one and three members, and two images without label."""


def vectors(seed: int = 0) -> F64:
    """(14, 6) unit vectors, float32 values, those of a class near each other."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, DIM)) + 1
    return normalize(centres[CLASSES] + rng.normal(size=(len(CLASSES), DIM)) * np.linspace(0.2, 0.9, DIM)).astype(
        np.float64
    )


def folder_of(path: Path, x: F64, splits: list[str] | None = None) -> Embeddings:
    """A foreign embeddings folder in three shards, ids in another order than rows."""
    path.mkdir()
    ids = np.arange(len(x))[::-1]
    for number, rows in enumerate(np.array_split(np.arange(len(x)), 3)):
        columns: dict[str, Any] = {
            "id": ids[rows], "name": [f"n{i}" for i in ids[rows]],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x[ids[rows]].astype(np.float32).ravel()), DIM),
        }  # fmt: skip
        if splits:
            columns["split"] = [splits[i] for i in ids[rows]]
        pq.write_table(pa.table(columns), path / f"{number}.parquet")
    return open_embeddings(path)


def enumerated(x: F64, classes: I64) -> F64:
    """Covariance of the differences over every ordered pair, one by one, the pairs of each class weighing 1 together."""
    total, weights = np.zeros((DIM, DIM)), 0.0
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j and classes[i] == classes[j] != -1:
                n = int((classes == classes[i]).sum())
                weight = 1 / (n * (n - 1))
                total += weight * np.outer(x[i] - x[j], x[i] - x[j])
                weights += weight
    return total / weights


def published(x: F64, s: F64, dim: int) -> F64:
    """The steps of the published code, on columns, with any inverse root in place of its own helper: (dim, n)."""
    columns = x.T
    m = columns.mean(axis=1, keepdims=True)
    p = np.linalg.inv(np.linalg.cholesky(s))
    df = p @ (columns - m)
    values, vecs = np.linalg.eig(df @ df.T)
    v = np.real(vecs[:, np.argsort(-np.real(values))])
    y = (v.T @ p)[:dim] @ (columns - m)
    return y / np.linalg.norm(y, axis=0)


@pytest.mark.parametrize("splits", [None, ["train"] * 13 + ["query"]])
def test_closed_form_equals_all_pairs(tmp_path: Path, splits: list[str] | None) -> None:
    """And queries are not learnt on."""
    x = vectors()
    s, counts = whiten.pair_moments(folder_of(tmp_path / "e", x, splits), CLASSES)
    n = 13 if splits else 14
    assert np.abs(s - enumerated(x[:n], CLASSES[:n])).max() < 1e-12
    big = 4 if splits else 5
    assert counts == {"classes": 3, "pairs": big * (big - 1) // 2 + 3 + 3, "alone": 1, "unlabelled": 2}


@pytest.mark.parametrize("dim", [2, DIM])
def test_equals_a_transcription_of_the_published_code(tmp_path: Path, dim: int) -> None:
    """Up to the signs of directions, which are free there."""
    x = vectors()
    source = folder_of(tmp_path / "e", x)
    _, mean, covariance = whiten.moments(source)
    s, _ = whiten.pair_moments(source, CLASSES)
    learnt = whiten.lw(mean, covariance, s, dim, 0.0)
    y = (x - learnt.mean) @ learnt.matrix.T
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    slow = published(x, enumerated(x, CLASSES), dim).T
    signs = np.sign((y * slow).sum(axis=0))
    assert np.abs(y - slow * signs).max() < 1e-10
    largest = np.abs(learnt.matrix).argmax(axis=1)
    assert (learnt.matrix[np.arange(dim), largest] > 0).all()


def test_differences_become_white_and_directions_are_sorted() -> None:
    x = vectors()
    mean, covariance, s = x.mean(axis=0), np.cov(x.T, bias=True), enumerated(x, CLASSES)
    matrix = whiten.lw(mean, covariance, s, DIM, 0.0).matrix
    assert np.abs(matrix @ s @ matrix.T - np.eye(DIM)).max() < 1e-10
    told = matrix @ covariance @ matrix.T
    assert np.abs(told - np.diag(np.diag(told))).max() < 1e-10
    assert (np.diff(np.diag(told)) < 0).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_a_rotation_of_the_space_changes_no_similarity(shrinkage: float) -> None:
    x = vectors()
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, DIM)))[0]

    def similarities(z: F64) -> F64:
        learnt = whiten.lw(z.mean(axis=0), np.cov(z.T, bias=True), enumerated(z, CLASSES), 4, shrinkage)
        y = (z - learnt.mean) @ learnt.matrix.T
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        return y @ y.T

    assert np.abs(similarities(x) - similarities(x @ turn)).max() < 1e-10


def test_shrunk_entirely_it_is_pca() -> None:
    x = vectors()
    mean, covariance, s = x.mean(axis=0), np.cov(x.T, bias=True), enumerated(x, CLASSES)
    rows = whiten.lw(mean, covariance, s, 4, 1.0).matrix
    turned = whiten.pca(mean, covariance, 4, 0.0).matrix
    assert np.abs(rows / np.linalg.norm(rows, axis=1, keepdims=True) - turned).max() < 1e-10
    # In between it is neither.
    half = whiten.lw(mean, covariance, s, 4, 0.5).matrix
    assert np.abs(half / np.linalg.norm(half, axis=1, keepdims=True) - turned).max() > 1e-3


def test_the_diagonal_grows_only_where_it_must() -> None:
    s = enumerated(vectors(), CLASSES)
    assert np.array_equal(whiten.cholesky(s), np.linalg.cholesky(s))
    # Rank 3 of 6: rounding alone would decide whether there is a factor.
    root = np.random.default_rng(1).normal(size=(DIM, 3))
    singular = root @ root.T
    factor = whiten.cholesky(singular)
    scale = np.trace(singular) / DIM
    assert np.abs(factor @ factor.T - singular - 1e-10 * scale * np.eye(DIM)).max() < 1e-14 * scale
    # The next step, for one that is not even semidefinite by rounding.
    lowest = singular - 5e-10 * scale * np.eye(DIM)
    factor = whiten.cholesky(lowest)
    assert np.abs(factor @ factor.T - lowest - 1e-9 * scale * np.eye(DIM)).max() < 1e-14 * scale
    with pytest.raises(InputError, match="do not differ at all"):
        whiten.cholesky(np.zeros((3, 3)))
    with pytest.raises(InputError, match="negative variances"):
        whiten.cholesky(np.diag([1.0, -9.0, 9.0]))


@pytest.mark.parametrize("classes", [np.full(14, -1), np.arange(14), np.array([-1, 0] + [-1] * 12)])
def test_no_pair_at_all_is_refused(tmp_path: Path, classes: I64) -> None:
    source = folder_of(tmp_path / "e", vectors())
    with pytest.raises(InputError, match="no two images of one label"):
        whiten.pair_moments(source, classes)


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="shrinkage does nothing with method = 'pca'"):
        load(WhitenConfig, "whiten", None, ["shrinkage=0.2"])
    with pytest.raises(ValidationError, match="power does nothing with method = 'lw'"):
        WhitenConfig(method="lw", power=0.5)
    assert load(WhitenConfig, "whiten", None, ["method=lw", "shrinkage=0.2"]).shrinkage == 0.2


# ------------------------------------------------------------------------------------------------ the stage


@pytest.fixture(scope="module")
def train(images: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training photos, embedded."""
    out = tmp_path_factory.mktemp("whiten") / "train"
    embed.run(str(images / "train"), str(encoder), str(out), embed.EmbedConfig(workers=1))
    return out


@pytest.mark.ray
def test_labels_come_from_the_images(images: Path, encoder: Path, train: Path, tmp_path: Path) -> None:
    """Through the command: 5 landmarks of 6 views are 75 pairs; the encoder then is the function's."""
    out = tmp_path / "white"
    arguments = ["whiten", train, "--encoder", encoder, "--images", images / "train", "--out", out]
    settings = ["--set", "method=lw", "--set", "dim=4", "--set", "shrinkage=0.3"]
    result = CliRunner().invoke(main, [*map(str, arguments), *settings], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "30 vectors, 75 pairs, 5 classes, 0 alone, 0 unlabelled" in result.output
    manifest = artifact.require(out, "whiten")[1]
    spec = manifest.info["encoder"]["whitening"]
    images_manifest = artifact.require(images / "train", "ingest")[1]
    assert (spec["method"], spec["dim"], spec["power"], spec["shrinkage"]) == ("lw", 4, None, 0.3)
    assert spec["images"] == manifest.inputs["images"].fingerprint == images_manifest.fingerprint
    assert spec["splits"] == {"train": 30}

    source = open_embeddings(train)
    rows = [(b.ids, b.vectors) for b in source.blocks()]
    x = np.concatenate([v for _, v in rows if v is not None])
    with artifact.require(images / "train", "ingest")[0].local(images_manifest.shards()[0]) as path:
        first = pq.read_table(path, columns=["label"]).column("label").to_pylist()
    classes = whiten.read_classes(*artifact.require(images / "train", "ingest"))
    assert [int(c) for c in classes[: len(first)]] == [list(dict.fromkeys(first)).index(label) for label in first]
    learnt = whiten.lw(*whiten.moments(source)[1:], whiten.pair_moments(source, classes)[0], 4, 0.3)
    embed.run(str(train), str(out), str(tmp_path / "e"), embed.EmbedConfig())
    applied = np.concatenate([b.vectors for b in open_embeddings(tmp_path / "e").blocks() if b.vectors is not None])
    assert np.abs(applied - learnt.apply(x)).max() < 1e-3


@pytest.mark.ray
def test_missing_labels(images: Path, encoder: Path, embeddings: Path, train: Path, tmp_path: Path) -> None:
    distractors = images / "distractors"
    manifest = artifact.require(distractors, "ingest")[1]
    assert (whiten.read_classes(*artifact.require(distractors, "ingest")) == -1).sum() == manifest.counts["rows"]
    config = WhitenConfig(method="lw", dim=4)
    with pytest.raises(InputError, match="has no two images of one label"):
        whiten.run(
            str(embeddings / "distractors"), str(encoder), str(tmp_path / "w"), config, images_uri=str(distractors)
        )
    with pytest.raises(ConfigError, match=r"--images .*/train"):
        whiten.run(str(train), str(encoder), str(tmp_path / "v"), config)
    with pytest.raises(MismatchError, match="give the images that were embedded") as error:
        whiten.run(str(train), str(encoder), str(tmp_path / "v"), config, images_uri=str(distractors))
    assert manifest.fingerprint[:12] in str(error.value)
    with pytest.raises(ConfigError, match="PCA uses no labels"):
        whiten.run(str(train), str(encoder), str(tmp_path / "v"), WhitenConfig(dim=4), images_uri=str(images / "train"))
    assert not (tmp_path / "v").exists()


@pytest.mark.ray
def test_a_benchmark_is_refused(encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    source, out = str(embeddings / "benchmark"), str(tmp_path / "w")
    with pytest.raises(MismatchError, match="has 8 queries, so it is a set to evaluate on"):
        whiten.run(source, str(encoder), out, WhitenConfig(dim=4))
    assert not Path(out).exists()
    manifest = whiten.run(source, str(encoder), out, WhitenConfig(dim=4, allow_benchmark=True))
    assert manifest.counts["vectors"] == 32  # the queries are not learnt on
    spec = json.loads((tmp_path / "w" / "encoder.json").read_text())["whitening"]
    assert spec["splits"] == {"db": 32}


@pytest.mark.ray
def test_same_bits_whenever_it_runs(images: Path, encoder: Path, train: Path, tmp_path: Path) -> None:
    config = WhitenConfig(method="lw", dim=8)
    a, b = (
        whiten.run(str(train), str(encoder), str(tmp_path / n), config, images_uri=str(images / "train")) for n in "ab"
    )
    assert a.fingerprint == b.fingerprint
    again = whiten.run(str(train), str(encoder), str(tmp_path / "a"), config, images_uri=str(images / "train"))
    assert again.created == a.created
