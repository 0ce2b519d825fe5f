"""Learnt whitening: equal to all pairs enumerated, to all regions one by one, and what it may be learnt on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from pydantic import ValidationError

from iir_dist import artifact, embed, whiten, whiten_regions
from iir_dist.cli import main
from iir_dist.config import load
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.data.images import decode, prepare
from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.models import encoder as models
from iir_dist.models.encoder import EncoderConfig
from iir_dist.models.pooling import RMAC, regions
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


# ------------------------------------------------------------------------------------------------ regions of R-MAC


@pytest.fixture(scope="module")
def rmac(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random encoder that pools by R-MAC, at two scales."""
    out = tmp_path_factory.mktemp("whiten") / "rmac"
    settings = {"backbone": "resnet18", "weights": "random", "size": 64, "resize": "long"}
    models.run(str(out), EncoderConfig.model_validate({**settings, "pooling": "rmac", "scales": [1.0, 0.7071]}))
    return out


@pytest.fixture(scope="module")
def regional(images: Path, rmac: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It with whitened regions, by the command."""
    out = tmp_path_factory.mktemp("whiten") / "regional"
    arguments = ["whiten", images / "train", "--encoder", rmac, "--out", out, "--set", "method=regions"]
    result = CliRunner().invoke(
        main, [*map(str, arguments), "--set", "dim=6", "--set", "power=0.5"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "30 images, 0 rejected, " in result.output
    return out


def network_of(uri: Path) -> models.Encoder:
    return models.load(*artifact.require(uri, *artifact.ENCODERS))


def inputs_of(uri: Path) -> list[torch.Tensor]:
    """(1, 3, height, width) each: the photos of an artifact as an encoder of 64 px sees them."""
    folder, manifest = artifact.require(uri, "ingest")
    data = []
    for shard in manifest.shards():
        with folder.local(shard) as path:
            data += pq.read_table(path, columns=["bytes"]).column("bytes").to_pylist()
    pixels = [torch.from_numpy(prepare(decode(photo), 64, "long").copy()) for photo in data]
    return [x.permute(2, 0, 1)[None].float().div(255) for x in pixels]


def slow_maxima(feature_map: npt.NDArray[Any]) -> F64:
    """(R, C) of one map (C, H, W): of all of it, then region by region."""
    height, width = feature_map.shape[1:]
    windows = [(0, 0, height, width), *((top, left, side, side) for top, left, side in regions(height, width))]
    rows = []
    for top, left, h, w in windows:
        v = np.array([channel[top : top + h, left : left + w].max() for channel in feature_map.astype(np.float64)])
        rows.append(v / np.linalg.norm(v))
    return np.stack(rows)


def slow_pca(x: F64, dim: int, power: float) -> tuple[F64, F64]:
    """By the singular values of the centred vectors, all of them at once."""
    mean = x.mean(axis=0)
    _, values, rows = np.linalg.svd(x - mean, full_matrices=False)
    matrix = rows[:dim] / (values[:dim, None] ** 2 / len(x)) ** power
    return mean, matrix * np.sign(matrix[np.arange(dim), np.abs(matrix).argmax(axis=1)])[:, None]


@pytest.mark.ray
@torch.no_grad()
def test_regions_equal_a_slow_transcription(images: Path, rmac: Path, regional: Path) -> None:
    """Learnt and applied: map, region, L2, whitening, L2, sum, L2, for both scales."""
    base, white = network_of(rmac), network_of(regional)
    photos = inputs_of(images / "train")
    assert len({photo.shape for photo in photos}) > 1
    found = []  # (R, C) of each photo and scale
    for x in photos:
        small = F.interpolate(x, scale_factor=0.7071, mode="bilinear", align_corners=False, antialias=True)
        found.append([slow_maxima(base.trunk((y - base.mean) / base.std)[0].numpy()) for y in (x, small)])
    everything = np.concatenate([v for scales in found for v in scales])
    mean, matrix = slow_pca(everything, 6, 0.5)
    assert artifact.require(regional, "whiten")[1].counts["regions"] == len(everything)
    pool = white.pool
    assert isinstance(pool, RMAC)
    assert np.abs(pool.region_mean.numpy() - mean).max() < 1e-6
    assert np.abs(pool.region_matrix.numpy() - matrix).max() < 1e-4 * np.abs(matrix).max()

    for x, scales in zip(photos, found, strict=True):
        expected = np.zeros(6)
        for v in scales:
            w = (v - mean) @ matrix.T
            w = (w / np.linalg.norm(w, axis=1, keepdims=True)).sum(axis=0)
            expected += w / np.linalg.norm(w)
        assert np.abs(white(x)[0].numpy() - expected / np.linalg.norm(expected)).max() < 1e-4


@pytest.mark.ray
def test_moments_are_those_of_all_that_is_summed(images: Path, rmac: Path) -> None:
    """In float64; and what is drawn is of the seed, never a query."""
    folder, manifest = artifact.require(images / "benchmark", "ingest")
    base = network_of(rmac)
    seen: list[F64] = []
    pool = base.pool
    assert isinstance(pool, RMAC)
    pool.register_forward_pre_hook(lambda _, a: seen.append(pool.maxima(a[0]).flatten(0, 1).double().numpy()))
    rows, splits, queries = whiten_regions.draw(folder, manifest, 2000, 0)
    assert (splits, queries) == ({"db": 32}, 8)
    found = whiten_regions.moments(base, folder, manifest, rows)
    x = np.concatenate(seen)
    assert (found.count, found.images, found.rejected) == (len(x), 32, 0)
    assert np.abs(found.mean - x.mean(axis=0)).max() < 1e-14
    assert np.abs(found.covariance - np.cov(x.T, bias=True)).max() < 1e-14

    draws = [whiten_regions.draw(folder, manifest, 12, seed)[0] for seed in (0, 0, 1)]
    flat = [[(shard, int(row)) for shard, rows in draw.items() for row in rows] for draw in draws]
    assert flat[0] == flat[1] != flat[2]
    everything = {(shard, int(row)) for shard, chosen in rows.items() for row in chosen}
    assert all(len(draw) == len(set(draw)) == 12 and set(draw) <= everything for draw in flat)
    assert found.images == 32
    for shard, chosen in rows.items():
        with folder.local(shard) as path:
            splits_there = pq.read_table(path, columns=["split"]).column("split").to_pylist()
        assert [n for n, split in enumerate(splits_there) if split == "db"] == chosen.tolist()


def test_photos_by_row_and_what_cannot_be_decoded(tmp_path: Path) -> None:
    def png(value: int) -> bytes:
        out = io.BytesIO()
        Image.new("L", (9, 5), value).save(out, "PNG")
        return out.getvalue()

    data = [png(n) for n in range(7)]
    data[4] = data[4][:-20]
    pq.write_table(pa.table({"bytes": data}), tmp_path / "s.parquet", row_group_size=2)
    found = list(whiten_regions.photos(tmp_path / "s.parquet", np.array([1, 3, 4, 6]), 9, "long"))
    assert [None if photo is None else int(photo[0, 0, 0]) for photo in found] == [1, 3, None, 6]
    shapes = [(4, 4, 3), (4, 6, 3), (4, 4, 3), (4, 4, 3), (4, 6, 3), (4, 4, 3)]
    stacks = whiten_regions.stacks([np.full(shape, n, np.uint8) for n, shape in enumerate(shapes)], pixels=48)
    assert [stack[:, 0, 0, 0].tolist() for stack in stacks] == [[0, 2, 3], [1, 4], [5]]


@pytest.mark.ray
def test_whitened_regions_are_an_encoder_like_others(
    images: Path, train: Path, rmac: Path, regional: Path, tmp_path: Path
) -> None:
    """Same bits when learnt again; embedded, then whitened as a whole; vectors of the encoder before are not its own."""
    config = WhitenConfig(method="regions", dim=6, power=0.5)
    _, manifest = artifact.require(regional, "whiten")
    again = whiten.run(str(images / "train"), str(rmac), str(tmp_path / "again"), config)
    assert again.fingerprint == manifest.fingerprint
    spec = manifest.info["encoder"]
    made = artifact.require(images / "train", "ingest")[1].fingerprint
    assert spec["region_whitening"] == {
        "method": "regions", "dim": 6, "power": 0.5, "shrinkage": None, "learnt_on": made, "images": made,
        "splits": {"train": 30}, "base": artifact.require(rmac, "encoder")[1].fingerprint,
    }  # fmt: skip
    assert (spec["dim"], spec["whitening"]) == (6, None)

    vectors = str(tmp_path / "vectors")
    embed.run(str(images / "train"), str(regional), vectors, embed.EmbedConfig(workers=1))
    assert open_embeddings(vectors).dim == 6
    both = whiten.run(vectors, str(regional), str(tmp_path / "both"), WhitenConfig(dim=4))
    assert both.info["encoder"]["region_whitening"] == spec["region_whitening"]
    embed.run(vectors, str(tmp_path / "both"), str(tmp_path / "projected"), embed.EmbedConfig())
    applied = np.concatenate(
        [b.vectors for b in open_embeddings(tmp_path / "projected").blocks() if b.vectors is not None]
    )
    twice, once = network_of(tmp_path / "both"), network_of(regional)
    with torch.no_grad():
        direct = torch.cat([twice(x) for x in inputs_of(images / "train")])
        assert torch.equal(direct, torch.cat([twice.whiten(once(x)) for x in inputs_of(images / "train")]))
    ids = np.concatenate([b.ids for b in open_embeddings(tmp_path / "projected").blocks(vectors=False)])
    assert np.abs(applied[np.argsort(ids)] - direct.numpy()).max() < 1e-4

    with pytest.raises(MismatchError, match="holds vectors of encoder"):
        embed.run(str(train), str(regional), str(tmp_path / "e"), embed.EmbedConfig())


@pytest.mark.ray
def test_regions_that_cannot_be_whitened(
    images: Path, encoder: Path, train: Path, rmac: Path, regional: Path, tmp_path: Path
) -> None:
    out, photos = tmp_path / "w", str(images / "train")

    def attempt(inputs: Path | str, network: Path, images_uri: str | None = None, **settings: Any) -> None:
        config = WhitenConfig.model_validate({"method": "regions", "dim": 4, **settings})
        whiten.run(str(inputs), str(network), str(out), config, images_uri=images_uri)

    with pytest.raises(ConfigError, match=r"pools by 'gem'; expected an encoder with pooling='rmac'"):
        attempt(photos, encoder)
    with pytest.raises(MismatchError, match="has whitened regions already"):
        attempt(photos, regional)
    spec, trunk = network_of(rmac).spec, network_of(rmac).trunk
    changed: dict[str, dict[str, Any]] = {
        "a whitening": {"whitening": models.WhiteningSpec(dim=4, power=0.5, learnt_on="", base=""), "dim": 4},
        "a projection": {"projection": 4, "dim": 4},
    }
    for what, changes in changed.items():
        other = models.Encoder(spec.model_copy(update=changes), trunk)
        folder = tmp_path / what.split()[1]
        with artifact.begin(folder, "encoder", EncoderConfig(), {}) as work:
            work.publish({}, models.save(other, work.folder), models.info_of(other))
        with pytest.raises(MismatchError, match=f"has {what} already"):
            attempt(photos, folder)
    with pytest.raises(InputError, match=r"written by 'embed'; .* 'regions' learns on images/"):
        attempt(train, rmac)
    with pytest.raises(ConfigError, match="uses no labels; give IMAGES alone"):
        attempt(photos, rmac, images_uri=photos)
    with pytest.raises(MismatchError, match="has 8 queries, so it is a set to evaluate on"):
        attempt(images / "benchmark", rmac)
    with pytest.raises(InputError, match=r"have 512 dimensions; --set dim=512 or less"):
        attempt(photos, rmac, dim=513)
    assert not out.exists()
    with pytest.raises(
        InputError, match=r"needs more than 60 regions; 2 images of .* gave 49: --force --set dim=48 or less"
    ):
        attempt(photos, rmac, dim=60, sample=2)
    for key, value in {"sample": 5, "seed": 1}.items():
        with pytest.raises(ValidationError, match=f"{key} does nothing with method = 'pca'"):
            WhitenConfig.model_validate({key: value})
    with pytest.raises(ValidationError, match="shrinkage does nothing with method = 'regions'"):
        WhitenConfig(method="regions", shrinkage=0.1)


@pytest.mark.ray
def test_a_network_that_gives_no_numbers(images: Path, rmac: Path) -> None:
    network = network_of(rmac)
    next(network.trunk.parameters()).data.fill_(float("nan"))
    folder, manifest = artifact.require(images / "train", "ingest")
    with pytest.raises(InputError, match="values that are not finite"):
        whiten_regions.moments(network, folder, manifest, {manifest.shards()[0]: np.array([0])})
