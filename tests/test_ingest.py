"""Ingest: every image accounted for, whatever comes in and whenever it is killed."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_images import corpus
from photos import image_rows as rows
from photos import jpeg
from PIL import Image

from iir_dist import artifact, ingest
from iir_dist.data.groundtruth import GroundTruth, Query
from iir_dist.data.images import REASONS
from iir_dist.data.listing import SPOOL, Listing
from iir_dist.data.sources import Member
from iir_dist.errors import ConfigError, GroundTruthError, InputError
from iir_dist.ingest import IngestConfig
from iir_dist.ingest.plan import Plan, plan
from iir_dist.storage import open_folder, sha256_of

pytestmark = pytest.mark.ray

Killed = Callable[[list[str], Path], None]


def ledger(out: Path | str) -> dict[str, str]:
    with open_folder(out).local("rejected.parquet") as path:
        return {line["name"]: line["reason"] for line in pq.read_table(path).to_pylist()}


def small(**changes: object) -> IngestConfig:
    return IngestConfig.model_validate({"shard_mb": 0.01, "max_rejected": 1, **changes})


# ------------------------------------------------------------------------------------------------ plan, without Ray


def listing(*names: str, size: int = 10, **columns: list[str | None]) -> Listing:
    members = [dataclasses.asdict(Member("/s", f"{n}.jpg", size)) for n in names]
    rows = [{**m, "key": None, "path": m["key"], "address": 0, "group": 0, "place": 0} for m in members]
    table = pa.Table.from_pylist(rows, SPOOL)
    for name, values in columns.items():
        table = table.set_column(SPOOL.get_field_index(name), SPOOL.field(name), pa.array(values, pa.string()))
    named = pa.array(names, pa.string())
    return Listing(table, pa.array(["/s"]), np.arange(len(names)), named, 0, "f")


def truth(protocol: str, **labels: tuple[str, ...]) -> GroundTruth:
    queries = (Query("q", "q", (0.0, 0.0, 5.0, 5.0), labels),)
    return GroundTruth(protocol, queries, ("a", "b") if protocol == "revisited" else None)  # type: ignore[arg-type]


def planned(todo: Plan) -> list[tuple[str, str]]:
    rows = [row for n in range(len(todo.shards)) for row in todo.rows(n).to_pylist()]
    return [(row["name"], row["split"]) for row in rows]


def test_revisited_queries_are_not_in_the_database() -> None:
    todo = plan(listing("a", "b", "q"), IngestConfig(), truth("revisited", easy=("a",), hard=(), junk=()))
    assert todo.rows(0)["box"].to_pylist() == [None, None, [0.0, 0.0, 5.0, 5.0]]
    assert planned(todo) == [("a", "db"), ("b", "db"), ("q", "query")]


def test_original_queries_stay_in_the_database_where_they_are_labelled() -> None:
    labelled = truth("original", good=("q", "a"), ok=(), junk=())
    assert planned(plan(listing("a", "b", "q"), IngestConfig(), labelled)) == [
        ("a", "db"), ("b", "db"), ("q", "db"), ("q", "query")
    ]  # fmt: skip
    unlabelled = truth("original", good=("a",), ok=(), junk=())
    assert planned(plan(listing("a", "b", "q"), IngestConfig(), unlabelled)) == [
        ("a", "db"), ("b", "db"), ("q", "query")
    ]  # fmt: skip


def test_ground_truth_that_names_missing_images() -> None:
    missing = truth("revisited", easy=("a",), hard=("b",), junk=())
    with pytest.raises(GroundTruthError, match=r"names 1 of 3 images that are not in the source \(first: b\)"):
        plan(listing("a", "q"), IngestConfig(), missing)
    accepted = plan(listing("a", "q"), IngestConfig(allow_missing=True), missing)
    assert planned(accepted) == [("a", "db"), ("q", "query")]
    with pytest.raises(GroundTruthError, match="1 query images are not in the source, first 'q'"):
        plan(listing("a", "b"), IngestConfig(allow_missing=True), missing)


def test_shards_are_cut_by_size() -> None:
    todo = plan(listing(*"abcdefg", size=400), IngestConfig(shard_mb=1000 / 2**20))
    assert todo.shards == ((0, 2), (2, 4), (4, 6), (6, 7))
    assert plan(listing(*"abc", size=4000), IngestConfig(shard_mb=1000 / 2**20)).shards == ((0, 1), (1, 2), (2, 3))
    many = listing(*map(str, range(70_000)), size=0)
    assert plan(many, IngestConfig()).shards == (
        (0, 8192),
        *((n, n + 8192) for n in range(8192, 65_536, 8192)),
        (65_536, 70_000),
    )


def test_of_equal_names_the_first_stays() -> None:
    todo = plan(listing("b", "a", "b", "c", "a", "b", problem=["", "", "", "too_large", "", ""]), IngestConfig())
    assert planned(todo) == [("b", "db"), ("a", "db")]
    assert [(line["name"], line["reason"]) for line in todo.rejected.to_pylist()] == [
        ("a", "duplicate_name"), ("b", "duplicate_name"), ("b", "duplicate_name"), ("c", "too_large"),
    ]  # fmt: skip


def test_labels_and_splits_of_a_list_come_before_the_rest() -> None:
    found = listing("x/a", "x/b", "x/c", label=["rome", None, None], split=[None, "train", "query"])
    labels = pa.table({"name": ["x/b", "other"], "label": ["pisa", "oslo"]})
    todo = plan(found, IngestConfig(split="distractor"), labels=labels)
    assert planned(todo) == [("x/a", "distractor"), ("x/b", "train"), ("x/c", "query")]
    assert todo.rows(0)["label"].to_pylist() == ["rome", "pisa", "x"]
    todo = plan(found, IngestConfig(folder_labels=False, only_labelled=True), labels=labels)
    assert planned(todo) == [("x/b", "train")]
    assert todo.num_images == 1
    with pytest.raises(InputError, match="only_labelled = true needs labels"):
        plan(found, IngestConfig(only_labelled=True))
    with pytest.raises(InputError, match="no name of --labels is that of an image: the first is 'other'"):
        plan(found, IngestConfig(), labels=labels.slice(1))


# ------------------------------------------------------------------------------------------------ real runs


def test_a_benchmark_is_ingested_whole(images: Path, world: Path) -> None:
    table = rows(images / "benchmark")
    _, manifest = artifact.require(images / "benchmark", "ingest")
    assert table.schema.equals(ingest.SCHEMA)
    assert manifest.counts == {
        "in": 40, "out": 40, "rejected": 0, "rows": 40, "queries": 8, "duplicates": 0, "ignored_files": 0
    }  # fmt: skip
    assert table.column("id").to_pylist() == list(range(40))
    assert table.column("split").to_pylist() == ["db"] * 32 + ["query"] * 8
    assert len(manifest.shards()) > 3
    with tarfile.open(world / "benchmark.tar") as tar:
        for row in table.to_pylist():
            member = tar.extractfile(f"jpg/{row['name']}.jpg")
            assert member is not None
            assert member.read() == row["bytes"]
            assert (row["box"] is None) == (row["split"] == "db")
            assert Image.open(io.BytesIO(row["bytes"])).size == (row["width"], row["height"])
    artifact.verify(images / "benchmark")
    assert set(rows(images / "train").column("label").to_pylist()) == {f"site_{n:03d}" for n in range(5)}


def bad_files() -> dict[str, bytes]:
    whole = jpeg(1)
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = io.BytesIO()
    Image.new("RGB", (48, 32)).save(upright, "JPEG", exif=turned)
    big = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(big, "PNG")
    return {
        "jpg/good_1.jpg": whole, "jpg/good_2.png": jpeg(2), "jpg/turned.jpg": upright.getvalue(),
        "jpg/empty.jpg": b"", "jpg/words.jpg": b"not pixels", "jpg/cut.jpg": whole[: len(whole) // 2],
        "jpg/huge.png": big.getvalue(), "jpg/good_1.png": jpeg(3), "jpg/notes.txt": b"x",
    }  # fmt: skip


EXPECTED = {
    "empty": "empty", "words": "not_an_image", "cut": "corrupt", "huge": "too_large", "good_1": "duplicate_name"
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_bad_files_go_to_the_ledger_and_the_others_through(tmp_path: Path, ray_session: None, kind: str) -> None:
    source = tmp_path / f"photos.{kind}"
    expected = dict(EXPECTED)
    if kind == "folder":
        for name, data in bad_files().items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    elif kind == "tar":
        expected["../climbs.jpg"] = "unsafe_path"
        with tarfile.open(source, "w") as tar:
            for name, data in {**bad_files(), "../climbs.jpg": jpeg(4)}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        expected["../climbs.jpg"] = "unsafe_path"
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in {**bad_files(), "../climbs.jpg": jpeg(4)}.items():
                archive.writestr(name, data)
    manifest = ingest.run([str(source)], str(tmp_path / "out"), small())
    assert ledger(tmp_path / "out") == expected
    assert set(expected.values()) <= set(REASONS)
    table = rows(tmp_path / "out")
    assert table.column("name").to_pylist() == ["good_1", "good_2", "turned"]
    assert table.column("id").to_pylist() == [0, 1, 2]
    assert table.slice(2, 1).select(["width", "height"]).to_pylist() == [{"width": 32, "height": 48}]  # after rotation
    counts = manifest.counts
    assert counts["in"] == counts["out"] + counts["rejected"] == 3 + len(expected)
    assert counts["ignored_files"] == 1


def test_every_known_kind_of_bad_file_goes_to_the_ledger(tmp_path: Path, ray_session: None) -> None:
    bad = corpus()
    (tmp_path / "in").mkdir()
    for number, (name, (data, _)) in enumerate(bad.items()):
        (tmp_path / "in" / f"{number:03d}_{Path(name).stem}.jpg").write_bytes(data)
    for number in range(3):
        (tmp_path / "in" / f"good_{number}.jpg").write_bytes(jpeg(number))
    manifest = ingest.run([str(tmp_path / "in")], str(tmp_path / "out"), small())
    found = {name[4:]: reason for name, reason in ledger(tmp_path / "out").items()}
    assert len(bad) > 40
    assert found == {Path(name).stem: reason for name, (_, reason) in bad.items()}
    assert rows(tmp_path / "out").column("name").to_pylist() == ["good_0", "good_1", "good_2"]
    assert manifest.counts["in"] == len(bad) + 3


def test_nothing_usable_is_an_error(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 1 images can be used; the first, .*a\.jpg: empty"):
        ingest.run([str(tmp_path / "in")], str(tmp_path / "out"), small())
    assert artifact.read_manifest(open_folder(tmp_path / "out")) is None


def test_a_query_that_cannot_be_used_is_an_error(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "in").mkdir()
    for name, data in (("a", jpeg(1)), ("b", jpeg(2)), ("q", b"broken")):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(data)
    lists = {
        "imlist": ["a", "b"],
        "qimlist": ["q"],
        "gnd": [{"bbx": [0, 0, 9, 9], "easy": [0], "hard": [], "junk": []}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(lists))
    with pytest.raises(GroundTruthError, match="image of query 'q' cannot be used: not_an_image"):
        ingest.run([str(tmp_path / "in")], str(tmp_path / "out"), small(), groundtruth_uri=str(tmp_path / "gt.json"))


def test_photos_to_search_with(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg())
    ingest.run([str(tmp_path / "photos")], str(tmp_path / "out"), small(split="query"))
    assert rows(tmp_path / "out").select(["name", "split", "box"]).to_pylist() == [
        {"name": "a", "split": "query", "box": None}
    ]
    for wrong in ({"split": "query"}, {"dedupe": True}):
        with pytest.raises(ConfigError, match="the ground truth expects in the database"):
            ingest.run(["x"], str(tmp_path / "b"), small(**wrong), groundtruth_uri="gnd.json")


def test_no_source() -> None:
    with pytest.raises(InputError, match="no SOURCE given"):
        ingest.run([], "/tmp/never", small())


@pytest.mark.s3
def test_s3_to_s3_gives_the_same_rows(s3: str, world: Path, images: Path, tmp_path: Path) -> None:
    folder = open_folder(f"{s3}/{tmp_path.name}")
    folder.write("benchmark.tar", (world / "benchmark.tar").read_bytes())
    folder.write("groundtruth.json", (world / "groundtruth.json").read_bytes())
    out = folder.address("images")
    config = IngestConfig(shard_mb=0.03)
    truth_uri = folder.address("groundtruth.json")
    manifest = ingest.run([folder.address("benchmark.tar")], out, config, groundtruth_uri=truth_uri)
    assert rows(out).equals(rows(images / "benchmark"))
    assert manifest.fingerprint == artifact.require(images / "benchmark", "ingest")[1].fingerprint
    assert "test-secret-value" not in folder.read("images/manifest.json").decode()
    artifact.verify(out)


@pytest.mark.s3
def test_real_photos_from_tar_zip_and_loose_objects_give_the_same_rows(
    shared: Path, s3: str, tmp_path: Path, ray_session: None
) -> None:
    store = open_folder(f"{s3}/{tmp_path.name}")
    with tarfile.open(shared / "wonders11.tar") as tar, zipfile.ZipFile(tmp_path / "wonders11.zip", "w") as archive:
        for info in reversed(tar.getmembers()):  # another order than that of the tar
            if info.isreg():
                content = tar.extractfile(info)
                assert content is not None
                data = content.read()
                archive.writestr(info.name, data)
                store.write(f"photos/{info.name}", data)
    sources = {
        "tar": str(shared / "wonders11.tar"), "zip": str(tmp_path / "wonders11.zip"), "s3": store.address("photos")
    }  # fmt: skip
    truth = str(shared / "groundtruth" / "wonders11" / "gnd_wonders11.pkl")
    config = IngestConfig(shard_mb=8)
    found = {
        kind: ingest.run([source], str(tmp_path / kind), config, groundtruth_uri=truth)
        for kind, source in sources.items()
    }
    assert rows(tmp_path / "zip").equals(rows(tmp_path / "tar"))
    assert rows(tmp_path / "s3").equals(rows(tmp_path / "tar"))
    assert len({manifest.fingerprint for manifest in found.values()}) == 1
    assert found["s3"].counts["rows"] == found["s3"].counts["out"] == 1159


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.slow  # test_ingest_faults kills at a random moment
def test_kill_and_rerun_gives_the_same_rows(tmp_path: Path, ray_session: None, killed: Killed) -> None:
    source = tmp_path / "photos.tar"
    with tarfile.open(source, "w") as tar:
        for n in range(400):
            data = b"" if n % 50 == 7 else jpeg(n)
            info = tarfile.TarInfo(f"jpg/{n:04d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    command = ["ingest", str(source), "--out", str(tmp_path / "out"), "--set", "shard_mb=0.008"]
    killed(command, tmp_path / "out")
    committed = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.parquet")}
    markers = {p.stem for p in (tmp_path / "out" / "_work" / "done").iterdir()}
    config = IngestConfig(shard_mb=0.008, max_rejected=0.02)
    resumed = ingest.run([str(source)], str(tmp_path / "out"), config)
    whole = ingest.run([str(source)], str(tmp_path / "whole"), config)
    assert resumed.files == whole.files
    assert resumed.counts == whole.counts
    assert resumed.counts["rejected"] == 8
    assert rows(tmp_path / "out").column("id").to_pylist() == list(range(392))
    for name, time_ns in committed.items():  # what was committed was not done again
        if name.removeprefix("shard-").removesuffix(".parquet") in markers:
            assert (tmp_path / "out" / name).stat().st_mtime_ns == time_ns
    assert not list((tmp_path / "out").glob(".*tmp"))
    shutil.rmtree(tmp_path / "whole")


def test_two_processes_on_one_output(tmp_path: Path, ray_session: None, world: Path) -> None:
    """One finishes, the other is told so; or both see the one finished artifact."""
    command = [
        sys.executable, "-m", "iir_dist", "ingest", str(world / "train.tar"), "--out", str(tmp_path / "out"),
        "--set", "shard_mb=0.01",
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "out" / "_work" / "plan.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run(command, capture_output=True, check=False)
    first_error = first.communicate()[1].decode()
    assert first.returncode == 0, first_error
    if second.returncode:
        assert f"is being written by process {first.pid}" in second.stderr.decode()
        assert "Traceback" not in second.stderr.decode()
    artifact.verify(tmp_path / "out")
    assert sha256_of(tmp_path / "out" / "shard-00000.parquet")
