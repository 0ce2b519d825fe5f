"""From a query to an answer, without HTTP: against an exact reference, versions of the index, photos, batches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import indexed
import numpy as np
import pytest
import served

from iir_dist import artifact
from iir_dist.data.images import decode
from iir_dist.errors import (
    ConfigError,
    CorruptError,
    ImageError,
    InputError,
    MismatchError,
    NotFoundError,
    UnreachableError,
)
from iir_dist.index import living
from iir_dist.serve.batches import Batches
from iir_dist.serve.config import ServeConfig
from iir_dist.serve.photos import Photos, media_type
from iir_dist.serve.schema import Reference, Settings
from iir_dist.serve.service import Service

NAMES = list(served.photos(1, 1))


@pytest.fixture
def service(server: tuple[Any, Service]) -> Service:
    """Of the shared server."""
    return server[1]


def opened(collection: served.Collection, **settings: Any) -> Service:
    config = ServeConfig.model_validate({"threads": 1, "poll_sec": 3600, **settings})
    return Service(str(collection.index), config, [str(collection.images)], str(collection.encoder))


def test_a_photo_finds_what_brute_force_finds(collection: served.Collection, service: Service) -> None:
    xb = served.embedded(collection.encoder, collection.photos)
    for name in list(collection.photos)[::5]:
        answer = service.by_photo(collection.photos[name], Settings(k=7, exact=True))
        xq = served.embedded(collection.encoder, {name: collection.photos[name]})
        scores, rows = indexed.brute_force(xq, xb, 7)
        assert [hit.id for hit in answer.hits] == rows[0].tolist()
        np.testing.assert_allclose([hit.score for hit in answer.hits], scores[0], atol=2e-3)  # float16 vectors
        assert answer.hits[0].name == name
        assert answer.used.exact
        assert [hit.rank for hit in answer.hits] == list(range(7))


def test_a_box_is_a_photo_of_its_own(collection: served.Collection, service: Service) -> None:
    import io

    name, data = next(iter(collection.photos.items()))
    out = io.BytesIO()
    decode(data).crop((20, 10, 90, 80)).save(out, "PNG")
    boxed = service.by_photo(data, Settings(k=24, exact=True, box=[20, 10, 90, 80]))
    cropped = service.by_photo(out.getvalue(), Settings(k=24, exact=True))
    assert [hit.id for hit in boxed.hits] == [hit.id for hit in cropped.hits]
    assert (boxed.query.width, boxed.query.height) == decode(data).size
    # A stored photo with a box is embedded again, and gives the same.
    stored = service.by_reference(Reference(name=name, k=24, exact=True, box=[20, 10, 90, 80]))
    assert [hit.score for hit in stored.hits] == [hit.score for hit in boxed.hits]
    assert "embed" in stored.steps_ms


def test_by_id_by_name_and_by_vector_are_one(collection: served.Collection, service: Service) -> None:
    name = list(collection.photos)[13]
    with service.live.using() as version:
        vector = version.vector(version.row(name))[0]
    answers = [
        service.by_reference(Reference.model_validate({**query, "k": 24, "nprobe": 4, "refine": 4}))
        for query in ({"id": 13}, {"name": name}, {"vector": (3 * vector).tolist()})
    ]
    assert answers[0].hits == answers[1].hits
    assert [hit.id for hit in answers[2].hits] == [hit.id for hit in answers[0].hits]
    assert answers[0].query.name == name
    assert "embed" not in answers[0].steps_ms


def test_the_steps_add_up_to_what_a_search_takes(collection: served.Collection, service: Service) -> None:
    data = next(iter(collection.photos.values()))
    answer = service.by_photo(data, Settings(rerank="superglobal", depth=20, nprobe=4, refine=2))
    assert list(answer.steps_ms) == ["queue", "decode", "embed", "coarse", "scan", "refine", "rerank"]
    assert all(ms >= 0 for ms in answer.steps_ms.values())
    assert sum(answer.steps_ms.values()) <= answer.total_ms + 0.1


@pytest.mark.parametrize("name", ["qe", "dba", "diffusion", "superglobal"])
def test_rerankers(service: Service, name: str) -> None:
    from iir_dist.rerank.interface import rerank
    from iir_dist.serve.service import RERANKERS

    answer = service.by_reference(Reference(id=4, k=10, rerank=name, depth=20, exact=True))  # type: ignore[arg-type]
    with service.live.using() as version:
        xq = version.vector(version.row(4))

        def search(queries: Any, k: int) -> Any:
            return version.index.search(queries, k, 4, 24)

        _, rows = rerank(RERANKERS[name](n=20), xq, search(xq, 20)[1], version.vectors.fetch, search)
    assert [hit.id for hit in answer.hits] == rows[0, :10].tolist()


def test_filters(service: Service) -> None:
    answer = service.by_reference(Reference(id=0, k=24, splits=["distractor"]))
    assert answer.used.rows == 12
    assert {hit.split for hit in answer.hits} == {"distractor"}
    answer = service.by_reference(
        Reference(id=0, k=24, splits=["db", "distractor"], prefix="landmark_1/", nprobe=1, refine=50)
    )
    assert sorted(hit.name for hit in answer.hits) == [f"landmark_1/view_{v}" for v in range(served.VIEWS)]
    with pytest.raises(InputError, match="begins with 'nothing'"):
        service.by_reference(Reference(id=0, prefix="nothing"))
    with pytest.raises(InputError, match="split 'other'"):
        service.by_reference(Reference(id=0, splits=["other"]))


def test_operating_points(service: Service) -> None:
    chosen = service.by_reference(Reference(id=0, recall=0.8)).used
    assert (chosen.nprobe, chosen.refine, chosen.recall) == (2, 2, {"database": 0.9})
    usual = service.by_reference(Reference(id=0)).used
    assert (usual.nprobe, usual.refine) == (2, 2)
    with pytest.raises(ConfigError, match="nprobe = 5: the index has 4 lists"):
        service.by_reference(Reference(id=0, nprobe=5))
    assert service.by_reference(Reference(id=0, recall=0.8, rerank="qe")).used.recall == {}  # of another order
    assert service.by_reference(Reference(id=0, recall=0.8, prefix="landmark")).used.recall == {}
    info = service.info()
    assert [(p.nprobe, p.recall) for p in info.points] == [
        (1, {"database": 0.7}),
        (2, {"database": 0.9}),
        (4, {"database": 1.0}),
    ]
    assert (info.rows, info.photos, info.exact) == (24, 24, True)


def test_what_cannot_be_asked(collection: served.Collection, service: Service) -> None:
    data = next(iter(collection.photos.values()))
    with pytest.raises(NotFoundError, match="no id 99"):
        service.by_reference(Reference(id=99))
    with pytest.raises(NotFoundError, match="no name 'x'"):
        service.by_reference(Reference(name="x"))
    with pytest.raises(InputError, match="a vector of 3 numbers"):
        service.by_reference(Reference(vector=[1, 0, 0]))
    with pytest.raises(InputError, match="norm 0"):
        service.by_reference(Reference(vector=[0.0] * 96))
    with pytest.raises(ImageError, match="no pixel"):
        service.by_photo(data, Settings(box=[900, 900, 950, 950]))
    with pytest.raises(ImageError, match="not_an_image"):
        service.by_photo(b"no photo", Settings())


def test_another_encoder_is_refused(collection: served.Collection, tmp_path: Path) -> None:
    from iir_dist.models.encoder import EncoderConfig, run

    run(str(tmp_path / "e"), EncoderConfig(backbone="timm:test_resnet", weights="random", seed=1, size=48))
    with pytest.raises(MismatchError, match="the encoder that the index was made with"):
        opened(collection._replace(encoder=tmp_path / "e"))


def test_a_damaged_index_is_not_served(collection: served.Collection, tmp_path: Path) -> None:
    index = copied(collection.index, tmp_path / "index")
    path = index / "shard-00001.faiss"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"shard-00001\.faiss"):
        opened(collection._replace(index=index))


def test_without_an_encoder_stored_photos_are_searched_with(collection: served.Collection) -> None:
    service = Service(str(collection.index), ServeConfig(threads=1, exact_rows=0))
    assert len(service.by_reference(Reference(id=1)).hits) > 0
    assert service.info().encoder is None
    with pytest.raises(InputError, match="--encoder"):
        service.by_photo(b"", Settings())
    with pytest.raises(ConfigError, match="24 rows; expected at most 0"):
        service.by_reference(Reference(id=1, exact=True))
    with pytest.raises(NotFoundError, match="--images"):
        service.original(1)
    assert service.sample(3, 0)[0].width is None
    service.close()


# ------------------------------------------------------------------------------------------------ versions


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def test_a_new_version_takes_over_and_no_query_is_lost(collection: served.Collection, tmp_path: Path) -> None:
    index = copied(collection.index, tmp_path / "index")
    service = opened(collection._replace(index=index), poll_sec=0.05)
    query = Reference(id=3, k=24, nprobe=4)
    stop, failed, answers = threading.Event(), [], set()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = service.by_reference(query)
            except Exception as error:
                failed.append(error)
                return
            answers.add((answer.index[:8], tuple(sorted(hit.id for hit in answer.hits))))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = service.live.current
    for deleted in (10, 11):
        living.delete(str(index), ids=[deleted])
        fingerprint = artifact.require(index, "index")[1].fingerprint
        deadline = time.monotonic() + 60
        while fingerprint[:8] not in {version for version, _ in set(answers)} and not failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert before.retired
    assert before.users == 0
    assert service.live.reloads == 2
    # One version, one set of rows: never the rows of one under the name of another.
    assert len({version for version, _ in answers}) == len(answers) >= 3
    service.close()


def test_a_version_that_cannot_be_opened_does_not_take_over(collection: served.Collection, tmp_path: Path) -> None:
    index = copied(collection.index, tmp_path / "index")
    service = opened(collection._replace(index=index))
    living.delete(str(index), ids=[5])
    tombstones = next(index.glob("tombstones-*"))
    good = tombstones.read_bytes()
    tombstones.write_bytes(bytes(len(good)))
    assert not service.live.refresh()
    assert "SHA-256" in str(service.info().trouble)
    assert service.info().rows == 24
    assert 5 in {hit.id for hit in service.by_reference(Reference(id=5, k=24, nprobe=4)).hits}
    tombstones.write_bytes(good)
    living.delete(str(index), ids=[6])
    assert service.live.refresh()
    assert service.info().trouble is None
    assert service.info().rows == 22
    with pytest.raises(NotFoundError):
        service.by_reference(Reference(id=5))
    assert not service.live.refresh()  # the same again
    service.close()


def test_what_does_not_last_is_forgotten(
    collection: served.Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that is taken back is no trouble, and one that could not be fetched is tried again."""
    index = copied(collection.index, tmp_path / "index")
    service = opened(collection._replace(index=index))
    before = (index / artifact.MANIFEST).read_bytes()
    living.delete(str(index), ids=list(range(24)))

    def unreachable() -> Any:
        raise UnreachableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(service.live, "_open", unreachable)
        assert not service.live.refresh()
    after = (index / artifact.MANIFEST).read_bytes()
    assert service.info().trouble == "no answer"
    (index / artifact.MANIFEST).write_bytes(before)
    assert not service.live.refresh()
    assert service.info().trouble is None
    (index / artifact.MANIFEST).write_bytes(after)
    assert service.live.refresh()
    # Of nothing, nothing is found.
    for exact in (False, True):
        assert service.by_reference(Reference(vector=[1.0] * 96, exact=exact, rerank="qe")).hits == []
    assert service.sample(3, 0) == []
    service.close()


