"""Pretraining on a set in parts: the same on any number of workers, none of which opens what it does not need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pretrain_worker import STEPS, config_of, trained
from pydantic import ValidationError
from test_pretrain import assert_equal, on_workers

from iir_dist import artifact
from iir_dist.data.cache import Photos
from iir_dist.data.parts import deal, numbers, photo_counts
from iir_dist.errors import ConfigError, InputError
from iir_dist.models.encoder import create
from iir_dist.train import checkpoints, collectives, launch, pretrain
from iir_dist.train.pretrain_task import PretrainTask
from iir_dist.train.views import Key


@pytest.mark.parametrize("case", ["simclr/parts", "moco_v2/parts"])
def test_workers_plan_the_same_batches_and_open_their_part(
    case: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of all workers together, in order; each worker can make its own of what it opened, and opened no more."""
    sources = [artifact.require(images / "unlabelled", "ingest")]
    counts, settings = photo_counts(sources), config_of(case, steps=6)
    owners = {n: part for part, own in enumerate(deal(counts, 2)) for n in numbers(counts, own).tolist()}
    plans: list[list[list[Key]]] = []
    for world in (1, 2, 4):
        found: list[list[list[Key]]] = [[] for _ in range(6)]
        monkeypatch.setattr(collectives, "world_size", lambda world=world: world)
        for rank in range(world):
            monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
            photos = pretrain.open_photos(sources, settings, counts)
            needed = {0, 1} if world == 1 else {2 * rank // world}
            here = {n for n in owners if not photos.name(n).startswith(f"photo {n} (")}
            assert here == {n for n, part in owners.items() if part in needed}
            task = PretrainTask(photos, create(settings.encoder), settings)
            for step in range(6):
                keys = task._keys(step)
                assert {key.number for chunk in keys for key in chunk} <= here
                assert all(len({owners[key.number] for key in chunk}) == 1 for chunk in keys)
                found[step] += keys
        plans.append(found)
    assert plans[0] == plans[1] == plans[2]
    assert [len({key.number for chunk in step for key in chunk}) for step in plans[0]] == [8] * 6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_open_their_part_and_train_the_same_network(workers: int, images: Path, tmp_path: Path) -> None:
    cases = ["moco_v2/parts", "simclr/parts"]
    found = on_workers(workers, tmp_path, images, cases)
    for case in cases:
        one = trained(str(images / "unlabelled"), case, tmp_path / case.replace("/", "-"))
        opened = one["opened"].tolist()
        assert len(opened) == 2
        assert min(opened) > 0
        for rank, worker in enumerate(found):
            own = {name.removeprefix(f"{case}//"): x for name, x in worker.items() if name.startswith(f"{case}//")}
            assert_equal(own, one, 1e-8)
            # Two chunks of each part: of three workers the last has the second part, the others a chunk of the first.
            part = 2 * rank // workers
            assert own["opened"].tolist() == [n if number == part else 0 for number, n in enumerate(opened)]


def test_photos_of_other_parts_are_named_by_their_place(images: Path) -> None:
    sources = [artifact.require(images / "unlabelled", "ingest")]
    counts, whole = photo_counts(sources), Photos(sources)
    settings = config_of("simclr/parts")
    task = PretrainTask(Photos(sources, counts, deal(counts, 2)[0]), create(settings.encoder), settings)
    here, elsewhere = task.sampler.batch(0)[[0, 7]].tolist()
    assert task.names(0, [0]) == [whole[here].name]
    assert task.names(0, [7])[0].startswith(f"photo {elsewhere} (number ")
    assert len(task.names(0, [])) == 8


def test_what_cannot_be_cut_into_parts(images: Path) -> None:
    settings = config_of("moco_v2/parts", chunk=4)
    with pytest.raises(
        ConfigError, match=r"moco_v2 embeds .* the 4 photos of a batch and part are one chunk; .* at most 2"
    ):
        PretrainTask(Photos([artifact.require(images / "unlabelled", "ingest")]), create(settings.encoder), settings)
    with pytest.raises(
        ValidationError, match="parts = 3 leaves 2 photos of a batch of 8 to each part; expected at least"
    ):
        config_of("simclr", parts=3, chunk=3)
    with pytest.raises(ValidationError, match="parts = 8 leaves 1 photos"):
        config_of("simclr", parts=8, chunk=None)
    with pytest.raises(ValidationError, match="insclr takes neighbours from all of the set; expected parts = 1, not 2"):
        config_of("insclr/parts")


def test_counts_go_to_the_workers_and_uneven_parts_are_said(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(images / "unlabelled")
    counts = photo_counts([artifact.require(uri, "ingest")])
    sent = {}

    def launched(body: object, arguments: dict[str, object], **_: object) -> None:
        sent.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch", launched)
    for parts, expected in ((1, []), (2, counts)):
        with pytest.raises(KeyboardInterrupt):
            pretrain.run([uri], str(tmp_path / f"{parts}"), config_of("simclr", parts=parts, batch=4))
        assert json.loads(json.dumps(sent["counts"])) == expected
    assert not caplog.records
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "photo_counts", lambda _: [40, 8, 8])
        pretrain.run([uri], str(tmp_path / "uneven"), config_of("simclr/parts"))
    assert (
        "2 parts of 3 shards are so uneven that an epoch leaves out 43% of the photos, others each time" in caplog.text
    )
    with pytest.raises(InputError, match=f"lie in {len(counts)} shards, which cannot make {len(counts) + 1} parts"):
        pretrain.run([uri], str(tmp_path / "many"), config_of("simclr", parts=len(counts) + 1, batch=24))


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_of_two_workers_begins_as_a_run_of_one(images: Path, tmp_path: Path) -> None:
    logs = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        pretrain.run([str(images / "unlabelled")], str(out), config_of("moco_v2/parts", workers=workers))
        logs.append([json.loads(line) for line in (out / checkpoints.LOG).read_text().splitlines()])
    assert len(logs[0]) == len(logs[1]) == STEPS
    # Later steps part: in float32, batch norm over two photos magnifies what rounding differs by.
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-5)
