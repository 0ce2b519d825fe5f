"""The sets of the catalog by their names: files of the published shapes from a server on loopback, to images/."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_server import Server, serve
from photos import image_rows, jpeg
from photos import tar_of as tar

from iir_dist import artifact, ingest
from iir_dist.data import catalog
from iir_dist.data.catalog import Archive, Dataset
from iir_dist.errors import CorruptError, InputError
from iir_dist.ingest import IngestConfig

pytestmark = pytest.mark.ray
ANY = IngestConfig(max_rejected=1)


def rows(out: Path) -> list[dict[str, object]]:
    return list(image_rows(out).select(["name", "label", "split", "box"]).to_pylist())


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ray_session: None) -> Iterator[object]:
    """publish(name, archives, truth, lists, images): the catalog's entry, with these files at addresses of a server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("IIR_CACHE", str(tmp_path / "cache"))
    with serve() as server:

        def run(
            name: str, archives: dict[str, bytes], truth: tuple[str, bytes] | None = None,
            lists: dict[str, bytes] | None = None, images: int = 0, md5: bool = False,
        ) -> Server:  # fmt: skip
            dataset = catalog.DATASETS[name]
            sums = {f: server.put(f"/{f}.md5", hashlib.md5(d).hexdigest().encode()) for f, d in archives.items() if md5}
            entry = dataclasses.replace(
                dataset,
                archives=tuple(Archive(server.put("/" + f, d), checksum_url=sums.get(f)) for f, d in archives.items()),
                groundtruth=truth and dataset.groundtruth
                and dataclasses.replace(dataset.groundtruth, url=server.put("/" + truth[0], truth[1])),
                lists=tuple(Archive(server.put("/" + f, d)) for f, d in (lists or {}).items()),
                images=images, listed=None,
            )  # fmt: skip
            monkeypatch.setitem(catalog.DATASETS, name, entry)
            return server

        yield run


GT = {
    "all_souls_1_query.txt": b"oxc1_all_souls_000013 1 2 40 30", "all_souls_1_good.txt": b"all_souls_000013\n",
    "all_souls_1_ok.txt": b"oxford_002985\n", "all_souls_1_junk.txt": b"",
}  # fmt: skip


def test_oxford_as_it_was_published_first(publish: object, tmp_path: Path) -> None:
    names = ("all_souls_000013", "all_souls_000026", "oxford_002985")
    photos = {f"{name}.jpg": jpeg(n) for n, name in enumerate(names)}
    server = publish(
        "oxford5k", {"oxbuild.tgz": gzip.compress(tar(photos))}, ("gt.tgz", gzip.compress(tar(GT))), images=3
    )  # type: ignore[operator]
    manifest = ingest.run(["oxford5k"], str(tmp_path / "out"), ANY)
    assert [(row["name"], row["split"], row["box"]) for row in rows(tmp_path / "out")] == [
        *((name, "db", None) for name in names), ("all_souls_000013", "query", [1.0, 2.0, 40.0, 30.0])
    ]  # fmt: skip
    assert manifest.counts["queries"] == 1
    assert (tmp_path / "out" / "groundtruth.json").exists()
    asked = len(server.requests)
    assert ingest.run(["oxford5k"], str(tmp_path / "out"), ANY) == manifest
    assert len(server.requests) == asked  # all of it was there


def test_paris_with_its_corrupt_files_and_the_revisited_annotation(publish: object, tmp_path: Path) -> None:
    one = {f"paris/louvre/paris_louvre_{n:06d}.jpg": jpeg(n) for n in (1, 2)}
    one["paris/louvre/paris_louvre_000136.jpg"] = b"302 Found"
    two = {"paris/pompidou/paris_pompidou_000003.jpg": jpeg(3)}
    truth = {
        "imlist": ["paris_louvre_000001", "paris_pompidou_000003"], "qimlist": ["paris_louvre_000002"],
        "gnd": [{"bbx": [0, 0, 30, 20], "easy": [0], "hard": [], "junk": []}],
    }  # fmt: skip
    archives = {"paris_1.tgz": gzip.compress(tar(one)), "paris_2.tgz": gzip.compress(tar(two))}
    publish("rparis6k", archives, ("gnd.pkl", pickle.dumps(truth, 2)), images=4)  # type: ignore[operator]
    manifest = ingest.run(["rparis6k"], str(tmp_path / "out"), ANY)
    assert [(row["name"], row["split"]) for row in rows(tmp_path / "out")] == [
        ("louvre/paris_louvre_000001", "db"), ("pompidou/paris_pompidou_000003", "db"), ("louvre/paris_louvre_000002", "query")
    ]  # fmt: skip
    assert manifest.counts["rejected_not_an_image"] == 1
    with artifact.require(tmp_path / "out", "ingest")[0].local("rejected.parquet") as path:
        lost = pq.read_table(path).column("name").to_pylist()
    assert {name.rpartition("/")[2] for name in lost} <= set(catalog.get("rparis6k").corrupt)


