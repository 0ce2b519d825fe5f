"""What embedding must survive: kills of the driver and of its workers at any moment, memory that runs out, a bad encoder."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from photos import image_rows
from torch import Tensor, nn

from iir_dist import artifact, embed, ingest
from iir_dist.artifact import Manifest
from iir_dist.embed import EmbedConfig
from iir_dist.embed.decode import batches
from iir_dist.embed.forward import Embedder
from iir_dist.embed.pipeline import RESTARTS, EmbedderActor, Starts
from iir_dist.errors import CorruptError, IirError, InputError
from iir_dist.ingest import IngestConfig
from iir_dist.models.encoder import EncoderConfig
from iir_dist.models.encoder import run as make_encoder
from iir_dist.storage import Folder, open_folder

pytestmark = pytest.mark.ray
CONFIG = EmbedConfig(batch_megapixels=0.08, workers=2)
"""Three images of the network below in a batch, so that every shard is several batches."""
SETTINGS = ("--set", "batch_megapixels=0.08", "--set", "workers=2")
PATIENCE_SEC = 300
TWENTY = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]


@pytest.fixture(scope="module")
def photos(world: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """All 110 photos of the world in some twenty shards."""
    out = tmp_path_factory.mktemp("photos") / "images"
    tars = [str(world / f"{name}.tar") for name in ("benchmark", "train", "unlabelled", "distractors")]
    ingest.run(tars, str(out), IngestConfig(split="db", shard_mb=0.015))
    return out


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of a size at which the photos take seconds."""
    out = tmp_path_factory.mktemp("network") / "resnet18"
    make_encoder(str(out), EncoderConfig(backbone="resnet18", weights="random", size=160))
    return out


