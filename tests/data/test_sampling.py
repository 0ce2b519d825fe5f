"""Batches and views are pure functions of seed and step."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iir_dist.data import augment
from iir_dist.data.sampling import BalancedSampler, ClassSampler, RandomSampler, Sampler, TupleSampler, epoch_batch
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
    for make in (
        lambda labels: ClassSampler.of(labels, 2, 2, 0),
        lambda labels: BalancedSampler.of(labels, 4, 2, 0),
        lambda labels: RandomSampler.of(labels, 2, 0),
    ):
        with pytest.raises(InputError, match="1 classes have two or more images"):
            make(["a", "a", "b", None])


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=8), per_class=st.integers(2, 4), turns=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_balanced_batches(sizes: list[int], per_class: int, turns: int, seed: int) -> None:
    labels = [f"c{number}" for number, size in enumerate(sizes) for _ in range(size)] + [None] * 3
    batch = turns * per_class
    try:
        sampler = BalancedSampler.of(labels, batch, per_class, seed)
    except InputError:  # tested below
        return
    usable = [size for size in sizes if size >= per_class]
    seen: list[int] = []
    for step in range(25):
        numbers = sampler.batch(step).tolist()
        assert len(set(numbers)) == len(numbers) == batch == sampler.batch_size
        assert numbers == sampler.batch(step).tolist()
        for start in range(0, batch, per_class):  # each has its positives beside it
            assert len({labels[n] for n in numbers[start : start + per_class]}) == 1
        seen += numbers
    # Classes come equally often, whatever their size: up to the round that is not at its end, exactly.
    turn = Counter(labels[n] for n in seen[::per_class])
    assert len(turn) == len(usable)
    assert max(turn.values()) - min(turn.values()) <= 1
    # And every image of a class comes before one comes again.
    for label in turn:
        own = [n for n in seen if labels[n] == label]
        size = labels.count(label)
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size


def test_balanced_epochs_differ() -> None:
    sampler = BalancedSampler.of(["a"] * 30 + ["b"] * 30, 4, 2, seed=0)
    epochs = [[n for s in range(e * 15, e * 15 + 15) for n in sampler.batch(s).tolist() if n < 30] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(30))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("batch", "per_class", "message"),
    [
        (7, 2, "a batch of 7 images with 2 of each class; expected 2 or more of a class, and a batch"),
        (4, 1, "a batch of 4 images with 1 of each class"),
        (12, 6, "1 classes have 6 or more images; expected two, or ask for fewer of a class"),
        (20, 2, "a batch of 20 images of 3 classes takes up to 8 of one class, and 'c' has 2; ask for a smaller batch"),
    ],
)
def test_what_balanced_batches_cannot_be(batch: int, per_class: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BalancedSampler.of(["a"] * 9 + ["b"] * 5 + ["c"] * 2, batch, per_class, 0)


def test_random_batches_are_epochs_of_what_has_a_label() -> None:
    labels = [None, "a", "a", "lonely", None, "b", "b", "b"]
    sampler = RandomSampler.of(labels, 3, seed=5)
    for epoch in range(3):
        seen = np.concatenate([sampler.batch(2 * epoch + s) for s in range(2)])
        assert sorted(seen.tolist()) == [1, 2, 3, 5, 6, 7]
    with pytest.raises(InputError, match="a batch of 7 needs at least as many images; there are 6"):
        RandomSampler.of(labels, 7, 0)


def test_batches_of_tuples(tmp_path: Path) -> None:
    images = np.arange(28).reshape(7, 4)  # 7 tuples: query, positive, two negatives
    columns = {"query": images[:, 0], "positive": images[:, 1], "negatives": images[:, 2:].tolist()}
    pq.write_table(pa.table(columns), tmp_path / "tuples.parquet")
    sampler = TupleSampler.read(str(tmp_path / "tuples.parquet"), tuples=3, seed=2, first_step=10)
    assert np.array_equal(sampler.images, images)
    assert sampler.batch_size == 12
    first = np.concatenate([sampler.batch(10), sampler.batch(11)]).reshape(6, 4)
    assert len({tuple(t) for t in first.tolist()} & {tuple(t) for t in images.tolist()}) == 6
    assert not np.array_equal(first, np.concatenate([sampler.batch(12), sampler.batch(13)]).reshape(6, 4))
    assert np.array_equal(sampler.batch(10), TupleSampler.of(images, 3, seed=2).batch(0))
    with pytest.raises(InputError, match="7 tuples were mined, and a batch takes 8; mine with more queries"):
        TupleSampler.of(images, 8, 0)


def test_an_image_of_two_tuples_is_in_a_batch_once() -> None:
    images = np.array([[0, 1, 8], [2, 3, 8], [4, 0, 9]])
    sampler = TupleSampler.of(images, 3, seed=0)
    for step in range(5):
        batch = sampler.batch(step).tolist()
        assert sorted(batch) == [0, 1, 2, 3, 4, 8, 9]
        order = [t for t in images.tolist() if t[0] in batch]
        assert {tuple(t) for t in order} == {tuple(t) for t in images.tolist()}
        assert batch[:3] in images.tolist()  # the first tuple is whole, those after it lack what was there


def test_all_are_samplers_that_workers_can_be_sent() -> None:
    labels = ["a"] * 6 + ["b"] * 6
    samplers: list[Sampler] = [
        ClassSampler.of(labels, 2, 2, 0), BalancedSampler.of(labels, 4, 2, 0), RandomSampler.of(labels, 4, 0),
        TupleSampler.of(np.arange(12).reshape(3, 4), 1, 0),
    ]  # fmt: skip
    for sampler in samplers:
        batch = sampler.batch(3)
        assert batch.dtype == np.int64
        assert len(batch) == sampler.batch_size == 4
        assert np.array_equal(pickle.loads(pickle.dumps(sampler)).batch(3), batch)  # noqa: S301


def test_a_view_is_a_function_of_its_seed() -> None:
    view = augment.mild(32)
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
    assert first.dtype == torch.uint8
    assert first.min() < first.max()


def test_seeds_depend_on_every_part() -> None:
    seeds = {augment.seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= s < 2**63 for s in seeds)
