"""The rules that all stages share: manifest last, resume, refusal, one writer, checksums."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from iir_dist import artifact, lock
from iir_dist.artifact import InputRef, Manifest
from iir_dist.config import StageConfig
from iir_dist.errors import ArtifactError, BusyError, CorruptError, InputError, MismatchError
from iir_dist.storage import Folder, S3Folder, open_folder


class Toy(StageConfig):
    size: int = 1
    workers: int = 1
    execution: ClassVar[frozenset[str]] = frozenset({"workers"})


DEFAULT = Toy()
SOURCE = {"source": InputRef(uri="/data", fingerprint="a" * 64)}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}/out"


def run(
    out: str, config: Toy = DEFAULT, inputs: dict[str, InputRef] = SOURCE, stop_after: int = 3, **options: Any
) -> Any:
    """A stage of three shards; gives the shards it worked on, or the manifest of a finished one."""
    worked = []
    with artifact.begin(out, "toy", config, inputs, **options) as work:
        if work.finished:
            return work.finished
        for shard in range(3):
            if shard in work.done():
                continue
            if len(worked) == stop_after:
                raise KeyboardInterrupt
            with work.folder.publish(f"shard-{shard:05d}.bin") as file:
                file.path.write_bytes(bytes([shard]) * 10)
            artifact.commit(work.folder, shard, {f"shard-{shard:05d}.bin": artifact.entry_of(file)}, {"rows": 10})
            worked.append(shard)
        work.publish({"rows": 30}, shards=3)
    return worked


def manifest(out: str) -> Manifest:
    return artifact.require(out, "toy")[1]


def test_a_finished_stage_returns_at_once(out: str) -> None:
    assert run(out) == [0, 1, 2]
    first = manifest(out)
    again = run(out, Toy(workers=9))
    assert again == first
    assert sorted(e.name for e in open_folder(out).list()) == [
        "manifest.json", "shard-00000.bin", "shard-00001.bin", "shard-00002.bin"
    ]  # fmt: skip
    assert set(first.files) == {"shard-00000.bin", "shard-00001.bin", "shard-00002.bin"}
    assert first.shards() == sorted(first.files)
    assert first.versions["python"]
    assert artifact.verify(out) == first


def test_an_interrupted_stage_goes_on_with_the_same_result(out: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(out, stop_after=1)
    with pytest.raises(InputError, match="unfinished"):
        manifest(out)
    assert run(out) == [1, 2]
    whole = str(tmp_path / "whole")
    run(whole)
    assert manifest(out).files == manifest(whole).files
    assert manifest(out).fingerprint == manifest(whole).fingerprint


def test_half_written_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(str(out), stop_after=1)
    (out / ".shard-00001.bin.0123456789ab.tmp").write_bytes(b"half")
    run(str(out))
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("finished", [True, False])
def test_another_config_or_input_is_refused_and_named(out: str, finished: bool) -> None:
    if finished:
        run(out)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(out, stop_after=1)
    with pytest.raises(MismatchError, match=r"config\.size: 1 there, 2 now.*--force"):
        run(out, Toy(size=2))
    with pytest.raises(MismatchError, match=r"inputs\.source: 'aaaaaaaaaaaa' there, 'bbbbbbbbbbbb' now"):
        run(out, inputs={"source": InputRef(uri="/data", fingerprint="b" * 64)})
    assert run(out, Toy(size=2), force=True) == [0, 1, 2]
    assert manifest(out).config["size"] == 2


def test_force_removes_only_what_the_stage_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(str(out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        run(str(out), Toy(size=2), force=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "shard-00000.bin").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not empty .*holiday\.jpg"):
        run(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_missing_shards_never_look_complete(tmp_path: Path) -> None:
    with artifact.begin(tmp_path / "out", "toy", Toy(), {}) as work:
        artifact.commit(work.folder, 0, {})
        with pytest.raises(ArtifactError, match="2 of 3 shards are missing, first 1"):
            work.publish({}, shards=3)
    assert artifact.read_manifest(work.folder) is None


def test_the_second_of_two_writers_gets_a_clear_error(out: str) -> None:
    with artifact.begin(out, "toy", Toy(), SOURCE), pytest.raises(BusyError, match=r"process \d+ on"):
        run(out)
    assert run(out) == [0, 1, 2]  # the first one let go


HOLD = """
import sys, time
from iir_dist import artifact
from iir_dist.config import StageConfig
class Toy(StageConfig):
    size: int = 1
with artifact.begin(sys.argv[1], "toy", Toy(), {"source": artifact.InputRef(uri="/data", fingerprint="a" * 64)}):
    print("holding", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_does_not_stay(out: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        with pytest.raises(BusyError, match=f"process {process.pid}"):
            run(out)
        process.kill()
    assert run(out) == [0, 1, 2]


@pytest.mark.s3
def test_a_lease_that_nobody_renews_runs_out(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(f"{s3}/{tmp_path.name}/out")
    owner = {"host": "a-host-that-is-gone", "pid": 1, "started": "1", "token": "t"}
    folder.write("_work/lease.json", json.dumps(owner).encode())
    with pytest.raises(BusyError, match="a-host-that-is-gone"):
        run(folder.uri)
    monkeypatch.setattr(lock, "LEASE_SECONDS", -1.0)
    with artifact.begin(folder.uri, "toy", Toy(), SOURCE):
        pass


@pytest.mark.s3
def test_of_two_finishers_one_publishes(s3: str, tmp_path: Path) -> None:
    """A lease can be lost to a pause; the conditional manifest decides then."""
    out = f"{s3}/{tmp_path.name}/out"
    with artifact.begin(out, "toy", Toy(), SOURCE) as work:
        assert isinstance(work.folder, S3Folder)
        work.folder.write("manifest.json", b"{}")
        with pytest.raises(BusyError, match="another process"):
            work.publish({})


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "edit"])
def test_verify_names_the_bad_file(tmp_path: Path, damage: str) -> None:
    run(str(tmp_path / "out"))
    file = tmp_path / "out" / "shard-00001.bin"
    if damage == "flip":
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        path = tmp_path / "out" / "manifest.json"
        value = json.loads(path.read_text())
        del value["files"]["shard-00001.bin"]
        path.write_text(json.dumps(value))
    with pytest.raises(CorruptError) as error:
        artifact.verify(tmp_path / "out")
    assert ("manifest.json" if damage == "edit" else "shard-00001.bin") in str(error.value)


def test_logs_do_not_count_towards_the_fingerprint(tmp_path: Path) -> None:
    def write(out: Path, text: str) -> Manifest:
        with artifact.begin(out, "toy", Toy(), {}) as work:
            files = {}
            for name, content in (("weights.bin", "w"), ("training.jsonl", text)):
                with work.folder.publish(name) as file:
                    file.path.write_text(content)
                files[name] = artifact.entry_of(file)
            return work.publish({}, files)

    assert write(tmp_path / "a", "12:00").fingerprint == write(tmp_path / "b", "13:00").fingerprint


def test_require_explains(tmp_path: Path) -> None:
    run(str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"written by 'toy'; expected embed"):
        artifact.require(tmp_path / "out", "embed")
    with pytest.raises(InputError, match=r"no manifest\.json; expected the output of index or embed"):
        artifact.require(tmp_path, "index", "embed")
    with pytest.raises(InputError, match="nothing to verify"):
        artifact.verify(tmp_path)
    folder: Folder = open_folder(tmp_path / "out")
    folder.write("manifest.json", b"{not json")
    with pytest.raises(CorruptError, match="not a manifest"):
        artifact.require(tmp_path / "out", "toy")
