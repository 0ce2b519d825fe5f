"""Embedding: equal to a bare loop, exact after a kill, and nothing lost on the way."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from iir_dist import artifact, embed, ingest, whiten
from iir_dist.data.embeddings import Block, open_embeddings
from iir_dist.data.images import decode, prepare
from iir_dist.embed import EmbedConfig
from iir_dist.embed.decode import batches
from iir_dist.errors import CorruptError, InputError, MismatchError, StorageError
from iir_dist.ingest import IngestConfig
from iir_dist.models.encoder import EncoderConfig, load
from iir_dist.models.encoder import run as make_encoder
from iir_dist.storage import open_folder

pytestmark = pytest.mark.ray

Killed = Callable[[list[str], Path], None]


def image_rows(uri: Path) -> list[dict[str, object]]:
    folder, manifest = artifact.require(uri, "ingest")
    rows = []
    for shard in manifest.shards():
        with folder.local(shard) as path:
            rows += pq.read_table(path).to_pylist()
    return rows


def all_rows(uri: Path | str) -> Block:
    blocks = list(open_embeddings(uri).blocks())
    return Block(
        np.concatenate([b.ids for b in blocks]), np.concatenate([b.names for b in blocks]),
        np.concatenate([b.splits for b in blocks if b.splits is not None]),
        np.concatenate([b.vectors for b in blocks if b.vectors is not None]),
    )  # fmt: skip


def bare_loop(images: Path, encoder: Path) -> np.ndarray:
    """One process, one image at a time: decode, crop, resize, forward."""
    network = load(*artifact.require(encoder, "encoder"))
    vectors = []
    for row in image_rows(images):
        pixels = prepare(decode(row["bytes"]), network.spec.size, network.spec.resize, row["box"])  # type: ignore[arg-type]
        with torch.inference_mode():
            vectors.append(network(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)[0].numpy())
    return np.stack(vectors)


def test_equals_a_bare_loop(images: Path, encoder: Path, embeddings: Path) -> None:
    found, rows = all_rows(embeddings / "benchmark"), image_rows(images / "benchmark")
    assert found.ids.tolist() == [r["id"] for r in rows]
    assert found.names.tolist() == [r["name"] for r in rows]
    assert found.splits is not None
    assert found.splits.tolist() == [r["split"] for r in rows]
    assert found.vectors is not None
    cosines = (found.vectors * bare_loop(images / "benchmark", encoder)).sum(axis=1)
    assert cosines.min() > 0.99999
    _, manifest = artifact.require(embeddings / "benchmark", "embed")
    assert manifest.counts == {"in": 40, "out": 40, "rejected": 0}
    assert manifest.shards() == artifact.require(images / "benchmark", "ingest")[1].shards()
    artifact.verify(embeddings / "benchmark")


def test_batches_are_a_function_of_the_shard(images: Path) -> None:
    """One shape each, at most the pixel budget, every row once."""
    folder, manifest = artifact.require(images / "benchmark", "ingest")
    name = manifest.shards()[0]
    budget = 3 * 64 * 48
    with artifact.verified(folder, name, manifest.files[name]) as path:
        first, second = (list(batches(path, 0, 64, "long", budget)) for _ in range(2))
    assert [t.to_pylist() for t in first] == [t.to_pylist() for t in second]
    rows = sorted(r for t in first for r in t.column("row")[0].as_py())
    assert rows == list(range(first[0].column("total")[0].as_py()))
    for table in first:
        n, height, width, _ = table.column("shape")[0].as_py()
        assert n * height * width <= budget
        assert len(table.column("pixels")[0].as_py()) == n * height * width * 3


def test_half_precision_is_stored_on_request(images: Path, encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    embed.run(str(images / "distractors"), str(encoder), str(tmp_path / "e"), EmbedConfig(dtype="float16", workers=1))
    table = pq.read_table(tmp_path / "e" / "shard-00000.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 512)
    half, full = all_rows(tmp_path / "e").vectors, all_rows(embeddings / "distractors").vectors
    assert half is not None
    assert full is not None
    assert np.abs(half - full).max() < 1e-3


def test_an_image_that_fails_only_here_goes_to_the_ledger(images: Path, encoder: Path, tmp_path: Path) -> None:
    """An artifact of somebody with a looser decoder: one stored file is cut, its checksum recomputed."""
    target = tmp_path / "images"
    shutil.copytree(images / "distractors", target)
    shard = target / "shard-00000.parquet"
    rows = pq.read_table(shard).to_pylist()
    rows[1]["bytes"] = rows[1]["bytes"][:100]
    pq.write_table(pa.Table.from_pylist(rows, schema=ingest.SCHEMA), shard)
    manifest = artifact.require(target, "ingest")[1]
    entry = artifact.FileEntry(size=shard.stat().st_size, sha256=artifact.sha256_of(shard))
    files = {**manifest.files, shard.name: entry}
    changed = manifest.model_copy(update={"files": files, "fingerprint": artifact.content_fingerprint("ingest", files)})
    (target / "manifest.json").write_text(changed.model_dump_json())
    done = embed.run(str(target), str(encoder), str(tmp_path / "e"), EmbedConfig(workers=1))
    assert done.counts == {"in": 16, "out": 15, "rejected": 1}
    (line,) = pq.read_table(tmp_path / "e" / "rejected.parquet").to_pylist()
    assert line["name"] == rows[1]["name"]
    assert "corrupt" in line["error"]
    assert rows[1]["name"] not in all_rows(tmp_path / "e").names


def test_a_flipped_byte_in_an_images_shard_is_found_and_named(images: Path, encoder: Path, tmp_path: Path) -> None:
    target = tmp_path / "images"
    shutil.copytree(images / "distractors", target)
    shard = target / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match=r"shard-00001\.parquet has other content"):
        embed.run(str(target), str(encoder), str(tmp_path / "e"), EmbedConfig(workers=1))
    assert artifact.read_manifest(open_folder(tmp_path / "e")) is None


def test_whitening_finished_vectors_equals_embedding_anew(
    images: Path, encoder: Path, embeddings: Path, tmp_path: Path
) -> None:
    base, white = str(encoder), str(tmp_path / "white")
    whiten.run(str(embeddings / "distractors"), base, white, whiten.WhitenConfig(dim=8, power=0.5))
    fast = embed.run(str(embeddings / "benchmark"), white, str(tmp_path / "fast"), EmbedConfig(workers=1))
    embed.run(str(images / "benchmark"), white, str(tmp_path / "slow"), EmbedConfig(workers=1))
    a, b = all_rows(tmp_path / "fast").vectors, all_rows(tmp_path / "slow").vectors
    assert a is not None
    assert b is not None
    assert a.shape == (40, 8)
    assert np.abs(a - b).max() < 1e-4
    assert fast.info["encoder_fingerprint"] == artifact.require(white, "whiten")[1].fingerprint


def test_mismatches_are_refused_with_both_fingerprints(embeddings: Path, encoder: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    make_encoder(other, EncoderConfig(backbone="resnet18", weights="random", seed=9, size=64))
    ours = artifact.require(encoder, "encoder")[1].fingerprint[:12]
    theirs = artifact.require(other, "encoder")[1].fingerprint[:12]
    with pytest.raises(MismatchError) as error:
        whiten.run(str(embeddings / "distractors"), other, str(tmp_path / "w"), whiten.WhitenConfig(dim=4))
    assert ours in str(error.value)
    assert theirs in str(error.value)
    with pytest.raises(MismatchError, match="give the images, or the encoder that was whitened"):
        embed.run(str(embeddings / "benchmark"), other, str(tmp_path / "e"), EmbedConfig(workers=1))
    with pytest.raises(InputError, match="dim=15 or less"):
        whiten.run(str(embeddings / "distractors"), str(encoder), str(tmp_path / "w"), whiten.WhitenConfig(dim=16))


def test_whitening_whitens(embeddings: Path) -> None:
    """With power 0.5 the training vectors get covariance identity before they are normalized again."""
    count, mean, covariance = whiten.moments(open_embeddings(embeddings / "distractors"))
    x = all_rows(embeddings / "distractors").vectors
    assert x is not None
    assert count == 16
    assert np.allclose(mean, x.mean(axis=0), atol=1e-6)
    assert np.allclose(covariance, np.cov(x.T, bias=True), atol=1e-6)
    learnt = whiten.pca(mean, covariance, 6, 0.5)
    y = (x - learnt.mean) @ learnt.matrix.T
    assert np.allclose(np.cov(y.T, bias=True), np.eye(6), atol=1e-4)
    assert np.allclose(np.linalg.norm(learnt.apply(x), axis=1), 1, atol=1e-6)
    turned = whiten.pca(mean, covariance, 6, 0.0)
    assert np.allclose(turned.matrix @ turned.matrix.T, np.eye(6), atol=1e-8)


@pytest.mark.slow  # test_embed_faults kills at a random moment
def test_kill_and_rerun_gives_the_same_rows(images: Path, tmp_path: Path, killed: Killed) -> None:
    """Bit for bit: what is computed together is decided by the shard, not by who computes it."""
    encoder = str(tmp_path / "encoder")
    make_encoder(encoder, EncoderConfig(backbone="resnet18", weights="random", size=192))
    killed(["embed", str(images / "benchmark"), "--encoder", encoder, "--out", str(tmp_path / "out")], tmp_path / "out")
    resumed = embed.run(str(images / "benchmark"), encoder, str(tmp_path / "out"), EmbedConfig(workers=1))
    whole = embed.run(str(images / "benchmark"), encoder, str(tmp_path / "whole"), EmbedConfig(workers=1))
    assert resumed.counts == whole.counts
    assert resumed.files == whole.files
    assert resumed.fingerprint == whole.fingerprint


@pytest.mark.s3
def test_s3_to_s3(s3: str, images: Path, encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    folder = open_folder(f"{s3}/{tmp_path.name}")
    for part, source in (("images", images / "distractors"), ("encoder", encoder)):
        for path in source.iterdir():
            folder.write(f"{part}/{path.name}", path.read_bytes())
    out = folder.address("embeddings")
    manifest = embed.run(folder.address("images"), folder.address("encoder"), out, EmbedConfig(workers=1))
    assert manifest.fingerprint == artifact.require(embeddings / "distractors", "embed")[1].fingerprint
    artifact.verify(out)


def test_shards_that_an_image_set_got_later_are_added(
    world: Path, encoder: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that were tried again become new shards; only those are embedded, and kill and rerun changes nothing."""
    photos, images, out = tmp_path / "photos", str(tmp_path / "images"), str(tmp_path / "out")
    with tarfile.open(world / "train.tar") as archive:
        archive.extractall(photos, filter="data")
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    kept = {path: path.read_bytes() for path in files[3::7]}
    for path in kept:
        path.write_bytes(b"")
    config = IngestConfig(split="train", shard_mb=0.02, max_rejected=1)
    ingest.run([str(photos)], images, config)
    before = embed.run(images, str(encoder), out, EmbedConfig())
    for path, data in kept.items():
        path.write_bytes(data)
    grown = ingest.run([str(photos)], images, config, retry=("empty",))
    written = {path.name: path.stat().st_mtime_ns for path in Path(out).glob("shard-*")}

    def stop(*_: object) -> None:
        raise StorageError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(artifact.Work, "amend", stop)
        with pytest.raises(StorageError, match="stopped here"):
            embed.run(images, str(encoder), out, EmbedConfig())
    after = embed.run(images, str(encoder), out, EmbedConfig())
    assert after.counts["out"] == before.counts["out"] + len(kept) == grown.counts["rows"]
    assert all((Path(out) / name).stat().st_mtime_ns == time for name, time in written.items())
    whole = embed.run(images, str(encoder), str(tmp_path / "whole"), EmbedConfig())
    assert after.files == whole.files
    assert after.fingerprint == whole.fingerprint
    artifact.verify(out)
    assert embed.run(images, str(encoder), out, EmbedConfig()) == after  # finished
    with pytest.raises(MismatchError, match=r"config\.dtype"):
        embed.run(images, str(encoder), out, EmbedConfig(dtype="float16"))