@pytest.fixture(scope="module")
def undisturbed(photos: Path, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What becomes of them when nothing happens: every image once."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    manifest = embed.run(str(photos), str(network), str(out), CONFIG)
    found = pa.concat_tables([pq.read_table(out / name, columns=["id", "name"]) for name in manifest.shards()])
    assert found.equals(image_rows(photos).select(["id", "name"]))
    assert len(manifest.shards()) > 15
    return manifest


def check(out: Path | str, undisturbed: Manifest, kept: dict[str, tuple[int, int]] | None = None) -> None:
    """Bit for bit the undisturbed run; the files of `kept` are the ones that were there before; nothing lies about."""
    manifest = artifact.verify(out)
    assert manifest.files == undisturbed.files
    assert (manifest.fingerprint, manifest.counts) == (undisturbed.fingerprint, undisturbed.counts)
    for name, identity in (kept or {}).items():
        assert _identity(Path(out) / name) == identity, f"{name} was written again"
    left = {entry.name for entry in open_folder(out).list()} - {*manifest.files, artifact.MANIFEST}
    assert not left


def _identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


# ------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def iir(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`iir ...` with a Ray of its own; at the end of the block nothing of it is left."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "iir_dist", *arguments], start_new_session=True, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        _kill_all(process)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the driver and all that it started; Ray's workers have process groups of their own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.Error):
            child.kill()


def workers(root: int, *words: str) -> list[psutil.Process]:
    """The processes of the Ray below process `root` whose title has one of the words."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(root).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline()[:1])
                if title.startswith("ray::") and any(word in title for word in words):
                    found.append(process)
    return found


def committed(out: Folder) -> list[int]:
    """The shards that are done, of a run that goes on."""
    stems = [entry.name.rpartition("/")[2].removesuffix(".json") for entry in out.list("_work/done/")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def wait_for(out: Folder, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until so many shards are done."""
    deadline = time.monotonic() + PATIENCE_SEC
    while not any(True for _ in out.list("_work/plan.json")) or len(committed(out)) < count:
        assert process.poll() is None, f"it ended before it could be killed: {log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


class Killer(threading.Thread):
    """Meanwhile kill -9 a worker of this process's Ray each time that so many shards are done."""

    def __init__(self, out: Path, moments: list[int], rng: random.Random, *words: str) -> None:
        super().__init__(daemon=True)
        if "RAY_TEST_ADDRESS" in os.environ:
            pytest.skip("RAY_TEST_ADDRESS is set: its workers are not processes of this test")
        self._out, self._moments, self._rng, self._words = open_folder(out), moments, rng, words
        self._others = {process.pid for process in workers(os.getpid(), *words)}  # of earlier runs
        self._stop_asked = threading.Event()
        self.victims: list[str] = []

    def run(self) -> None:
        for moment in self._moments:
            while not self._stop_asked.wait(0.005):
                if len(committed(self._out)) >= moment and self._kill():
                    break

    def _kill(self) -> bool:
        found = [process for process in workers(os.getpid(), *self._words) if process.pid not in self._others]
        if not found:
            return False
        victim = self._rng.choice(found)
        with contextlib.suppress(psutil.Error):
            title = victim.cmdline()[0]
            victim.kill()
            self._others.add(victim.pid)
            self.victims.append(title)
            return True
        return False

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("seed", TWENTY)
def test_the_driver_is_killed_at_any_moment(
    photos: Path, network: Path, undisturbed: Manifest, tmp_path: Path, seed: int
) -> None:
    """With all that it started; the same command again gives the same bits and computes nothing twice."""
    rng, out, log = random.Random(seed), tmp_path / "out", tmp_path / "log"
    after = rng.randrange(len(undisturbed.shards()) // 2)
    start = time.monotonic()
    with iir(["embed", str(photos), "--encoder", str(network), "--out", str(out), *SETTINGS], log) as process:
        wait_for(open_folder(out), min(after, 1), process, log)
        first = time.monotonic()
        wait_for(open_folder(out), after, process, log)
        # Up to twice as long as a shard takes; before the first, as long again as it took to get here.
        time.sleep(rng.uniform(0, 2) * (time.monotonic() - first) / max(after, 1) if after else first - start)
        assert process.poll() is None, "it was done before it could be killed"
    assert not (out / "manifest.json").exists(), "it was done before it could be killed"
    kept = {artifact.shard_name(n): _identity(out / artifact.shard_name(n)) for n in committed(open_folder(out))}
    assert len(kept) >= after
    embed.run(str(photos), str(network), str(out), CONFIG)
    check(out, undisturbed, kept)


@pytest.mark.slow
@pytest.mark.parametrize("seed", TWENTY)
def test_a_worker_is_killed_at_any_moment(
    photos: Path, network: Path, undisturbed: Manifest, tmp_path: Path, seed: int
) -> None:
    """The run goes on by itself; from the third seed on also without decoders, and without the actor that counts deaths.

    SIGKILL is what the kernel sends where memory runs out.
    """
    rng, out = random.Random(seed), tmp_path / "out"
    moments = sorted(rng.choices(range(len(undisturbed.shards()) // 2), k=1 if seed < 2 else 3))
    words = ("EmbedderActor",) if seed < 2 else ("EmbedderActor", "decode_shard", "ray::Starts")
    with Killer(out, moments, rng, *words) as killer:
        embed.run(str(photos), str(network), str(out), CONFIG)
    assert len(killer.victims) == len(moments)
    check(out, undisturbed)


@pytest.mark.slow
def test_the_counter_of_deaths_is_killed_and_then_a_worker(
    photos: Path, network: Path, undisturbed: Manifest, tmp_path: Path
) -> None:
    """The new worker counts its start with a new counter."""
    out, rng = tmp_path / "out", random.Random(0)
    with Killer(out, [1], rng, "ray::Starts") as counters, Killer(out, [3], rng, "EmbedderActor") as embedders:
        embed.run(str(photos), str(network), str(out), CONFIG)
    assert counters.victims
    assert embedders.victims
    check(out, undisturbed)


# ------------------------------------------------------------------------------------------------ deaths without end


def _one_batch(photos: Path, spec: Any) -> pa.Table:
    folder, manifest = artifact.require(photos, "ingest")
    with folder.local(manifest.shards()[0]) as path:
        return next(batches(path, 0, spec.size, spec.resize, CONFIG.batch_megapixels * 1e6))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """`Embedder` sets torch's threads, and here it does so in the process of the tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_starts_without_a_batch_are_counted(photos: Path, encoder: Path, one_thread: None) -> None:
    """More than so many are an error at the first batch; a batch that is done sets the count back."""
    import ray

    starts = ray.remote(num_cpus=0)(Starts).remote()
    first = EmbedderActor(starts, 2, str(encoder), 1, CONFIG)
    batch = _one_batch(photos, first.embedder.network.spec)
    EmbedderActor(starts, 2, str(encoder), 1, CONFIG)
    doomed = EmbedderActor(starts, 2, str(encoder), 1, CONFIG)
    assert not hasattr(doomed, "embedder")  # it did not even load the network
    with pytest.raises(IirError, match=r"died again and again .* --set workers=1"):
        doomed(batch)
    assert first(batch).column("error").null_count == len(first(batch))
    assert ray.get(starts.add.remote()) == 1


def test_what_a_worker_cannot_load_is_said_at_its_first_batch(photos: Path, images: Path, tmp_path: Path) -> None:
    """An error of the constructor would be tried again and again; and it would be Ray's."""
    import ray

    starts = ray.remote(num_cpus=0)(Starts).remote()
    with pytest.raises(InputError, match="expected the output of encoder"):
        EmbedderActor(starts, 2, str(tmp_path / "nothing"), 1, CONFIG)(pa.table({}))


def test_a_flipped_byte_in_the_weights_is_found_and_named(
    images: Path, encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the worker that reads them; the error is ours, one sentence, with nothing of Ray's before or after."""
    changed = tmp_path / "encoder"
    shutil.copytree(encoder, changed)
    weights = bytearray((changed / "weights.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (changed / "weights.safetensors").write_bytes(weights)
    with pytest.raises(CorruptError) as error:
        embed.run(str(images / "distractors"), str(changed), str(tmp_path / "out"), EmbedConfig(workers=1))
    path = changed / "weights.safetensors"
    assert str(error.value) == f"{path} has other content than its manifest says (SHA-256 differs)"
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_that_die_again_and_again_end_the_run(
    photos: Path, network: Path, undisturbed: Manifest, tmp_path: Path
) -> None:
    """Each is killed as soon as it has loaded torch: one error, not a run without end. What is done is kept."""
    out, log = tmp_path / "out", tmp_path / "log"
    killed: set[int] = set()
    with iir(["embed", str(photos), "--encoder", str(network), "--out", str(out), *SETTINGS], log) as process:
        wait_for(open_folder(out), 2, process, log)
        while process.poll() is None:
            for worker in workers(process.pid, "EmbedderActor"):
                with contextlib.suppress(psutil.Error, OSError):
                    if worker.pid not in killed and "libtorch_cpu" in Path(f"/proc/{worker.pid}/maps").read_text():
                        worker.kill()
                        killed.add(worker.pid)
            time.sleep(0.005)
    message = log.read_text()
    assert process.returncode == 1, message
    assert "Error: worker processes died again and again" in message
    assert "Traceback" not in message
    # The two that worked, and the starts that are let pass; more only if one did a batch before it was seen.
    assert len(killed) >= RESTARTS
    kept = {artifact.shard_name(n): _identity(out / artifact.shard_name(n)) for n in committed(open_folder(out))}
    assert len(kept) >= 2
    embed.run(str(photos), str(network), str(out), CONFIG)
    check(out, undisturbed, kept)


# ------------------------------------------------------------------------------------------------ memory runs out


class Holds(nn.Module):
    """A network that asks the allocator for more than there is, where it gets more than so many images."""

    def __init__(self, network: nn.Module, holds: int) -> None:
        super().__init__()
        self.network, self.holds = network, holds

    def forward(self, x: Tensor) -> Tensor:
        torch.empty(2**62 if len(x) > self.holds else 1, dtype=torch.uint8)
        vectors: Tensor = self.network(x)
        return vectors


@pytest.fixture
def embedder(encoder: Path, one_thread: None) -> Embedder:
    return Embedder(str(encoder), 1, EmbedConfig())


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), dtype=np.uint8)


def test_a_batch_that_memory_does_not_hold_is_halved(embedder: Embedder) -> None:
    notes: set[str] = set()
    with torch.inference_mode():
        whole = embedder.vectors(PIXELS, notes)
        assert not notes
        embedder.network = Holds(embedder.network, 2)
        halved = embedder.vectors(PIXELS, notes)
        odd = embedder.vectors(PIXELS[:5], notes)
    assert np.abs(halved - whole).max() < 1e-5
    assert np.abs(odd - whole[:5]).max() < 1e-5
    assert {note.split(" images of 64 x 48 px did not fit into memory")[0] for note in notes} == {
        "16", "8", "4", "5", "3",
    }  # fmt: skip
    # What is advised holds half of the images.
    assert any("--set batch_megapixels=0.025 saves the attempts" in note for note in notes)


def test_an_image_that_memory_does_not_hold_is_an_error(embedder: Embedder) -> None:
    embedder.network = Holds(embedder.network, 0)
    with torch.inference_mode(), pytest.raises(IirError, match=r"one image of 64 x 48 px does not fit .* smaller size"):
        embedder.vectors(PIXELS, set())


def test_other_errors_of_a_network_are_not_taken_for_it(embedder: Embedder) -> None:
    embedder.network = nn.Linear(3, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        embedder.vectors(PIXELS, set())


LIMITED = """
import resource, sys
import numpy as np, psutil, torch
from iir_dist.embed import EmbedConfig
from iir_dist.embed.forward import Embedder

embedder = Embedder(sys.argv[1], 1, EmbedConfig())
pixels = np.random.default_rng(0).integers(0, 256, (16, 512, 512, 3), dtype=np.uint8)
notes = set()
with torch.inference_mode():
    embedder.vectors(pixels[:1], set())
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 250 * 2**20, limits[1]))
    halved = embedder.vectors(pixels, notes)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    whole = embedder.vectors(pixels, set())
print(sorted(notes)[0], np.abs(halved - whole).max() < 1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_the_kernel_refuses_memory(encoder: Path) -> None:
    """250 MB beyond what the process has: some two images of 512 px fit, sixteen do not."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(encoder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("16 images of 512 x 512 px did not fit into memory")
    assert done.stdout.endswith("True\n")


# ------------------------------------------------------------------------------------------------ from S3 to S3


def _embed_killed_twice(
    images: str, encoder: str, out: Folder, log: Path, settings: tuple[str, ...], moments: tuple[int, int]
) -> None:
    """Kill a worker, later the driver, and run the command to its end."""
    command = ["embed", images, "--encoder", encoder, "--out", out.uri, *settings]
    with iir(command, log) as process:
        wait_for(out, moments[0], process, log)
        (victim, *_) = workers(process.pid, "EmbedderActor")
        victim.kill()
        wait_for(out, moments[1], process, log)
    assert artifact.read_manifest(out) is None, "it was done before it could be killed"
    with iir(command, log) as process:
        assert process.wait() == 0, log.read_text()
    with iir(["verify", out.uri], log) as process:
        assert process.wait() == 0, log.read_text()


@pytest.mark.s3
@pytest.mark.slow
def test_s3_to_s3_killed_twice(
    s3: str, photos: Path, network: Path, undisturbed: Manifest, tmp_path: Path, ray_session: None
) -> None:
    bucket = open_folder(f"{s3}/{tmp_path.name}")
    for part, source in (("images", photos), ("encoder", network)):
        for path in source.iterdir():
            bucket.write(f"{part}/{path.name}", path.read_bytes())
    out = bucket.child("embeddings")
    _embed_killed_twice(
        bucket.address("images"), bucket.address("encoder"), out, tmp_path / "log", SETTINGS, (2, 7)
    )  # fmt: skip
    check(out.uri, undisturbed)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_photos_from_s3_to_s3_killed_twice(s3: str, shared: Path, tmp_path: Path, ray_session: None) -> None:
    """Benchmark and distractors into one space; EfficientNet-Lite0 as it comes from its package."""
    bucket = open_folder(f"{s3}/{tmp_path.name}")
    make_encoder(bucket.address("encoder"), EncoderConfig(backbone="efficientnet_lite0"))
    truth = str(shared / "groundtruth" / "wonders11" / "gnd_wonders11.pkl")
    fingerprints = set()
    for name, split, groundtruth in (("wonders11", "db", truth), ("distractors2k", "distractor", None)):
        images, out = bucket.address(f"images/{name}"), bucket.child(f"embeddings/{name}")
        config = IngestConfig(split=split, shard_mb=2)
        there = ingest.run([str(shared / f"{name}.tar")], images, config, groundtruth_uri=groundtruth)
        log = tmp_path / f"{name}.log"
        _embed_killed_twice(images, bucket.address("encoder"), out, log, ("--set", "workers=2"), (1, 4))
        manifest = artifact.require(out.uri, "embed")[1]
        assert manifest.counts == {"in": there.counts["rows"], "out": there.counts["rows"], "rejected": 0}
        fingerprints.add(manifest.info["encoder_fingerprint"])
        ids: list[Any] = []
        for shard in manifest.shards():
            with out.local(shard) as path:
                ids += pq.read_table(path, columns=["id", "name"]).to_pylist()
        assert ids == image_rows(images).select(["id", "name"]).to_pylist()
    assert len(fingerprints) == 1
