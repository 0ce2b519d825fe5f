"""A step of fine-tuning: the same pixels and the same gradient however they are made, batches, memory, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iir_dist import artifact
from iir_dist.data.cache import Photos
from iir_dist.errors import InputError
from iir_dist.losses.pairwise import batch_average_precision
from iir_dist.models.encoder import load
from iir_dist.train.finetune_config import FinetuneConfig
from iir_dist.train.finetune_task import FinetuneTask
from iir_dist.train.validate import HeldOut, Validation, kept_aside

pytestmark = pytest.mark.ray  # the images are ingested by it

BASE: dict[str, Any] = {
    "projection": None, "size": 48, "batches": {"name": "classes", "classes": 3, "per_class": 3}, "chunk": 4, "steps": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(images: Path) -> Photos:
    return Photos([artifact.require(images / "train", "ingest")])


def task_of(photos: Photos, encoder: Path, **changes: Any) -> FinetuneTask:
    return FinetuneTask(
        photos, load(*artifact.require(encoder, "encoder")), FinetuneConfig.model_validate(BASE | changes)
    )


def gradient(task: FinetuneTask, step: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    task.model.zero_grad(set_to_none=True)
    outcome = task.step(step, scale)
    found = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    return {**found, "loss": torch.tensor(outcome.loss), "ap": torch.tensor(outcome.ap)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_pixels_are_the_same_decoded_twice_or_kept_here_or_by_loaders(photos: Photos, encoder: Path) -> None:
    kept = task_of(photos, encoder)
    expected = [gradient(kept, step) for step in range(2)]
    twice = task_of(photos, encoder, pixels_gb=0.0)
    assert len(twice._plan(0)) == 2 * len(kept._plan(0)) == 6
    assert all(equal(gradient(twice, step), expected[step]) for step in range(2))
    started = twice.stream._chunks
    gradient(twice, 2)
    assert twice.stream._chunks is started  # loaders go on from step to step
    elsewhere = task_of(photos, encoder, loaders=1)
    assert equal(gradient(elsewhere, 1), expected[1])  # begun in the middle, as a resumed run does
    assert not equal(expected[0], expected[1])


def test_the_gradient_is_that_of_one_graph(photos: Photos, encoder: Path) -> None:
    """In float64, the whole batch at once, autograd through loss and network."""
    task = task_of(photos, encoder, loss={"name": "smooth_ap", "temperature": 0.1})
    task.model.double()
    batch = task.sampler.batch(0)
    x = torch.cat([chunk.double() / 255 for chunk in task_of(photos, encoder).stream.chunks(0)])
    labels = torch.from_numpy(task.labels[batch])
    task._embed = task.encoder.describe  # type: ignore[method-assign]
    task._passes = lambda step, count: lambda: x.split(4)  # type: ignore[method-assign]
    found = gradient(task, 0)
    task.model.zero_grad(set_to_none=True)
    z = task.encoder.describe(x)
    same = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)
    s = z @ z.T
    loss = torch.zeros((), dtype=torch.float64)
    for q in range(len(z)):
        ap = torch.zeros((), dtype=torch.float64)
        for i in same[q].nonzero().flatten().tolist():
            others = [j for j in range(len(z)) if j not in (q, i)]
            above = torch.sigmoid((s[q, others] - s[q, i]) / 0.1)
            ap = ap + (1 + (above * same[q, others]).sum()) / (1 + above.sum())
        loss = loss + (1 - ap / same[q].sum()) / len(z)
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-6)  # the loss is told as a float32 here
    for name, p in task.model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(found[name], p.grad, atol=1e-10, rtol=0), name


def test_bfloat16_gives_about_the_same_gradient(photos: Photos, encoder: Path) -> None:
    full, half = gradient(task_of(photos, encoder)), gradient(task_of(photos, encoder, precision="bfloat16"))
    a, b = (torch.cat([v.flatten() for n, v in g.items() if n not in ("loss", "ap")]) for g in (full, half))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
    assert half["encoder.trunk.net.conv1.weight"].dtype == torch.float32


def test_the_gradient_is_scaled_and_the_loss_is_not(photos: Photos, encoder: Path) -> None:
    one, many = gradient(task_of(photos, encoder)), gradient(task_of(photos, encoder), scale=1024.0)
    assert torch.equal(one["loss"], many["loss"])
    assert torch.allclose(1024 * one["encoder.pool.p"], many["encoder.pool.p"], rtol=1e-5)


def test_a_memory_changes_later_steps_and_travels_in_the_checkpoint(photos: Photos, encoder: Path) -> None:
    plain, remembering = task_of(photos, encoder), task_of(photos, encoder, memory={"size": 16, "start": 0})
    assert equal(gradient(plain, 0), gradient(remembering, 0))
    assert remembering.state is not None
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in remembering.state.state_dict().items()}
    expected = gradient(remembering, 1)
    assert not equal(gradient(plain, 1), expected)
    resumed = task_of(photos, encoder, memory={"size": 16, "start": 0})
    assert resumed.state is not None
    resumed.state.load_state_dict(state)
    assert equal(gradient(resumed, 1), expected)


@pytest.mark.parametrize(
    "batches", [{"classes": 4, "per_class": 2}, {"name": "balanced", "size": 8, "per_class": 2}, {"name": "random", "size": 8}]
)  # fmt: skip
def test_every_kind_of_batch_trains(photos: Photos, encoder: Path, batches: dict[str, Any]) -> None:
    task = task_of(photos, encoder, batches=batches)
    assert task.images_per_step(0) == 8
    assert gradient(task)["encoder.pool.p"].isfinite()
    names = task.names(0, [0, 3])
    assert names == [photos[int(n)].name for n in task.sampler.batch(0)[[0, 3]]]


def test_held_out_classes_are_not_trained_on(photos: Photos, encoder: Path) -> None:
    config = Validation(classes=2, per_class=3)
    aside = kept_aside(photos.labels, config)
    assert len(aside) == 2
    assert aside == kept_aside(photos.labels[::-1], config)
    assert aside != kept_aside(photos.labels, Validation(classes=2, seed=3))
    task = task_of(photos, encoder, validation=config.model_dump(), batches={"name": "random", "size": 8})
    seen = {photos.labels[int(n)] for step in range(20) for n in task.sampler.batch(step)}
    assert seen == set(photos.labels) - aside
    with pytest.raises(InputError, match=r"validation\.classes = 99, but \d+ classes have two or more images"):
        kept_aside(photos.labels, Validation(classes=99))
    assert kept_aside(photos.labels, Validation()) == frozenset()


def test_validation_is_exact_map_of_what_embedding_would_give(photos: Photos, encoder: Path) -> None:
    from iir_dist.data.images import decode, prepare

    network = load(*artifact.require(encoder, "encoder"))
    aside = kept_aside(photos.labels, Validation(classes=2))
    numbers = [n for n, label in enumerate(photos.labels) if label in aside]
    with torch.no_grad():
        z = torch.cat([
            network(torch.tensor(prepare(decode(photos[n].data), 64, "long")).permute(2, 0, 1)[None] / 255) for n in numbers
        ])  # fmt: skip
    labels = torch.tensor(np.unique([photos.labels[n] for n in numbers], return_inverse=True)[1])
    network.train()
    found = HeldOut(photos, aside, Validation(classes=2), chunk=4).mean_average_precision(network, torch.device("cpu"))
    assert found == pytest.approx(batch_average_precision(z, labels), abs=1e-6)
    assert network.training


def test_a_loss_that_learns_counts_its_gradient_once(
    photos: Photos, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iir_dist.train import collectives

    one = gradient(task_of(photos, encoder, loss={"name": "arcface"}))
    assert one["loss.weight"].abs().sum() > 0
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    other = task_of(photos, encoder, loss={"name": "arcface"})
    monkeypatch.undo()
    assert "loss.weight" not in gradient(other) or not gradient(other)["loss.weight"].any()


def test_the_gradient_of_a_loss_that_learns_is_scaled_too(photos: Photos, encoder: Path) -> None:
    one, many = (gradient(task_of(photos, encoder, loss={"name": "arcface"}), scale=scale) for scale in (1.0, 64.0))
    assert torch.allclose(64 * one["loss.weight"], many["loss.weight"], rtol=1e-5)
    assert torch.allclose(64 * one["encoder.pool.p"], many["encoder.pool.p"], rtol=1e-4)


def test_a_worker_may_have_no_share(photos: Photos, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iir_dist.train import collectives

    task = task_of(photos, encoder)
    with monkeypatch.context() as patch:
        patch.setattr(collectives, "world_size", lambda: 99)
        patch.setattr(collectives, "gather", lambda x: (x, 0))
        assert gradient(task)["loss"] == 0.0
        assert task.stream._step == 1


def test_a_projection_wider_than_its_sample_starts_the_same_whatever_the_rounding() -> None:
    from iir_dist.models.encoder import EncoderConfig, centre, create, project

    v = torch.nn.functional.normalize(torch.rand(40, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    found = []
    for noise in (0.0, 1e-7):
        network = project(create(EncoderConfig(backbone="resnet18", weights="random")), 100)
        centre(network, v + noise * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)))
        assert network.projection is not None
        found.append(network.projection.weight.detach())
    assert torch.allclose(found[0], found[1], atol=1e-3)
    assert torch.allclose(found[0] @ found[0].T, torch.eye(100), atol=1e-5)
