"""What training and test share is found in each of three ways, and nothing else is."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact, ingest, overlap
from iir_dist.artifact import InputRef
from iir_dist.config import StageConfig
from iir_dist.data import groundtruth
from iir_dist.errors import GroundTruthError, InputError

Row = tuple[str, str | None, str, str]
"""name, label, split, content"""


def images(out: Path, rows: Sequence[Row], truth: dict[str, Any] | None = None, source: str = "photos.tar") -> str:
    """An images artifact of these rows, in two shards; the columns that are looked at."""
    with artifact.begin(out, "ingest", StageConfig(), {"sources": InputRef(uri=source, fingerprint="0")}) as work:
        for number, part in enumerate((rows[::2], rows[1::2])):
            columns = dict(zip(("name", "label", "split", "sha256"), zip(*part, strict=True), strict=True))
            table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
            with work.folder.publish(artifact.shard_name(number)) as file:
                pq.write_table(table, file.path)
            artifact.commit(work.folder, number, {artifact.shard_name(number): artifact.entry_of(file)})
        files = {}
        if truth is not None:
            with work.folder.publish("groundtruth.json") as file:
                file.path.write_text(json.dumps(truth))
            files["groundtruth.json"] = artifact.entry_of(file)
        work.publish({"rows": len(rows)}, files, shards=2)
    return str(out)


TRUTH = {
    "protocol": "custom", "imlist": None, "queries": [
        {"name": "eiffel_1", "image": "paris_eiffel_000011", "bbx": None, "positive": ["paris_eiffel_000012"], "ignored": []},
        {"name": "trinity_college_1", "image": "paris_trinity_college_000003", "bbx": None, "positive": [], "ignored": []},
    ],
}  # fmt: skip
TEST: list[Row] = [
    ("jpg/paris_eiffel_000011", "jpg", "query", "1"), ("jpg/paris_eiffel_000012", "jpg", "db", "2"),
    ("jpg/paris_trinity_college_000003", "jpg", "query", "3"), ("jpg/paris_general_000001", "jpg", "db", "4"),
    ("airplanes/0001", "airplanes", "distractor", "5"), ("jpg/IMG_0001", None, "db", "6"),
]  # fmt: skip
APART: list[Row] = [
    ("big_ben/000011", "big_ben", "train", "11"), ("jpg/000012", "jpg", "train", "12"), ("17/IMG_0001", "17", "train", "13"),
    ("trinity_church/1", "trinity_church", "train", "14"), ("airplanes/1", "airplanes", "train", "15"),
    ("x/DSC00003", None, "train", "16"), ("general/7", "general", "train", "17"),
]  # fmt: skip


@pytest.fixture
def test_set(tmp_path: Path) -> str:
    return images(tmp_path / "test", TEST, TRUTH)


def test_what_is_apart(test_set: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = images(tmp_path / "train", APART)
    found = overlap.compare([train], [test_set])
    assert not found.found, str(found)
    assert str(found) == "training and test share nothing"
    info = overlap.check([train], [test_set])
    nothing = {"images": 0, "examples": []}
    expected = {"landmarks": nothing, "names": nothing, "files": nothing, "classes": 0, "tests": [test_set]}
    assert info == {**expected, "notes": list(found.notes)}
    # Of classes that are numbers or no words it is said that they were not compared.
    assert [r.message for r in caplog.records] == [
        "overlap: 3 of 6 training classes have no name that says anything, such as '17': whether they are landmarks of "
        "the test is not known"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "way", "pair"),
    [
        (("Eiffel Tower/a", "Eiffel Tower", "train", "21"), "landmarks", ("Eiffel Tower", "eiffel_1")),
        (("b/jpg/PARIS_Eiffel_000012.jpg", None, "train", "22"), "names",
         ("b/jpg/PARIS_Eiffel_000012.jpg", "paris_eiffel_000012")),
        (("c/c", None, "train", "6"), "files", ("c/c", "jpg/IMG_0001")),
    ],
)  # fmt: skip
def test_each_way_finds_it(test_set: str, tmp_path: Path, row: Row, way: str, pair: tuple[str, str]) -> None:
    train = [images(tmp_path / "a", APART), images(tmp_path / "b", [*APART[:3], row])]
    found = overlap.compare(train, [test_set])
    assert {name: getattr(found, name) for name in ("landmarks", "names", "files")} == {
        name: overlap.Shared(1, (pair,)) if name == way else overlap.Shared(0, ())
        for name in ("landmarks", "names", "files")
    }
    assert found.info()[way] == {"images": 1, "examples": [list(pair)]}
    with pytest.raises(
        InputError, match=r"share 1 .*; figures on this test would be too good.*--set allow_overlap=true"
    ):
        overlap.check(train, [test_set])
    assert overlap.check(train, [test_set], allow=True) == found.info()
    # What only asks is not trained on.
    asked = images(tmp_path / "c", [(row[0], row[1], "query", row[3]), *APART[:2]])
    assert not overlap.compare([asked], [test_set]).found


def test_what_is_said(test_set: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Row] = [(f"eiffel/{n}", "eiffel", "train", str(n)) for n in range(7)]
    rows += [("trinity/9", "Trinity", "train", "30")]
    train = [images(tmp_path / "train", rows)]
    found = overlap.compare(train, [test_set])
    text = (
        "training and test share 2 classes with 8 images named like landmarks of the test ('Trinity' and "
        "'trinity_college_1', 'eiffel' and 'eiffel_1'); 6 images with the very bytes of one of the test ('eiffel/2' and "
    )  # fmt: skip
    assert str(found).startswith(text)
    assert str(found).endswith(", …)")
    overlap.check(train, [test_set], allow=True)
    assert caplog.records[-1].message.startswith(f"overlap: {text}")
    assert found.info()["classes"] == 2
    assert len(found.info()["files"]["examples"]) == 5


SAME = {
    "eiffel_tower": "eiffel_000012", "La Défense": "defense_3", "sacre coeur": "sacrecoeur_1",
    "musee_d_orsay": "museedorsay_1", "photos/All-Souls College": "all_souls_000013", "pier_39": "pier_39_000001",
    "room5": "room5_2", "taj_mahal": "jpg/taj_mahal_000107.jpg",
}  # fmt: skip
OTHER = {
    "scene_1": "scene_5_000012", "class_12": "class_12", "christ_the_redeemer": "christ_church_1",
    "trinity_church": "trinity_college_000001", "pier_39": "pier_40_000001", "great_wall_of_china": "wall_street_000001",
    "iron_pillar": "pillar_1", "12": "12_000001", "img": "IMG_0001", "ab": "ab_0001", "tower": "eiffel_tower_000001",
}  # fmt: skip


@pytest.mark.parametrize(("names", "same"), [(SAME, True), (OTHER, False)])
def test_names_of_landmarks(tmp_path: Path, names: dict[str, str], same: bool) -> None:
    """Class of the training set and image of the test set."""
    train = images(tmp_path / "train", [("x", label, "train", "1") for label in names])
    test = images(tmp_path / "test", [(name, None, "db", "2") for name in names.values()])
    found = overlap.compare([train], [test])
    assert dict(found.landmarks.pairs) == (names if same else {})


def test_test_sets_that_are_only_annotation(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{label}/1", label, "train", label) for label in ("All Souls", "petra", "paris/eiffel tower")]
    train = images(tmp_path / "train", [*rows, ("paris_eiffel_000012", None, "train", "x")])
    table = tmp_path / "truth.json"
    table.write_text(json.dumps(TRUTH))
    found = overlap.compare([train], [str(table)])
    assert found.landmarks == overlap.Shared(1, (("paris/eiffel tower", "eiffel_1"),))
    assert found.names.pairs == (("paris_eiffel_000012", "paris_eiffel_000012"),)
    text_files = tmp_path / "gt"
    text_files.mkdir()
    for ending, text in (
        ("query", "oxc1_all_souls_000013 1 2 30 40"),
        ("good", "all_souls_000026"),
        ("ok", ""),
        ("junk", ""),
    ):
        (text_files / f"all_souls_1_{ending}.txt").write_text(text)
    assert overlap.compare([train], [str(text_files)]).landmarks.pairs == (("All Souls", "all_souls_1"),)
    one = tmp_path / "one_landmark.csv"
    one.write_text("query,name\npetra_000001,petra_000002\npetra_000003,petra_000002\n")
    assert overlap.compare([train], [str(one)]).landmarks.pairs == (("petra", "petra_000001"),)
    with pytest.raises(GroundTruthError, match="no ground truth at"):
        overlap.compare([train], [str(tmp_path / "nothing.json")])


@pytest.mark.parametrize(
    "source", ["gldv2-clean", "https://x/google-landmark/train/images_000.tar", "a/train_clean.csv"]
)
def test_google_landmarks_are_warned_of_without_a_test(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    train = images(tmp_path / "train", APART, source=source)
    overlap.check([train], [])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "36 of the 70 queries of ROxford and of 38 of the 70 of RParis (arXiv:2404.01524)" in record.message
    assert overlap.compare([images(tmp_path / "other", APART)], []).notes == ()


# ------------------------------------------------------------------------------------------------ real data


def members(path: Path, split: str) -> list[Row]:
    with tarfile.open(path) as tar:
        names = [m.name.removesuffix(".jpg") for m in tar.getmembers() if m.isfile()]
    return [(name, name.rpartition("/")[0], split, name) for name in names]


def test_the_development_sets_share_nothing(shared: Path, tmp_path: Path) -> None:
    train = images(tmp_path / "train", members(shared / "train19.tar", "train"))
    truth = shared / "groundtruth"
    wonders = images(tmp_path / "wonders", members(shared / "wonders11.tar", "db"))
    tests = [wonders, str(truth / "wonders11" / "gnd_wonders11.pkl"), str(truth / "wonders11" / "gt_files")]
    tests += [str(truth / name) for name in ("oxford5k_gt_files", "paris6k_gt_files")]
    tests += [str(truth / "revisitop" / f"gnd_{name}.pkl") for name in ("roxford5k", "rparis6k")]
    found = overlap.compare([train], tests)
    assert not found.found, str(found)
    assert found.notes == ()
    # And the benchmarks are found in themselves, in whatever form.
    for test in tests[1:]:
        queries = groundtruth.read(test).queries
        rows: list[Row] = [(f"{q.image}", None, "train", "x") for q in queries]
        itself = overlap.compare([images(tmp_path / Path(test).name, rows)], [test])
        assert itself.names.count == len(queries)
    # As classes of a training set, so are the eleven landmarks of the test.
    eleven = sorted({q.name.rpartition("_")[0] for q in groundtruth.read(tests[1]).queries})
    classes: list[Row] = [("x", name.replace("_", " ").title(), "train", "x") for name in eleven]
    hits = overlap.compare([images(tmp_path / "eleven", classes)], tests[1:2]).landmarks
    assert hits.count == len(eleven) == 11
    assert all(test.startswith(train.lower().replace(" ", "_")) for train, test in hits.pairs)


@pytest.mark.ray
@pytest.mark.slow
def test_real_photos(shared: Path, tmp_path: Path, ray_session: None) -> None:
    """Ingested: the two sets share no byte; a photo of the test that got into the training set is found."""
    truth = str(shared / "groundtruth" / "wonders11" / "gnd_wonders11.pkl")
    ingest.run([str(shared / "wonders11.tar")], str(tmp_path / "test"), ingest.IngestConfig(), groundtruth_uri=truth)
    ingest.run([str(shared / "train19.tar")], str(tmp_path / "train"), ingest.IngestConfig(split="train"))
    assert not overlap.compare([str(tmp_path / "train")], [str(tmp_path / "test")]).found
    with tarfile.open(shared / "wonders11.tar") as tar, tarfile.open(tmp_path / "leak.tar", "w") as leak:
        member = next(m for m in tar.getmembers() if m.isfile())
        data = tar.extractfile(member)
        assert data is not None
        leak.addfile(member, io.BytesIO(data.read()))
        member.name, member.size = "harmless/0.jpg", member.size
        data.seek(0)
        leak.addfile(member, data)
    ingest.run([str(tmp_path / "leak.tar")], str(tmp_path / "leak"), ingest.IngestConfig(split="train"))
    found = overlap.compare([str(tmp_path / "train"), str(tmp_path / "leak")], [str(tmp_path / "test")])
    assert (found.landmarks.count, found.names.count, found.files.count) == (0, 1, 2)
    assert {pair[1].rpartition("_")[0] for pair in found.files.pairs} == {"burj_khalifa"}
