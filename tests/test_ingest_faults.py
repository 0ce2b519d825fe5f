"""What ingest must survive: kills at any moment, a store that fails, refuses, changes or goes away, a full disk."""

from __future__ import annotations

import datetime
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import KINDS, FaultyProxy
from photos import image_rows as rows
from photos import jpeg, tar_of

from iir_dist import artifact, ingest
from iir_dist.errors import ArtifactError, BusyError, StorageError
from iir_dist.ingest import IngestConfig
from iir_dist.lock import lock
from iir_dist.storage import Folder, open_folder, s3_client
from iir_dist.storage import s3 as storage_s3

pytestmark = pytest.mark.ray
SMALL = IngestConfig(shard_mb=0.008)


PHOTOS = {f"jpg/{n:04d}.jpg": jpeg(n, (24, 16)) for n in range(120)}


def iir(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iir_dist", *arguments], env=os.environ | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    path = tmp_path / "photos.tar"
    path.write_bytes(tar_of(PHOTOS))
    return path


@pytest.fixture
def bucket(s3: str, tmp_path: Path) -> Folder:
    folder = open_folder(f"{s3}/{tmp_path.name}")
    for name, data in PHOTOS.items():
        folder.write(f"loose/{name}", data)
    return folder


@pytest.fixture
def undisturbed(photos: Path, tmp_path: Path, ray_session: None) -> pa.Table:
    ingest.run([str(photos)], str(tmp_path / "undisturbed"), SMALL)
    return rows(tmp_path / "undisturbed")


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In this process the store is reached through the proxy."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3_client.cache_clear()
        yield proxy
    monkeypatch.undo()
    s3_client.cache_clear()


# ------------------------------------------------------------------------------------------------ the store fails


@pytest.mark.s3
def test_a_store_that_breaks_a_tenth_of_all_answers(
    bucket: Folder, undisturbed: pa.Table, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """From S3 to S3, all of it through the proxy, in processes of its own: nothing is lost, nothing twice."""
    out = bucket.address("out")
    done = iir("ingest", bucket.address("loose"), "--out", out, "--set", "shard_mb=0.008", AWS_ENDPOINT_URL=proxy.url)
    assert done.returncode == 0, done.stderr
    assert all(proxy.seen[kind] > 1 for kind in KINDS), proxy.seen
    proxy.every = 0
    assert rows(out).equals(undisturbed)
    artifact.verify(out)


@pytest.mark.s3
def test_a_store_that_is_gone_for_a_while(bucket: Folder, proxy: FaultyProxy) -> None:
    proxy.every = 0
    proxy.gone_until = time.monotonic() + 6
    assert len(list(bucket.list("loose/"))) == len(PHOTOS)
    assert proxy.seen["drop"] > 3


@pytest.mark.s3
def test_a_store_that_stalls_for_longer_than_we_read(
    bucket: Folder, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy is silent for half a second at every second request; nobody waits for it to the end."""
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_SEC", 0.2)
    monkeypatch.setattr(faults, "KINDS", ("stall",))
    proxy.every = 2
    s3_client.cache_clear()
    wanted = dict(list(PHOTOS.items())[:10])
    assert {name: bucket.read(f"loose/{name}") for name in wanted} == wanted
    assert proxy.seen["stall"] > 5
    assert proxy.seen.total() > 10 + 5  # a stalled request was made again


@pytest.mark.s3
@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_clock_that_is_wrong(
    bucket: Folder, undisturbed: pa.Table, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    """A machine whose clock is minutes off signs, lists and holds leases as any other."""
    import botocore.auth

    now = botocore.auth.get_current_datetime
    asked: list[object] = []

    def wrong(*arguments: object, **options: object) -> object:
        asked.append(arguments)
        return now(*arguments, **options) + datetime.timedelta(minutes=minutes)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", wrong)
    out = bucket.child("skewed")
    ingest.run([bucket.address("loose")], out.uri, SMALL)
    assert rows(out.uri).equals(undisturbed)
    held = bucket.child("held")
    with lock(held):
        # By this clock the lease is minutes old or from the future; by the store's it is fresh.
        assert 0 <= held.age("_work/lease.json")[1] < 30  # type: ignore[attr-defined]
        with pytest.raises(BusyError), lock(held):
            pass
    assert asked  # the clock that is wrong is the one that signs


@pytest.mark.s3
@pytest.mark.slow
def test_a_store_that_is_gone_for_half_a_minute(
    bucket: Folder, undisturbed: pa.Table, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.every = 0
    command = ["ingest", bucket.address("loose"), "--out", str(tmp_path / "out"), "--set", "shard_mb=0.008"]
    process = subprocess.Popen([sys.executable, "-m", "iir_dist", *command], stderr=subprocess.PIPE)
    while not (tmp_path / "out" / "_work" / "done" / "00000.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    proxy.gone_until = time.monotonic() + 30
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    assert proxy.seen["drop"] > 3
    assert rows(tmp_path / "out").equals(undisturbed)


@pytest.mark.s3
def test_a_store_that_stays_away_rejects_nothing(
    bucket: Folder, proxy: FaultyProxy, undisturbed: pa.Table, tmp_path: Path
) -> None:
    """The run ends with an error that names the store, and the same command goes on when it is back."""
    proxy.every = 0
    out = tmp_path / "out"
    command = ["ingest", bucket.address("loose"), "--out", str(out), "--set", "shard_mb=0.008"]
    process = subprocess.Popen(
        [sys.executable, "-m", "iir_dist", *command, "--set", "storage.patience_sec=1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "_work" / "done" / "00000.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    proxy.gone_until = time.monotonic() + 600
    error = process.communicate()[1]
    if process.returncode:  # else all images were read before it went away
        assert "cannot be reached" in error
        assert "bucket 'test'" in error
        assert "Traceback" not in error
    proxy.gone_until = 0.0
    again = iir(*command)
    assert again.returncode == 0, again.stderr
    assert rows(out).equals(undisturbed)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "not-the-secret-value", "AWS_SECRET_ACCESS_KEY"),
        ("SOURCE", "s3://no-such-bucket/photos", "the bucket does not exist"),
    ],
)
def test_a_store_that_refuses(bucket: Folder, tmp_path: Path, setting: str, value: str, remedy: str) -> None:
    source = value if setting == "SOURCE" else bucket.address("loose")
    done = iir("ingest", source, "--out", str(tmp_path / "out"), **{setting: value})
    assert done.returncode == 1
    assert remedy in done.stderr
    assert "bucket" in done.stderr
    assert "Traceback" not in done.stderr
    assert "not-the-secret-value" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.s3
def test_one_worker_and_storage_settings_give_the_same_rows(
    bucket: Folder, undisturbed: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    command = ["ingest", bucket.address("loose"), "--out", str(tmp_path / "out"), "--set", "shard_mb=0.008"]
    for setting in (f"endpoint={endpoint}", "region=us-east-1", "path_style=true", "attempts=2", "patience_sec=5"):
        command += ["--set", f"storage.{setting}"]
    done = subprocess.run(
        [sys.executable, "-m", "iir_dist", *command], capture_output=True, text=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out").equals(undisturbed)
    wrong = iir(*command, "--set", "storage.endpiont=x")
    assert wrong.returncode == 1
    assert "storage.endpiont is not a known key; known: attempts, endpoint" in wrong.stderr


# ------------------------------------------------------------------------------------------------ what changes meanwhile


def test_images_that_change_or_vanish_are_recorded_and_can_be_tried_again(
    photos: Path, undisturbed: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing and reading lie apart; the ledger says what came between, and --retry-rejected adds it later."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    with tarfile.open(photos) as archive:
        archive.extractall(folder, filter="data")
    victims = {"0007": "changed", "0050": "unreadable", "0051": "unreadable", "0119": "not_an_image"}
    (folder / "jpg" / "0119.jpg").write_bytes(b"words")
    from iir_dist.ingest import stage

    write_plan = stage.write_plan

    def interfere(*arguments: object) -> object:
        marker = write_plan(*arguments)  # type: ignore[arg-type]
        (folder / "jpg" / "0007.jpg").write_bytes(jpeg(1000))
        for name in ("0050", "0051"):
            (folder / "jpg" / f"{name}.jpg").rename(tmp_path / name)
        return marker

    monkeypatch.setattr(stage, "write_plan", interfere)
    with pytest.raises(
        ArtifactError, match=r"4 of 120 images were rejected \(1 changed, 1 not_an_image, 2 unreadable\)"
    ):
        ingest.run([str(folder)], str(out), SMALL)
    monkeypatch.undo()
    with open_folder(out).local("rejected.parquet") as path:
        assert {r["name"]: r["reason"] for r in pq.read_table(path).to_pylist()} == victims
    assert rows(out).column("id").to_pylist() == list(range(116))
    before = rows(out)

    # Again with a part of them back: those are appended, and the ids of the others stay.
    (tmp_path / "0050").rename(folder / "jpg" / "0050.jpg")
    config = SMALL.model_copy(update={"max_rejected": 0.02})
    manifest = ingest.run([str(folder)], str(out), config, retry=ingest.TRANSIENT)
    after = rows(out)
    assert after.slice(0, 116).equals(before)
    assert after.slice(116).select(["id", "name"]).to_pylist() == [
        {"id": 116, "name": "0007"},
        {"id": 117, "name": "0050"},
    ]
    counts = manifest.counts
    assert (counts["in"], counts["out"], counts["rejected"], counts["rows"]) == (120, 118, 2, 118)
    artifact.verify(out)
    assert not (out / "_work").exists()
    # Nothing more to be had: nothing changes.
    assert ingest.run([str(folder)], str(out), config, retry=("changed",)) == manifest
    # Any reason can be named; a mended image comes in.
    (folder / "jpg" / "0119.jpg").write_bytes(PHOTOS["jpg/0119.jpg"])
    (tmp_path / "0051").rename(folder / "jpg" / "0051.jpg")
    last = ingest.run([str(folder)], str(out), SMALL, retry=("unreadable", "not_an_image"))
    assert (last.counts["out"], last.counts["rejected"]) == (120, 0)
    assert sorted(rows(out).column("name").to_pylist()) == undisturbed.column("name").to_pylist()
    artifact.verify(out)


def test_a_retry_that_was_interrupted_goes_on(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02d}.jpg").write_bytes(jpeg(n) if n < 20 else b"")
    config = IngestConfig(shard_mb=0.005, max_rejected=0.5)
    ingest.run([str(folder)], str(out), config)
    for n in range(20, 40):
        (folder / f"{n:02d}.jpg").write_bytes(jpeg(n))
    from iir_dist.artifact import Work

    amend = Work.amend

    def stop(*_: object) -> None:
        raise StorageError("stopped here")

    monkeypatch.setattr(Work, "amend", stop)
    with pytest.raises(StorageError, match="stopped here"):
        ingest.run([str(folder)], str(out), config, retry=("empty",))
    assert artifact.require(out, "ingest")[1].counts["out"] == 20  # still the old one
    monkeypatch.setattr(Work, "amend", amend)
    manifest = ingest.run([str(folder)], str(out), config, retry=("empty",))
    assert manifest.counts["out"] == 40
    assert manifest.counts["rejected"] == 0
    assert rows(out).column("id").to_pylist() == list(range(40))
    assert rows(out).column("name").to_pylist() == [f"{n:02d}" for n in range(40)]
    artifact.verify(out)


# ------------------------------------------------------------------------------------------------ duplicates, full disk


def test_duplicates_are_reported_and_dropped_where_asked(tmp_path: Path, ray_session: None) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    contents = {n: jpeg(n // 3) for n in range(60)}  # each photo three times, over shards
    for n, data in contents.items():
        (folder / f"{n % 3}_{n // 3:02d}.jpg").write_bytes(data)
    kept = ingest.run([str(folder)], str(tmp_path / "kept"), SMALL)
    assert (kept.counts["rows"], kept.counts["duplicates"]) == (60, 40)
    with open_folder(tmp_path / "kept").local("duplicates.parquet") as path:
        lines = pq.read_table(path).to_pylist()
    assert {(line["name"], line["first"]) for line in lines} == {
        (f"{copy}_{n:02d}", f"0_{n:02d}") for copy in (1, 2) for n in range(20)
    }
    config = IngestConfig(shard_mb=0.008, dedupe=True, max_rejected=1)
    dropped = ingest.run([str(folder)], str(tmp_path / "dropped"), config)
    assert (dropped.counts["rows"], dropped.counts["rejected_duplicate"], dropped.counts["duplicates"]) == (20, 40, 0)
    table = rows(tmp_path / "dropped")
    assert table.column("name").to_pylist() == [f"0_{n:02d}" for n in range(20)]
    assert table.column("id").to_pylist() == list(range(20))


def test_a_full_disk_is_an_error_and_the_run_goes_on_later(
    photos: Path, undisturbed: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    try:
        with pytest.raises(StorageError, match=r"no space left on the disk that holds .*run the same command again"):
            ingest.run([str(photos)], str(small / "out"), SMALL)
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        ingest.run([str(photos)], str(small / "out"), SMALL)
        assert rows(small / "out").equals(undisturbed)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------------ kill -9


def _descendants(pid: int) -> list[int]:
    import psutil

    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def _kill_at_random(seed: int, source: Path, out: Path, whom: str) -> None:
    """Run the command, and kill the driver or one of its workers at a moment that depends on the seed."""
    rng = random.Random(seed)
    process = subprocess.Popen(
        [sys.executable, "-m", "iir_dist", "ingest", str(source), "--out", str(out), "--set", "shard_mb=0.008"],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (out / "_work" / "plan.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    if whom == "driver":
        time.sleep(rng.uniform(0, 8))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return
    import psutil

    deadline = time.monotonic() + rng.uniform(4, 7)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    workers = [pid for pid in _descendants(process.pid) if "ray::" in " ".join(psutil.Process(pid).cmdline())]
    if workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("whom", ["driver", "worker"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_kill_at_any_moment(photos: Path, undisturbed: pa.Table, tmp_path: Path, seed: int, whom: str) -> None:
    out = tmp_path / "out"
    _kill_at_random(seed, photos, out, whom)
    ingest.run([str(photos)], str(out), SMALL)
    assert rows(out).equals(undisturbed)
    artifact.verify(out)
    assert not list(out.glob(".*.tmp"))
