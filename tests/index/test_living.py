"""An index that changes: what each change does, what is refused, and what an interrupted one leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from indexed import brute_force, make_index, random_unit, search, write_vectors

from iir_dist import artifact
from iir_dist.cli import main
from iir_dist.errors import BusyError, InputError, MismatchError, StorageError
from iir_dist.index import living
from iir_dist.index.engine import open_index
from iir_dist.index.export import export
from iir_dist.lock import lock
from iir_dist.storage import open_folder

XQ = random_unit(6, 8, seed=2)
X, MORE = random_unit(90, 8, seed=1), random_unit(50, 8, seed=3)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Three shards of 30 rows, by an encoder that is known."""
    make_index(tmp_path / "index", [write_vectors(tmp_path / "emb", X, encoder="a" * 64)], "IVF8,PQ4np", [30, 60])
    return tmp_path / "index"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    return write_vectors(tmp_path / "more", MORE, "more", "distractor", encoder="a" * 64)


def iir(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["index", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def files_of(index: Path) -> set[str]:
    return {p.name for p in index.iterdir() if p.is_file() and p.name != "manifest.json"}


@pytest.mark.ray
def test_add(index: Path, more: Path, ray_session: None) -> None:
    """Rows, ids and sources go on; the answers are those of both; the second time nothing changes."""
    before = search(index, XQ, 90, nprobe=8)[1]
    manifest = living.add([str(more)], str(index))
    assert manifest.counts == {"rows": 140}
    assert [s["rows"] for s in manifest.info["shards"]] == [[0, 30], [30, 60], [60, 90], [90, 115], [115, 140]]
    with open_index(index, threads=1) as opened:
        names = opened.names
        assert names["name"].to_pylist() == [f"db_{i:05d}" for i in range(90)] + [f"more_{i:05d}" for i in range(50)]
        assert names["id"].to_pylist() == list(range(140))
        assert names["source"].to_pylist() == [0] * 90 + [1] * 50
        rows = opened.search(XQ, 140, nprobe=8)[1]
    assert np.array_equal(rows, brute_force(XQ, np.concatenate([X, MORE]).astype(np.float16).astype("f"), 140)[1])
    assert np.array_equal([r[r < 90] for r in rows], before)
    refs = [artifact.reference(*artifact.require(folder, "embed")) for folder in (index.parent / "emb", more)]
    assert manifest.inputs["embeddings"] == artifact.combine(refs)  # by which `evaluate` finds them
    assert living.add([str(more)], str(index)) == manifest
    assert living.add([str(index.parent / "emb")], str(index)) == manifest
    artifact.verify(index)
    assert not (index / "_work").exists()


def test_what_cannot_be_added(index: Path, tmp_path: Path) -> None:
    other = write_vectors(tmp_path / "other", MORE, "other", encoder="b" * 64)
    with pytest.raises(MismatchError, match=r"of encoder aaaaaaaaaaaa, .*other of bbbbbbbbbbbb"):
        living.add([str(other)], str(index))
    wide = write_vectors(tmp_path / "wide", random_unit(5, 12, seed=1), "wide")
    with pytest.raises(InputError, match=r"of dimension 8, .*wide of 12"):
        living.add([str(wide)], str(index))
    same = write_vectors(tmp_path / "same", MORE[:5], "db")
    with pytest.raises(InputError, match=r"holds 5 of the 5 names already \(first 'db_00000'\)"):
        living.add([str(same)], str(index))
    living.delete(str(index), [f"db_{i:05d}" for i in range(5)])
    assert living.add([str(same)], str(index)).counts == {"rows": 95, "deleted": 5}  # in place of the deleted
    with pytest.raises(InputError, match=r"no manifest\.json"):
        living.add([str(same)], str(tmp_path / "nothing"))


def test_delete(index: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("db_00003\n\ndb_00050\n")
    pq.write_table(pa.table({"id": pa.array([7, 3], pa.int32())}), tmp_path / "ids.parquet")
    (tmp_path / "names.csv").write_text("name,why\ndb_00060,blurred\n")
    lists = [str(tmp_path / name) for name in ("names.txt", "ids.parquet", "names.csv")]
    options = [part for value in (*lists, "db_00089") for part in ("--delete", value)]
    code, output = iir("--out", str(index), *options, "--delete-id", "88")
    assert code == 0
    assert "90 rows, 6 deleted" in output
    gone = {3, 7, 50, 60, 88, 89}
    assert artifact.require(index, "index")[1].counts["deleted"] == len(gone)


def test_delete_is_all_or_nothing_and_may_be_repeated(index: Path) -> None:
    _, before = artifact.require(index, "index")
    with pytest.raises(InputError, match=r"has no name x, y, z, … \(4 of 5 are not there\)"):
        living.delete(str(index), ["x", "db_00001", "y", "z", "w"])
    with pytest.raises(InputError, match=r"has no id 90 \(1 of 2 are not there\)"):
        living.delete(str(index), ids=[1, 90])
    assert artifact.require(index, "index")[1] == before
    once = living.delete(str(index), ["db_00001"], [2])
    assert living.delete(str(index), ["db_00002"], [1]) == once
    assert not set(search(index, XQ, 90, nprobe=8)[1].ravel()) & {1, 2}


@pytest.mark.ray
def test_compact(index: Path, ray_session: None) -> None:
    """Only the shards above the fraction, under new numbers; a shard without rows goes; rows keep their numbers."""
    living.delete(str(index), ids=[*range(12), *range(30, 60), 70])
    before = search(index, XQ, 90, nprobe=8)
    old = files_of(index)
    manifest = living.compact(str(index), above=0.2)
    assert [(s["number"], s["rows"], s.get("count")) for s in manifest.info["shards"]] == [
        (3, [0, 30], 18), (2, [60, 90], None)
    ]  # fmt: skip
    assert np.fromfile(index / "ids-00003.i64", "<i8").tolist() == list(range(12, 30))
    after = search(index, XQ, 90, nprobe=8)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert old <= files_of(index)  # whoever has it open still finds them
    artifact.verify(index)
    assert living.compact(str(index), above=0.2) == manifest
    last = living.compact(str(index), above=0.0)
    assert [s["number"] for s in last.info["shards"]] == [3, 5]
    assert not {"shard-00000.faiss", "shard-00001.faiss"} & files_of(index)
    assert last.counts == {"rows": 90, "deleted": 43}
    living.delete(str(index), ids=list(range(90)))
    assert living.compact(str(index), above=0.5).info["shards"] == []
    assert (search(index, XQ, 5)[1] == -1).all()
    assert living.add([str(write_vectors(index.parent / "more", MORE, "more"))], str(index)).counts["rows"] == 140
    assert set(search(index, XQ, 5, nprobe=8)[1].ravel()) <= set(range(90, 140))


def test_export_is_plain_faiss(index: Path, tmp_path: Path) -> None:
    import faiss

    living.delete(str(index), ids=[*range(12), 40])
    living.compact(str(index), above=0.2)
    code, output = iir("--out", str(index), "--export", str(tmp_path / "plain.faiss"))
    assert code == 0
    assert "77 vectors, a plain faiss file" in output
    plain = faiss.read_index(str(tmp_path / "plain.faiss"))
    assert (plain.ntotal, faiss.extract_index_ivf(plain).nprobe) == (77, 8)
    scores, rows = search(index, XQ, 20, refine=0)
    found_scores, found = plain.search(XQ, 20)
    assert np.allclose(scores, found_scores, atol=1e-6)
    assert [set(r) for r in rows.tolist()] == [set(r) for r in found.tolist()]
    for target, message in (
        ("s3://bucket/x", "a local file"),
        (str(index / "shard-00001.faiss"), "outside of the index"),
    ):
        code, output = iir("--out", str(index), "--export", target)
        assert (code, message in output) == (1, True)
    artifact.verify(index)


def test_info(index: Path) -> None:
    living.delete(str(index), ids=[1, 2])
    code, output = iir("--out", str(index), "--info")
    assert code == 0
    for part in (
        "88 (2 deleted, 90 in the shards)",
        "IVF8,PQ4np",
        "nprobe 8 of 8 lists, refine 4",
        "a" * 64,
        "60 to 89",
    ):
        assert part in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'EMBEDDINGS...'"),
        (["--add"], "Missing argument 'EMBEDDINGS...'"),
        (["x", "--info"], "--info takes no EMBEDDINGS"),
        (["--info", "--compact"], "--info, --compact exclude each other"),
        (["x", "--add", "--force"], "--force builds an index from nothing; it does not go with --add"),
        (["--compact", "2"], "2.0 is not in the range"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    code, output = iir("--out", "y", *arguments)
    assert code == 2
    assert message in output


def test_one_change_at_a_time(index: Path) -> None:
    with lock(open_folder(index)), pytest.raises(BusyError, match="is being written by process"):
        living.delete(str(index), ids=[1])


def test_force_builds_anew_whatever_changes_left(index: Path, tmp_path: Path) -> None:
    living.delete(str(index), ids=list(range(20)))
    living.compact(str(index))
    (index / "shard-00009.faiss").write_bytes(b"of a killed process, without a marker")
    from iir_dist.config import StageConfig

    with artifact.begin(index, "index", StageConfig(), {}, force=True) as work:
        assert work.finished is None
        assert files_of(index) <= {".lock"}


# ------------------------------------------------------------------------------------------------ interrupted


def test_another_change_drops_what_a_killed_one_left(index: Path, more: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else its shards would become part of the index without their names."""
    _, old = artifact.require(index, "index")
    folder = open_folder(index)
    plan = {"change": "add", "embeddings": "e" * 64, "base": old.fingerprint}
    folder.write("_work/plan.json", json.dumps(plan).encode())
    with folder.publish("shard-00003.faiss") as file:
        shutil.copy(index / "shard-00000.faiss", file.path)
    artifact.commit(folder, 3, {"shard-00003.faiss": artifact.entry_of(file)}, {"rows": 30})
    with caplog.at_level("WARNING", "iir_dist"):
        manifest = living.delete(str(index), ids=[1])
    assert "the add that was interrupted is dropped; give its command again" in caplog.text
    assert "shard-00003.faiss" not in manifest.files
    assert "shard-00003.faiss" not in files_of(index)
    artifact.verify(index)


def test_a_marker_that_was_half_written_does_not_count(index: Path, tmp_path: Path) -> None:
    _, old = artifact.require(index, "index")
    few = write_vectors(tmp_path / "few", MORE[:25], "more", encoder="a" * 64)
    plan = {"change": "add", "embeddings": artifact.require(few, "embed")[1].fingerprint, "base": old.fingerprint}
    open_folder(index).write("_work/plan.json", json.dumps(plan).encode())
    open_folder(index).write("_work/done/.00003.json.0123456789ab.tmp", b'{"shard": 3, "fi')
    assert living.add([str(few)], str(index)).counts == {"rows": 115}
    artifact.verify(index)


@pytest.mark.s3
def test_changes_in_s3(s3: str, index: Path, tmp_path: Path) -> None:
    folder = open_folder(f"{s3}/{tmp_path.name}")
    for path in index.iterdir():
        if path.is_file():
            folder.write(path.name, path.read_bytes())
    few = write_vectors(tmp_path / "few", MORE[:25], "more", encoder="a" * 64)
    for where in (folder.uri, str(index)):
        living.add([str(few)], where)
        living.delete(where, ids=[*range(12), 100])
        living.compact(where)
    here, there = artifact.require(index, "index")[1], artifact.require(folder.uri, "index")[1]
    assert here.files == there.files
    assert export(folder.uri, str(tmp_path / "plain.faiss")) == 102  # 115 rows, 13 deleted
    artifact.verify(folder.uri)


def test_a_full_disk_is_an_error_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a line about its owner; without room for it nothing is held."""

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = open_folder(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"no space left on the disk that holds .*out/\.lock"), lock(folder):
            raise AssertionError
    assert not (tmp_path / "out" / ".lock").exists()
    with lock(folder):
        assert (tmp_path / "out" / ".lock").exists()