def test_distractors_of_several_archives(publish: object, tmp_path: Path) -> None:
    archives = {f"revisitop1m.{n}.tar.gz": gzip.compress(tar({f"jpg/00{n}/{n}.jpg": jpeg(n)})) for n in (1, 2, 3)}
    publish("revisitop1m", archives, lists={"revisitop1m.txt": b"1\n2\n3\n"}, images=3)  # type: ignore[operator]
    ingest.run(["revisitop1m"], str(tmp_path / "out"), ANY)
    found = rows(tmp_path / "out")
    assert [row["split"] for row in found] == ["distractor"] * 3
    assert [row["name"] for row in found] == ["001/1", "002/2", "003/3"]  # as if they were one archive
    assert [row["label"] for row in found] == [None] * 3  # its folders are no classes


def test_landmarks_of_a_list_of_classes(publish: object, tmp_path: Path) -> None:
    """GLDv2: the archives are the whole set, the list says which photos are the clean one and of which class."""
    photos = {f"{i[0]}/{i[1]}/{i[2]}/{i}.jpg": jpeg(n) for n, i in enumerate(("00aa", "01bb", "02cc", "03dd"))}
    clean = b"landmark_id,images\n7,00aa 02cc\n19,03dd\n"
    publish("gldv2-clean", {"images_000.tar": tar(photos)}, lists={"train_clean.csv": clean}, images=3, md5=True)  # type: ignore[operator]
    manifest = ingest.run(["gldv2-clean"], str(tmp_path / "out"), ANY)
    found = {str(row["name"]).rpartition("/")[2]: (row["label"], row["split"]) for row in rows(tmp_path / "out")}
    assert found == {"00aa": ("7", "train"), "02cc": ("7", "train"), "03dd": ("19", "train")}
    assert (manifest.counts["in"], manifest.counts["out"], manifest.counts["ignored_files"]) == (3, 3, 1)


def test_photos_without_an_ending(publish: object, tmp_path: Path) -> None:
    """retrieval-SfM: photos are named by their content, classes come as a pickle."""
    photos = {f"ims/{c[-2:]}/{c[-4:-2]}/{c[-6:-4]}/{c}": jpeg(n) for n, c in enumerate(("aabbcc01", "aabbcc02"))}
    classes = {
        "train": {"cids": ["aabbcc01"], "cluster": np.array([4]), "qidxs": np.zeros(1)},
        "val": {"cids": ["aabbcc02"], "cluster": [9]},
    }  # fmt: skip
    archives = {"ims.tar.gz": gzip.compress(tar(photos))}
    publish("retrieval-sfm-120k", archives, lists={"db.pkl": pickle.dumps(classes, 2)}, images=2)  # type: ignore[operator]
    ingest.run(["retrieval-sfm-120k"], str(tmp_path / "out"), ANY)
    assert {str(row["name"]).rpartition("/")[2]: row["label"] for row in rows(tmp_path / "out")} == {
        "aabbcc01": "4", "aabbcc02": "9"
    }  # fmt: skip


def test_a_set_of_which_a_part_is_missing(publish: object, tmp_path: Path) -> None:
    archives = {"revisitop1m.1.tar.gz": gzip.compress(tar({"jpg/000/1.jpg": jpeg(1)}))}
    publish("revisitop1m", archives, images=2)  # type: ignore[operator]
    with pytest.raises(
        InputError, match=r"revisitop1m: its files hold 1 images, 2 were published; an archive is not whole"
    ):
        ingest.run(["revisitop1m"], str(tmp_path / "out"), ANY)