# ------------------------------------------------------------------------------------------------ photos


def test_photos_that_were_not_embedded_are_told(
    collection: served.Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served.write_images(tmp_path / "images", dict(list(collection.photos.items())[:12]))
    for images, told in ((collection.images, 0), (tmp_path / "images", 1)):
        caplog.clear()
        service = Service(str(collection.index), ServeConfig(threads=1), [str(images)])
        assert caplog.text.count("was not made from") == told
        assert service.info().photos == (12 if told else 24)
        service.close()


def test_stored_photos_by_row(collection: served.Collection, service: Service) -> None:
    for number, (name, data) in enumerate(collection.photos.items()):
        assert service.original(number)[0] == data, name  # not that of the query of the same name
        assert service.live.current.photos.size(number) == decode(data).size


def test_small_copies_are_bounded(collection: served.Collection, service: Service) -> None:
    version = service.live.current
    photos = Photos([artifact.require(collection.images, "ingest")], version.names, thumbnail_bytes=20_000, threads=1)
    first = photos.small(0, 160)
    for row in range(24):
        assert max(decode(photos.small(row, 160)).size) <= 160
        assert photos._held <= 20_000
    assert photos._held == sum(map(len, photos._small.values())) > 0
    assert photos.small(0, 160) == first


def test_a_damaged_shard_of_photos_is_not_shown(
    collection: served.Collection, service: Service, tmp_path: Path
) -> None:
    images = copied(collection.images, tmp_path / "images")
    path = images / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    photos = Photos([artifact.require(images, "ingest")], service.live.current.names, 0, 1)
    assert photos.read(0) == next(iter(collection.photos.values()))
    with pytest.raises(CorruptError, match="shard-00001"):
        photos.read(20)
    # Nor one that is taken away, or becomes another, after it was checked.
    for change in (lambda p: p.write_bytes(b"PAR1" + bytes(500)), lambda p: p.unlink()):
        change(images / "shard-00000.parquet")
        with pytest.raises(CorruptError, match="shard-00000"):
            photos.read(0)


def test_only_what_browsers_show_has_a_type() -> None:
    assert media_type(b"\xff\xd8\xff\xe0") == "image/jpeg"
    assert media_type(b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>") == "application/octet-stream"
    assert media_type(b"<html>") == "application/octet-stream"


# ------------------------------------------------------------------------------------------------ batches


def test_what_waits_is_answered_together() -> None:
    gate, sizes = threading.Event(), []

    def work(items: Any) -> Any:
        gate.wait()
        sizes.append(len(items))
        return [ValueError(str(i)) if i == 3 else i * i for i in items]

    batches: Batches[int, int] = Batches("test", work, most=4)
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(batches, i) for i in range(9)]
        while batches.waiting < 5:
            time.sleep(0.001)
        gate.set()
        for i, future in enumerate(futures):
            if i == 3:
                with pytest.raises(ValueError, match="3"):
                    future.result()
            else:
                assert future.result().result == i * i
    assert sum(sizes) == 9
    assert max(sizes) == 4
    batches.close()


def test_a_batch_that_fails_fails_for_each_and_the_next_one_runs() -> None:
    def work(items: Any) -> Any:
        if items[0] < 0:
            raise OSError("gone")
        return items

    batches: Batches[int, int] = Batches("test", work, most=4)
    with pytest.raises(OSError, match="gone"):
        batches(-1)
    assert batches(1).result == 1
    batches.close()
