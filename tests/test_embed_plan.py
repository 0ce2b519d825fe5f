"""What embedding holds in memory against what it plans; bfloat16, torch.compile and the GPU against float32 on a CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iir_dist import artifact, embed, ingest
from iir_dist.embed import EmbedConfig, pipeline
from iir_dist.embed.decode import batches
from iir_dist.embed.forward import Embedder, activation_bytes
from iir_dist.embed.plan import LEAST_IN_FLIGHT, EmbedPlan, plan
from iir_dist.models.encoder import EncoderConfig, create
from iir_dist.models.encoder import run as make_encoder

MB = 2**20
UNIT = 10_000
"""Ray counts resources in ten-thousandths, rounded."""


def of(**arguments: Any) -> EmbedPlan:
    """A plan for a million images and one network, unless told otherwise."""
    usual: dict[str, Any] = {
        "rows": 10**6, "shards": 400, "size": 224, "dim": 1280, "batch_megapixels": 0.41, "network_bytes": 14 * MB,
        "forward_bytes": 60 * MB, "shard_bytes": 256 * MB, "store_bytes": 2400 * MB, "cpus": 2, "gpus": 0,
    }  # fmt: skip
    usual |= arguments
    return plan(**({"node_cpus": usual["cpus"]} | usual))


def vectors_of(folder: Path) -> np.ndarray[Any, Any]:
    tables = [pq.read_table(path, columns=["embedding"]) for path in sorted(folder.glob("shard-*.parquet"))]
    return np.stack(pa.concat_tables(tables).column(0).to_numpy())


# ------------------------------------------------------------------------------------------------ who computes


clusters = {
    "cpus": st.integers(1, 512), "gpus": st.integers(0, 64), "workers": st.none() | st.integers(1, 300),
    "rows": st.integers(1, 10**7), "shards": st.integers(1, 10**5), "size": st.integers(16, 4096),
    "batch_megapixels": st.floats(0.01, 50), "nodes": st.integers(1, 16),
}  # fmt: skip


@given(**clusters)
def test_all_that_is_planned_finds_a_place(cpus: int, gpus: int, nodes: int, **arguments: Any) -> None:
    """Workers and decoders together, counted as Ray counts; otherwise one waits for a place that never comes."""
    node_cpus = -(-cpus // nodes)
    found = of(cpus=cpus, gpus=gpus, node_cpus=node_cpus, **arguments)
    worker, decoder = round(found.worker_cpus * UNIT), round(found.decoder_cpus * UNIT)
    assert min(found.workers, found.decoders, found.threads, worker, decoder) >= 1
    assert found.workers * worker + found.decoders * decoder <= cpus * UNIT
    assert found.workers <= (arguments["workers"] or gpus or cpus)
    assert found.decoders <= arguments["shards"]
    if gpus:
        assert UNIT // round(found.worker_gpus * UNIT) * gpus >= found.workers  # each lies on one GPU
    else:
        assert found.worker_gpus == 0
        assert worker + decoder <= node_cpus * UNIT
        assert found.threads * found.workers <= max(cpus, found.workers)


@given(**clusters)
def test_what_is_held_grows_with_the_batch(batch_megapixels: float, nodes: int, **arguments: Any) -> None:
    """Where as many workers run."""
    small = of(batch_megapixels=batch_megapixels, **arguments)
    large = of(batch_megapixels=2 * batch_megapixels, **arguments)
    if small.workers == large.workers and 2e6 * batch_megapixels > arguments["size"] ** 2:
        assert large.in_flight_bytes > small.in_flight_bytes or large.in_flight_bytes == LEAST_IN_FLIGHT
        assert large.worker_bytes > small.worker_bytes
        assert large.total_bytes > small.total_bytes
    parts = small.workers * small.worker_bytes + small.decoders * small.decoder_bytes
    assert small.total_bytes == parts + small.in_flight_bytes + small.driver_bytes


def test_known_machines() -> None:
    laptop, host = of(), of(cpus=16, gpus=1, batch_megapixels=13)
    assert (laptop.workers, laptop.threads, laptop.worker_cpus, laptop.decoders) == (2, 1, 0.8, 2)
    assert (host.workers, host.worker_gpus, host.worker_cpus, host.decoders) == (1, 1.0, 1.0, 15)
    assert laptop.in_flight_bytes == LEAST_IN_FLIGHT
    assert host.in_flight_bytes > 10 * LEAST_IN_FLIGHT
    assert of(workers=1).threads == 2
    assert of(rows=3).workers == 1  # one batch
    assert of(cpus=8, gpus=8).decoders == 1  # a CPU for each GPU: none is left over, yet somebody has to decode
    # One worker is not asked for with the CPUs of four nodes, which no node has.
    assert (of(cpus=16, node_cpus=4, workers=1).worker_cpus, of(cpus=16, node_cpus=4, workers=1).threads) == (3.2, 4)
    assert of(cpus=4, gpus=2, workers=3).worker_gpus == 0.5  # two on one of them


# ------------------------------------------------------------------------------------------------ memory


def peak_of_forward(config: EncoderConfig, n: int, height: int, width: int) -> int:
    """Most bytes that torch's allocator held at a time in one forward pass, beside weights and input."""
    from torch.profiler import ProfilerActivity, profile

    network = create(config).to(memory_format=torch.channels_last)
    x = torch.rand(n, 3, height, width)
    with torch.inference_mode():
        network(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            network(x)
    results = seen.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = np.cumsum([change for _, change in changes])
    assert held[-1] < n * 2**13  # all but the vectors was given back: nothing is missing in the events
    return int(held.max())


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18", "efficientnet_lite0",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet50", "convnext_tiny", "timm:vit_small_patch16_dinov3")
        ),
    ],
)  # fmt: skip
def test_activations_are_not_planned_too_small(backbone: str) -> None:
    config = EncoderConfig(backbone=backbone, weights="random")
    measured = peak_of_forward(config, 4, 160, 224)
    assert measured <= activation_bytes(create(config).spec, 4, 160, 224) <= 4 * measured