def test_an_address_that_is_gone_says_where_to_place_the_file(publish: object, tmp_path: Path) -> None:
    photos = gzip.compress(tar({"jpg/000/1.jpg": jpeg(1)}))
    server = publish("revisitop1m", {"revisitop1m.1.tar.gz": photos}, images=1)  # type: ignore[operator]
    server.resources.clear()
    place = tmp_path / "cache" / "downloads" / "revisitop1m" / "revisitop1m.1.tar.gz"
    with pytest.raises(InputError, match="place these files, then run the same command again") as error:
        ingest.run(["revisitop1m"], str(tmp_path / "out"), ANY)
    assert str(place) in str(error.value)
    place.write_bytes(photos)
    assert ingest.run(["revisitop1m"], str(tmp_path / "out"), ANY).counts["out"] == 1


def test_known_sets_come_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'oxford5k' is a known set .* ingest it alone"):
        ingest.run(["oxford5k", str(tmp_path)], str(tmp_path / "out"), ANY)


def test_an_archive_at_an_address(publish: object, tmp_path: Path) -> None:
    """Any archive by http, with its checksum; the same rows as from disk, whichever host it came from."""
    data = tar({f"jpg/{n}.jpg": jpeg(n) for n in range(4)})
    (tmp_path / "photos.tar").write_bytes(data)
    server = publish("oxford5k", {"photos.tar": data})  # type: ignore[operator]
    url = server.url("/photos.tar")
    ingest.run([f"{url}#sha256={hashlib.sha256(data).hexdigest()}"], str(tmp_path / "web"), ANY)
    ingest.run([str(tmp_path / "photos.tar")], str(tmp_path / "disk"), ANY)
    web, disk = (artifact.require(tmp_path / name, "ingest")[1] for name in ("web", "disk"))
    assert web.fingerprint == disk.fingerprint
    with pytest.raises(CorruptError, match=r"expected 0{64}"):
        ingest.run([f"{url}#sha256={'0' * 64}"], str(tmp_path / "bad"), ANY)


def test_labels_of_three_forms(tmp_path: Path) -> None:
    from iir_dist.ingest.labels import find_labels, read_labels

    (tmp_path / "a.csv").write_text("name,label\nx/1,rome\n2,7\n")
    (tmp_path / "b.csv").write_text("landmark_id,images\nrome,1\n7,2 3\n")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"train": {"cids": ["1", "2"], "cluster": [5, 6]}, "meta": "x"}))
    assert read_labels(str(tmp_path / "a.csv")).to_pydict() == {"name": ["x/1", "2"], "label": ["rome", "7"]}
    assert read_labels(str(tmp_path / "b.csv")).to_pydict() == {"name": ["1", "2", "3"], "label": ["rome", "7", "7"]}
    assert read_labels(str(tmp_path / "c.pkl")).to_pydict() == {"name": ["1", "2"], "label": ["5", "6"]}
    (tmp_path / "d.csv").write_text("name,label\n0001,07\n")
    assert read_labels(str(tmp_path / "d.csv")).to_pydict() == {"name": ["0001"], "label": ["07"]}
    names = pa.array(["x/1", "y/2", "y/3", "z/3", "q"])
    # By the whole name; else by a last component, unless two have it.
    assert find_labels(names, read_labels(str(tmp_path / "a.csv"))).to_pylist() == ["rome", "7", None, None, None]
    assert find_labels(names, read_labels(str(tmp_path / "b.csv"))).to_pylist() == ["rome", "7", None, None, None]
    wrong = {
        "twice.csv": (b"name,label\na,1\na,2\n", "gives 1 names more than once"),
        "columns.csv": (b"image,class\na,1\n", "has the columns image, class; expected `name` and `label`"),
        "uneven.pkl": (pickle.dumps({"train": {"cids": ["1"], "cluster": []}}), "1 cids but 0 clusters"),
        "other.pkl": (pickle.dumps([1]), "expected a dict of parts"),
        "code.pkl": (pickle.dumps(Dataset), "only lists, dicts, strings, numbers and arrays"),
        "bad.parquet": (b"x", "neither CSV nor Parquet"),
    }
    for name, (data, part) in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=part):
            read_labels(str(tmp_path / name))
