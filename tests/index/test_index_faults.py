"""What an index must survive: kill -9 of a build or a change, searching actors that die, a full disk, two builders."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from indexed import NQ, clustered, make_index, random_unit, search, write_vectors
from test_embed_faults import PATIENCE_SEC, Killer, committed, iir, wait_for, workers

from iir_dist import artifact
from iir_dist.artifact import MANIFEST, Manifest
from iir_dist.errors import BusyError, CorruptError, IirError, StorageError
from iir_dist.index import build, fanout, living
from iir_dist.index.engine import Index, open_index
from iir_dist.index.fanout import Actors, open_on_actors
from iir_dist.index.plan import IndexConfig
from iir_dist.index.shard import write_faiss
from iir_dist.storage import open_folder
from iir_dist.vectors import F32, I64

pytestmark = pytest.mark.ray
CONFIG = IndexConfig(shards=6, factory="IVF4,PQ16np")
SETTINGS = ("--set", "shards=6", "--set", "factory=IVF4,PQ16np")
XQ = random_unit(6, 8, seed=2)
TEN = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


def same(a: tuple[F32, I64], b: tuple[F32, I64]) -> bool:
    """The same scores and rows, bit for bit."""
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


# ------------------------------------------------------------------------------------------------ a build


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors whose training takes a second."""
    return write_vectors(tmp_path_factory.mktemp("database") / "db", clustered(4000, 1), files=5)