@pytest.mark.ray
def test_the_plan_is_printed_and_kept(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What travels is one batch at a time, as is planned; and nothing is said of spilling."""
    make_encoder(str(tmp_path / "squash"), EncoderConfig(backbone="resnet18", weights="random", size=64))
    config = EmbedConfig(workers=1, batch_megapixels=0.02)  # four images
    warn, told = pipeline._warn_of_spilling, list[str]()

    def listen(stats: str, plan: EmbedPlan) -> None:
        told.append(stats)
        warn(stats, plan)

    monkeypatch.setattr(pipeline, "_warn_of_spilling", listen)
    with caplog.at_level("INFO", logger="iir_dist"):
        manifest = embed.run(str(images / "train"), str(tmp_path / "squash"), str(tmp_path / "e"), config)
    kept = dict(manifest.info["memory_plan"])
    total = kept.pop("total_bytes")
    again = EmbedPlan(**kept)
    assert again.total_bytes == total > 0
    assert again.workers == 1
    assert f"embed: {again.summary()}" in caplog.messages
    assert "spilled" not in caplog.text
    (stats,) = told
    of_decoders = re.search(r"\(decode_shard\).*?, (\d+) blocks.*?Output num rows per block: 1 min, 1 max", stats, re.S)
    assert of_decoders
    assert int(of_decoders[1]) > len(manifest.shards())


STORE_OF_80_MB = """
import logging, os, sys

import ray

from iir_dist import embed, session
from iir_dist.embed import EmbedConfig

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.update(session.QUIET)
    ray.init(
        num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    images, encoder, out, megapixels = sys.argv[1:]
    embed.run(images, encoder, out, EmbedConfig(workers=1, batch_megapixels=float(megapixels)))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_spilling_is_a_warning(world: Path, tmp_path: Path, ray_session: None) -> None:
    """Before a run that may, and after one that did."""
    tars = [str(world / f"{name}.tar") for name in ("benchmark", "train", "unlabelled", "distractors")]
    ingest.run(tars, str(tmp_path / "images"), ingest.IngestConfig(split="db"))
    light = EncoderConfig(backbone="timm:mobilenetv3_small_050", weights="random", size=1024)
    make_encoder(str(tmp_path / "encoder"), light)
    done = subprocess.run(
        [sys.executable, "-c", STORE_OF_80_MB, *(str(tmp_path / n) for n in ("images", "encoder", "out")), "12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert artifact.verify(tmp_path / "out").counts["out"] == 110
    before, after = "embed: batches in flight may take ", "MB of decoded batches to disk, its object store has 80 MB: "
    assert before in done.stderr
    assert after in done.stderr
    assert done.stderr.count("--object-store-memory") == 2


TWO_NODES = """
import logging, os, sys

import ray
from ray.cluster_utils import Cluster

from iir_dist import embed, session
from iir_dist.embed import EmbedConfig

if __name__ == "__main__":
    os.environ.update(session.QUIET)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        embed.run(*sys.argv[1:], EmbedConfig(workers=1))
    finally:
        ray.shutdown()
        cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_one_worker_for_two_nodes(images: Path, encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    """Planned with the CPUs of both it would wait for a node that large."""
    command = [sys.executable, "-c", TWO_NODES, str(images / "distractors"), str(encoder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    there = artifact.require(embeddings / "distractors", "embed")[1]
    assert artifact.verify(tmp_path / "out").fingerprint == there.fingerprint


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"precision": "bfloat16"}, 0.999),
        pytest.param({"compile": True}, 0.9999, marks=pytest.mark.slow),
    ],
)
def test_each_image_keeps_its_direction(
    images: Path, encoder: Path, embeddings: Path, tmp_path: Path, settings: dict[str, Any], least: float
) -> None:
    """The cosine to the vector of float32, not compiled."""
    config = EmbedConfig.model_validate({"workers": 1, **settings})
    embed.run(str(images / "distractors"), str(encoder), str(tmp_path / "e"), config)
    ours, theirs = vectors_of(tmp_path / "e"), vectors_of(embeddings / "distractors")
    assert (ours * theirs).sum(axis=1).min() >= least
    assert (ours != theirs).any()  # it did compute otherwise


# ------------------------------------------------------------------------------------------------ GPU


@pytest.fixture
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.mark.gpu
@pytest.mark.ray
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_the_gpu_keeps_directions(
    cuda: None, images: Path, encoder: Path, tmp_path: Path, precision: str, least: float
) -> None:
    """The whole pipeline on a GPU against the network in float32 on the CPU, image by image."""
    config = EmbedConfig.model_validate({"workers": 1, "precision": precision, "batch_megapixels": 0.02})
    manifest = embed.run(str(images / "benchmark"), str(encoder), str(tmp_path / "e"), config)
    assert manifest.info["memory_plan"]["worker_gpus"] == 1
    ours, theirs = vectors_of(tmp_path / "e"), on_the_cpu(images / "benchmark", encoder)
    assert (ours * theirs).sum(axis=1).min() >= least


def batches_of(images: Path, size: int) -> list[pa.Table]:
    folder, manifest = artifact.require(images, "ingest")
    found: list[pa.Table] = []
    for number, name in enumerate(manifest.shards()):
        with folder.local(name) as path:
            found += batches(path, number, size, "long", 0.02e6)
    return found


def on_the_cpu(images: Path, encoder: Path) -> np.ndarray[Any, Any]:
    """In float32, in order of ids."""
    from iir_dist.models.encoder import load

    network = load(*artifact.require(encoder, "encoder"))
    vectors: dict[int, np.ndarray[Any, Any]] = {}
    for table in batches_of(images, network.spec.size):
        row = table.to_pylist()[0]
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["shape"])
        with torch.inference_mode():
            x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div(255)
            vectors |= dict(zip(row["id"], network(x).numpy(), strict=True))
    return np.stack([vectors[number] for number in sorted(vectors)])


@pytest.mark.gpu
def test_two_threads_do_not_mix_their_batches(cuda: None, images: Path, encoder: Path) -> None:
    """One copies from pinned memory while the other computes; many times over, the rows are those of one thread."""
    embedder = Embedder(str(encoder), 1, EmbedConfig(precision="bfloat16"))
    tables = batches_of(images / "benchmark", 64) * 20
    alone = [embedder(table) for table in tables]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(embedder, tables))
    for one, two in zip(alone, together, strict=True):
        assert one.drop(["embedding"]).equals(two.drop(["embedding"]))
        a, b = (np.stack(t.column("embedding").to_numpy()) for t in (one, two))
        assert (a * b).sum(axis=1).min() > 0.9999


@pytest.mark.gpu
def test_a_batch_that_the_gpu_does_not_hold_is_halved(cuda: None, encoder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 512, 512, 3), dtype=np.uint8)
    embedder, notes = Embedder(str(encoder), 1, EmbedConfig()), set[str]()
    with torch.inference_mode():
        whole = embedder.vectors(pixels, set())
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 800 * MB) / total)
        try:
            halved = embedder.vectors(pixels, notes)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(note.startswith("64 images of 512 x 512 px did not fit into memory") for note in notes)
    assert (whole * halved).sum(axis=1).min() > 0.9999
