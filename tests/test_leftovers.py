"""`iir gc` removes what nobody will take up again, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from iir_dist import leftovers
from iir_dist.artifact import MANIFEST, begin, commit
from iir_dist.cli import main
from iir_dist.config import StageConfig
from iir_dist.lock import lock
from iir_dist.storage import Folder, open_folder


class Config(StageConfig):
    """Of no stage."""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/gc"


def artifact_at(uri: str, *, finished: bool) -> None:
    with begin(uri, "embed", Config(), {}) as work:
        work.folder.write("shard-00000.parquet", b"rows")
        commit(work.folder, 0, {}, {"rows": 1})
        if finished:
            work.publish({"rows": 1})


def test_finished_artifacts_lose_their_work_and_unfinished_ones_keep_it(root: str) -> None:
    artifact_at(f"{root}/deep/done", finished=True)
    artifact_at(f"{root}/begun", finished=False)
    folder = open_folder(root)
    kept = {entry.name for entry in folder.list()}
    left = {"deep/done/_work/done/0.json", "deep/done/.manifest.json.0a.tmp", "begun/.shard-00001.parquet.0b.tmp"}
    for name in left:
        folder.write(name, b"half")

    def gc(*options: str) -> set[str]:
        result = CliRunner().invoke(main, ["gc", root, *options])
        assert result.exit_code == 0, result.output
        return {line.removeprefix(f"{root}/") for line in result.stdout.splitlines()}

    assert gc("--dry-run") == left
    assert {entry.name for entry in folder.list()} == kept | left
    with lock(open_folder(f"{root}/deep/done")):
        assert gc() == {name for name in left if name.startswith("begun")}
    assert gc() == {name for name in left if name.startswith("deep")}
    assert {entry.name for entry in folder.list()} == kept
    assert gc() == set()


def test_what_is_begun_anew_meanwhile_keeps_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact_at(str(tmp_path), finished=True)
    folder = open_folder(tmp_path)
    folder.write("_work/done/0.json", b"{}")

    @contextlib.contextmanager
    def late(folder: Folder) -> Iterator[None]:
        folder.delete(MANIFEST)  # by another process, with --force, before the lock is had
        with lock(folder):
            yield

    monkeypatch.setattr(leftovers, "lock", late)
    assert leftovers.collect(tmp_path, remove=True) == ([], [])
    assert folder.exists("_work/done/0.json")
