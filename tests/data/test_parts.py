"""A set in parts: which shards are whose, how random batches remain, and that only what is needed is copied."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cache import copies, expected, make, rows

from iir_dist import artifact
from iir_dist.data import cache
from iir_dist.data.cache import Photos
from iir_dist.data.parts import deal, numbers, photo_counts, slots
from iir_dist.data.sampling import EpochSampler, epoch_batch
from iir_dist.errors import CorruptError, InputError, MismatchError, StorageError

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("IIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IIR_CACHE_GB", raising=False)
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------ the rule


@given(counts=COUNTS, parts=st.integers(1, 12))
def test_every_shard_is_dealt_once_and_parts_differ_by_a_shard(counts: list[int], parts: int) -> None:
    if len(counts) < parts:
        with pytest.raises(InputError, match=f"lie in {len(counts)} shards, which cannot make {parts} parts"):
            deal(counts, parts)
        return
    dealt = deal(counts, parts)
    assert len(dealt) == parts
    assert sorted(shard for own in dealt for shard in own) == list(range(len(counts)))
    sizes = [sum(counts[shard] for shard in own) for own in dealt]
    assert max(sizes) - min(sizes) <= max(counts)
    members = [numbers(counts, own) for own in dealt if own]
    assert sorted(np.concatenate(members).tolist()) == list(range(sum(counts)))


def test_a_set_in_order_of_its_classes_is_spread() -> None:
    assert deal([5] * 8, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_one_part_is_one_permutation() -> None:
    sampler = EpochSampler.of([7, 0, 30], 1, 8, seed=3)
    for step in range(13):
        assert np.array_equal(sampler.batch(step), epoch_batch(37, 8, step, 3))
    assert [sampler.epoch(step) for step in (0, 3, 4, 8)] == [0, 0, 1, 2]


@given(counts=COUNTS, parts=st.integers(1, 4), batch=st.integers(1, 12), seed=st.integers(0, 9))
def test_a_batch_takes_its_share_of_each_part(counts: list[int], parts: int, batch: int, seed: int) -> None:
    try:
        sampler = EpochSampler.of(counts, parts, batch, seed)
    except InputError:
        sizes = [sum(counts[s] for s in own) for own in deal(counts, parts)] if len(counts) >= parts else [0]
        assert len(counts) < parts or batch < parts or min(sizes) < -(-batch // parts)
        return
    dealt = deal(counts, parts)
    for epoch in range(2):
        steps = range(epoch * sampler.steps, (epoch + 1) * sampler.steps)
        batches = [sampler.batch(step) for step in steps]
        seen = np.concatenate(batches)
        assert len(seen) == len(set(seen.tolist())) == sum(counts) - sampler.left_out
        for shards, (start, stop) in zip(dealt, slots(batch, parts), strict=True):
            assert np.isin([b[start:stop] for b in batches], numbers(counts, shards)).all()
    if batch % parts == 0:
        assert sampler.left_out < (parts - 1) * max(counts) + batch
    # Whoever asks, in whatever order: a resumed run, another worker.
    again = EpochSampler.of(counts, parts, batch, seed)
    for step in reversed(range(2 * sampler.steps)):
        assert np.array_equal(again.batch(step), sampler.batch(step))


def test_parts_too_small_for_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match=r"a batch of 12 needs .* there are 14; the 3 parts of the set have 8, 4, 2"):
        EpochSampler.of([8, 4, 2], 3, 12, 0)
    with pytest.raises(InputError, match="a batch of 2 needs"):
        EpochSampler.of([8, 8, 8], 3, 2, 0)
    with pytest.raises(InputError, match=r"a batch of 20 needs at least as many images; there are 14$"):
        EpochSampler.of([8, 4, 2], 1, 20, 0)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_two_photos_meet_about_as_often(parts: int) -> None:
    """As often as the docstring says, which is nearly as often as in one permutation of all; pairs do not differ."""
    n, batch, epochs = 48, 16, 3000
    sampler = EpochSampler.of([4] * 12, parts, batch, seed=1)
    part_of = np.zeros(n, int)
    for part, own in enumerate(sampler.members):
        part_of[own] = part
    present = np.zeros((epochs * sampler.steps, n), np.float32)
    for step in range(len(present)):
        present[step, sampler.batch(step)] = 1
    assert sampler.left_out == 0
    assert (present.reshape(epochs, -1, n).sum(axis=1) == 1).all()
    met = present.T @ present
    first, second = np.triu_indices(n, 1)
    same = part_of[first] == part_of[second]
    chance = np.where(same, (batch - parts) / (n - parts), batch / n)  # in an epoch
    z = (met[first, second] - epochs * chance) / np.sqrt(epochs * chance * (1 - chance))
    uniform = epochs * (batch - 1) / (n - 1)
    for kind in (same, ~same):
        if kind.any():
            assert 0.8 < np.square(z[kind]).mean() < 1.2  # pairs of one kind differ by chance alone
            assert met[first, second][kind].mean() == pytest.approx(epochs * chance[kind][0], rel=1e-6)
    assert np.abs(z).max() < 5
    # So small a batch is the worst case: 4 photos of a part, of which another one meets only 3.
    lowest, highest = {1: (0.85, 1.15), 2: (0.85, 1.15), 4: (0.75, 1.15)}[parts]
    assert lowest < met.min(where=~np.eye(n, dtype=bool), initial=np.inf) / uniform
    assert met.max(where=~np.eye(n, dtype=bool), initial=0) / uniform < highest


def test_what_an_epoch_leaves_out_changes() -> None:
    counts = [10, 10, 9, 8, 8, 7, 7]
    sampler = EpochSampler.of(counts, 3, 6, seed=0)
    sizes = [len(own) for own in sampler.members]
    assert sorted(sizes) == [17, 18, 24]
    assert sampler.left_out == 59 - 6 * 8
    epochs = 400
    seen = np.zeros(sum(counts), int)
    for step in range(epochs * sampler.steps):
        seen[sampler.batch(step)] += 1
    for own in sampler.members:  # all photos of a part equally often, however many of them are left out
        chance = 2 * sampler.steps / len(own)
        assert np.abs(seen[own] - epochs * chance).max() <= 4.5 * np.sqrt(epochs * chance * (1 - chance))


# ------------------------------------------------------------------------------------------------ the shards


def test_counts_are_those_of_the_photos(tmp_path: Path) -> None:
    uris = make(tmp_path / "one", shards=3), make(tmp_path / "two", rows=4), make(tmp_path / "three", query=1)
    sources = [artifact.require(uri, "ingest") for uri in uris]
    assert photo_counts(sources) == Photos(sources).counts == [26, 26, 26, 4, 0]
    (Path(uris[1]) / "shard-00000.parquet").write_bytes(b"no Parquet")
    with pytest.raises(CorruptError, match=r"two/shard-00000.parquet cannot be read .*; run iir verify .*two"):
        photo_counts(sources)


def test_only_what_is_asked_for_is_opened(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = make(tmp_path / "one", shards=3), make(tmp_path / "two", shards=2)
    sources = [artifact.require(uri, "ingest") for uri in uris]
    paths, want = [path for uri in uris for path in copies(uri)], expected(*uris)
    counts = photo_counts(sources)
    size = max(Path(uri).glob("shard-*").__next__().stat().st_size for uri in uris)
    monkeypatch.setenv("IIR_CACHE_GB", repr(2.5 * size / 2**30))  # room for two of the five
    part = Photos(sources, counts, only=[1, 3])
    assert {path.name for path in home.iterdir()} == {".lock", paths[1].name, paths[3].name}
    for photos in (part, pickle.loads(pickle.dumps(part))):  # noqa: S301
        assert photos.counts == counts
        assert len(photos) == len(want)
        here = set(numbers(counts, [1, 3]).tolist())
        for number, (name, label, data) in enumerate(want):
            if number in here:
                photo = photos[number]
                assert (photo.name, photo.label, bytes(photo.data)) == (name, label, data)
                assert photos.name(number) == name
            else:
                shard = int(np.searchsorted(np.cumsum(counts), number, side="right"))
                where = f"photo {number} (number {number - sum(counts[:shard])} of "
                assert photos.name(number).startswith(where)
                file = f"{'one' if shard < 3 else 'two'}/{artifact.shard_name(shard if shard < 3 else shard - 3)})"
                assert photos.name(number).endswith(file)
                with pytest.raises(StorageError, match=r"shard-0000\d.parquet\) is not here; open that shard too"):
                    photos[number]
        with pytest.raises(StorageError, match=r"the label of photo 0 .*is not here; open all shards"):
            _ = photos.labels
        with pytest.raises(IndexError):
            photos[len(want)]
        with pytest.raises(IndexError):
            photos.name(len(want))
    with pytest.raises(MismatchError, match="counts of 4 shards for images in 5 shards"):
        Photos(sources, counts[1:], only=[0])
    monkeypatch.delenv("IIR_CACHE_GB")
    monkeypatch.setattr(cache, "allowed_bytes", lambda _: 1e9)
    assert rows(Photos(sources, counts, only=range(5))) == rows(Photos(sources)) == want
