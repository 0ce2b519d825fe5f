"""Batches and views are pure functions of seed and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iir_dist.data import augment
from iir_dist.data.sampling import ClassSampler, epoch_batch
from iir_dist.errors import InputError


@given(n=st.integers(2, 50), batch=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_sees_each_image_once(n: int, batch: int, seed: int, epoch: int) -> None:
    if batch > n:
        with pytest.raises(InputError, match=f"a batch of {batch} needs"):
            epoch_batch(n, batch, 0, seed)
        return
    steps = n // batch
    seen = np.concatenate([epoch_batch(n, batch, epoch * steps + s, seed) for s in range(steps)])
    assert len(seen) == len(set(seen.tolist())) == steps * batch
    assert set(seen.tolist()) <= set(range(n))


def test_epochs_differ() -> None:
    assert not np.array_equal(epoch_batch(50, 50, 0, 0), epoch_batch(50, 50, 1, 0))


def test_class_batches() -> None:
    labels = ["a"] * 5 + ["b"] * 3 + ["lonely"] + [None] * 4 + ["c"] * 2
    sampler = ClassSampler.of(labels, num_classes=2, per_class=3, seed=1)
    for step in range(20):
        batch = sampler.batch(step)
        assert np.array_equal(batch, sampler.batch(step))
        assert len(set(batch.tolist())) == len(batch)
        counts = {label: [labels[i] for i in batch].count(label) for label in {labels[i] for i in batch}}
        assert len(counts) == 2
        assert set(counts) <= {"a", "b", "c"}
        assert all(count == (2 if label == "c" else 3) for label, count in counts.items())
    assert not all(np.array_equal(sampler.batch(0), sampler.batch(s)) for s in range(1, 20))


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(InputError, match="1 classes have two or more images"):
        ClassSampler.of(["a", "a", "b", None], 2, 2, 0)


@pytest.mark.parametrize("recipe", [augment.contrastive, augment.mild])
def test_a_view_is_a_function_of_its_seed(recipe: object) -> None:
    view = recipe(32)  # type: ignore[operator]
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGB")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = view(image, 5)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    torch.rand(3)
    assert torch.equal(first, view(image, 5))
    assert not torch.equal(first, view(image, 6))
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1


def test_seeds_depend_on_every_part() -> None:
    seeds = {augment.seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= s < 2**63 for s in seeds)