@pytest.fixture(scope="module")
def undisturbed(database: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Manifest:
    """What becomes of them when nothing happens."""
    return build.run([str(database)], str(tmp_path_factory.mktemp("undisturbed") / "out"), CONFIG)


def check_build(out: Path, undisturbed: Manifest) -> None:
    """Bit for bit the undisturbed run, but for times that were measured; nothing lies about."""
    manifest = artifact.verify(out)
    assert manifest.fingerprint == undisturbed.fingerprint
    assert {**manifest.info, "seconds": 0, "seconds_of": 0, "memory_bytes": 0} == {
        **undisturbed.info, "seconds": 0, "seconds_of": 0, "memory_bytes": 0
    }  # fmt: skip
    assert {entry.name for entry in open_folder(out).list()} == {*manifest.files, MANIFEST}


def identities(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of all files of what is committed."""
    names = [f"{prefix}-{n:05d}.{end}" for n in committed(open_folder(out)) for prefix, end in SHARD]
    names += ["trained.faiss"] * (out / "_work" / "done" / "template.json").exists()
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in names}


SHARD = (("shard", "faiss"), ("vectors", "f16"))


@pytest.mark.parametrize("seed", TEN)
def test_a_build_is_killed_at_any_moment(database: Path, undisturbed: Manifest, tmp_path: Path, seed: int) -> None:
    """With all that it started: while it fills, trains or measures; the same command again does nothing twice.

    A second builder is refused meanwhile, and does not disturb it.
    """
    rng, out, log = random.Random(seed), tmp_path / "out", tmp_path / "log"
    phase = ("fill", "train", "measure")[seed % 3]
    with iir(["index", str(database), "--out", str(out), *SETTINGS], log) as process:
        wait_for(open_folder(out), {"fill": rng.randrange(6), "train": 0, "measure": 6}[phase], process, log)
        for force in (False, True):
            with pytest.raises(BusyError, match=rf"out is being written by process {process.pid} on .*; wait for it"):
                build.run([str(database)], str(out), CONFIG, force=force)
        deadline = time.monotonic() + PATIENCE_SEC
        title = {"fill": "fill", "train": "_train", "measure": ""}[phase]
        while title and not workers(process.pid, title) and not committed(open_folder(out)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        time.sleep(rng.uniform(0, {"fill": 0.1, "train": 1, "measure": 0.3}[phase]))
        assert process.poll() is None, "it was done before it could be killed"
    assert not (out / MANIFEST).exists(), "it was done before it could be killed"
    kept = identities(out)
    build.run([str(database)], str(out), CONFIG)
    check_build(out, undisturbed)
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_of_a_build_are_killed(database: Path, undisturbed: Manifest, tmp_path: Path, seed: int) -> None:
    """As the kernel does where memory runs out; the run goes on by itself."""
    with Killer(tmp_path / "out", [0, 0, 1], random.Random(seed), "ray::_train", "ray::fill") as killer:
        build.run([str(database)], str(tmp_path / "out"), CONFIG)
    assert len(killer.victims) >= 2
    assert artifact.verify(tmp_path / "out").fingerprint == undisturbed.fingerprint


# ------------------------------------------------------------------------------------------------ a change


@pytest.fixture
def index(tmp_path: Path, ray_session: None) -> Path:
    """Three shards of 30 rows; some are deleted."""
    make_index(
        tmp_path / "index", [write_vectors(tmp_path / "emb", random_unit(90, 8, seed=1))], "IVF8,PQ4np", [30, 60]
    )
    living.delete(str(tmp_path / "index"), ids=[*range(12), *range(61, 70)])
    return tmp_path / "index"


def change(what: str, index: Path, more: Path) -> tuple[list[str], Callable[[], Manifest]]:
    """A change of the index: the arguments of `iir`, and the same here."""
    if what == "add":
        return ["index", str(more), "--add", "--out", str(index)], lambda: living.add([str(more)], str(index))
    if what == "compact":
        return ["index", "--compact", "0.2", "--out", str(index)], lambda: living.compact(str(index), 0.2)
    arguments = [part for n in range(40, 60) for part in ("--delete-id", str(n))]
    return ["index", *arguments, "--out", str(index)], lambda: living.delete(str(index), ids=range(40, 60))


def killed_after(events: int, index: Path, arguments: list[str], log: Path) -> bool:
    """Run a change and kill it, with all it started, when so many new files were seen; false if it was done before."""
    seen = start = _paths(index)
    with iir(arguments, log) as process:
        while process.poll() is None and len(seen - start) < events:
            seen = seen | _paths(index)
            time.sleep(0.0002)
        done = process.poll()
    assert done in (None, 0), log.read_text()
    return done is None


def _paths(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, _, names in os.walk(folder) for name in names}


@pytest.mark.parametrize("seed", TEN)
def test_a_change_is_killed_at_any_moment(index: Path, tmp_path: Path, seed: int) -> None:
    """Old state or new, never a mixture; then the same command gives the same bytes, and nothing lies about.

    Changes of one shard are made by the process itself, those of several on Ray.
    """
    rng, what = random.Random(seed), ("compact", "add", "delete")[seed % 3]
    if seed % 2 == 0:
        living.compact(str(index), 0.35)  # leaves one shard to compact
    few = write_vectors(tmp_path / "few", random_unit(50 if seed % 2 else 25, 8, seed=3), "more")
    after = Path(shutil.copytree(index, tmp_path / "after"))
    wanted = change(what, after, few)[1]()
    old_answers, new_answers = search(index, XQ, 60), search(after, XQ, 60)
    old = artifact.require(index, "index")[1]
    assert wanted.fingerprint != old.fingerprint
    arguments, here = change(what, index, few)
    kills = [killed_after(rng.randint(1, most), index, arguments, tmp_path / "log") for most in (4, 12)]
    assert kills[0], "it was done before it could be killed"
    now = artifact.verify(index)
    assert now.fingerprint in (old.fingerprint, wanted.fingerprint)
    answers = search(index, XQ, 60)
    expected = old_answers if now.fingerprint == old.fingerprint else new_answers
    assert same(answers, expected)
    here()
    manifest = artifact.verify(index)
    assert manifest.files == wanted.files
    assert manifest.info == wanted.info
    assert same(search(index, XQ, 60), new_answers)
    left = {p.name for p in index.iterdir() if p.is_file()}
    assert left <= {*manifest.files, *manifest.info["superseded"], MANIFEST}


def test_a_change_that_fails_leaves_nothing_for_the_next(index: Path, tmp_path: Path) -> None:
    """One of its shards cannot be written; the others are no part of what comes next."""
    more, other = (
        write_vectors(tmp_path / name, random_unit(50, 8, seed), "more", files=5, encoder="a" * 64)
        for name, seed in (("more", 3), ("other", 4))
    )
    damaged = more / "shard-00000.parquet"
    data = damaged.read_bytes()
    shutil.copy(other / damaged.name, damaged)
    with pytest.raises(CorruptError, match=r"shard-00000\.parquet has "):
        living.add([str(more)], str(index))
    manifest = living.delete(str(index), ids=[89])
    assert manifest.shards() == ["shard-00000.faiss", "shard-00001.faiss", "shard-00002.faiss"]
    damaged.write_bytes(data)
    assert living.add([str(more)], str(index)).counts == {"rows": 140, "deleted": 22}
    artifact.verify(index)


@pytest.mark.slow
def test_a_change_that_fails_stops_its_tasks(tmp_path: Path, ray_session: None) -> None:
    """Else they would go on to write when nobody holds the lock any more."""
    x = random_unit(600_000, 8, seed=1)
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", x[:300_000])], "IVF8,PQ4np")
    more, other = (write_vectors(tmp_path / name, x, name, files=20, encoder="a" * 64) for name in ("more", "other"))
    shutil.copy(other / "shard-00000.parquet", more / "shard-00000.parquet")
    with pytest.raises(CorruptError, match=r"shard-00000\.parquet has "):
        living.add([str(more)], str(tmp_path / "index"))
    left = {p.name for p in (tmp_path / "index").rglob("*") if p.suffix in (".faiss", ".f16")}
    assert left == {"trained.faiss", "shard-00000.faiss", "vectors-00000.f16"}
    time.sleep(5)
    assert {p.name for p in (tmp_path / "index").rglob("*") if p.suffix in (".faiss", ".f16")} == left


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    yield small
    subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("what", "rooms"),
    [("add", (4096, 16_384, 73_728, 120_000)), ("compact", (16_384, 73_728, 86_016)), ("delete", (4096, 16_384))],
)
def test_a_full_disk_is_an_error_and_the_change_goes_on_later(
    what: str, rooms: tuple[int, ...], small_disk: Path, tmp_path: Path
) -> None:
    """Full at one file after the other: the index answers as before, and nothing that is cut off is taken for whole."""
    emb = write_vectors(tmp_path / "emb", random_unit(6000, 8, seed=1))
    make_index(tmp_path / "index", [emb], "IVF8,PQ4np")
    living.delete(str(tmp_path / "index"), ids=[*range(40), *range(60, 2040)])
    more = write_vectors(tmp_path / "more", random_unit(5000, 8, seed=3), "more")
    index = Path(shutil.copytree(tmp_path / "index", small_disk / "index"))
    wanted = change(what, tmp_path / "index", more)[1]()
    before, (_, here) = search(index, XQ, 60), change(what, index, more)
    for room in rooms:
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        with pytest.raises(StorageError, match=r"no space left on the disk that holds .*run the same command again"):
            here()
        artifact.verify(index)
        assert same(search(index, XQ, 60), before)
        (small_disk / "ballast").unlink()
    assert here().files == wanted.files
    artifact.verify(index)


def test_a_full_disk_is_noticed_at_the_last_byte() -> None:
    """faiss, given a path, closes a file without asking whether its end was written."""
    import faiss

    with pytest.raises(OSError, match="No space left on device"):
        write_faiss(faiss.IndexFlatIP(4), Path("/dev/full"))


# ------------------------------------------------------------------------------------------------ actors that die


def pids(index: Index) -> list[int]:
    import ray

    assert isinstance(index.backend, Actors)
    return list(ray.get([a.__ray_call__.remote(lambda self: os.getpid()) for a in index.backend.actors.values()]))


def test_a_killed_actor_is_started_again(indexes: dict[int, Path]) -> None:
    """kill -9 of a searching process while it answers: the same answers, later."""
    xq = np.tile(clustered(NQ, 2), (200, 1))
    with open_on_actors(indexes[3], 2) as index:
        expected = index.search(xq, 10)
        before = pids(index)
        killer = threading.Timer(0.02, os.kill, (before[0], signal.SIGKILL))
        killer.start()
        for _ in range(3):
            found = index.search(xq, 10)
            assert same(found, expected)
        killer.join()
        index.search(xq[:1], 10)
        assert pids(index)[0] != before[0]


def test_an_actor_that_stays_dead(
    indexes: dict[int, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that names its shards; with allow_partial an answer that says which rows it lacks."""
    monkeypatch.setattr(fanout, "RESTARTS", 0)
    xq = clustered(NQ, 2)
    with open_on_actors(indexes[3], 2, allow_partial=True) as index:
        index.search(xq, 10)
        os.kill(pids(index)[0], signal.SIGKILL)
        index.allow_partial = False
        with pytest.raises(
            IirError, match=r"the actor that searched the shards 0, 2 died .*; see the memory of its node"
        ):
            index.search(xq, 10)
        index.allow_partial = True
        with caplog.at_level("WARNING", "iir_dist"):
            rows = index.search(xq, 10)[1]
        assert index.missing == [[0, 1000], [2000, 3000]]
        assert ((rows >= 1000) & (rows < 2000) | (rows == -1)).all()
    assert "answers lack the database rows 0 to 999, 2000 to 2999" in caplog.text


def test_readers_of_an_old_state_answer_while_it_changes(index: Path, tmp_path: Path) -> None:
    """Opened before and searched during changes by another thread: the old answers, or an error that says to open again."""
    few = write_vectors(tmp_path / "few", random_unit(25, 8, seed=3), "more")
    expected = search(index, XQ, 60)
    stop = threading.Event()
    problems: list[str] = []

    def read() -> None:
        with open_index(index, threads=1) as opened:
            opened.search(XQ, 60)
            ready.set()
            while not stop.is_set():
                found = opened.search(XQ, 60)
                if not same(found, expected):
                    problems.append("other answers")

    ready = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    assert ready.wait(PATIENCE_SEC)
    living.add([str(few)], str(index))
    living.delete(str(index), ids=range(30, 60))
    living.compact(str(index), 0.0)
    living.delete(str(index), ids=[80])
    stop.set()
    reader.join()
    assert not problems
    assert not set(range(30, 60)) & set(search(index, XQ, 60)[1].ravel().tolist())
