"""Chunks of a batch: the same for any number of workers, and none of two parts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.data.parts import slots
from iir_dist.train.chunks import Chunks

SHAPES = st.tuples(st.integers(8, 70), st.none() | st.integers(1, 20), st.integers(1, 4), st.integers(1, 8))


@given(shape=SHAPES)
def test_chunks_cover_the_batch_and_stay_within_parts(shape: tuple[int, int | None, int, int]) -> None:
    batch, chunk, parts, workers = shape
    chunks = Chunks(batch, chunk, parts, workers)
    cuts = chunks.cuts()
    assert [p for start, stop in cuts for p in range(start, stop)] == list(range(batch))
    assert [cut for worker in range(workers) for cut in chunks.of(worker)] == cuts
    if chunk is not None:
        assert cuts == Chunks(batch, chunk, parts, 1).cuts()
        assert all(any(low <= start and stop <= high for low, high in slots(batch, parts)) for start, stop in cuts)
        assert min(stop - start for start, stop in cuts) >= min(chunk, batch // parts)
    for worker in range(workers):
        own = {p for start, stop in chunks.of(worker) for p in range(start, stop)}
        touched = [part for part, (low, high) in enumerate(slots(batch, parts)) if own & set(range(low, high))]
        assert chunks.parts_of(worker) == touched
        if workers % parts == 0 and len(cuts) >= workers:
            assert chunks.parts_of(worker) == [worker * parts // workers]


@given(shape=SHAPES, seed=st.integers(0, 2**62))
def test_a_shuffled_pass_stays_within_parts(shape: tuple[int, int | None, int, int], seed: int) -> None:
    batch, chunk, parts, workers = shape
    chunks = Chunks(batch, chunk, parts, workers)
    dealt = chunks.dealt(seed)
    for low, high in slots(batch, parts):
        assert sorted(dealt[low:high]) == list(range(low, high))
    if parts == 1:
        assert dealt == torch.randperm(batch, generator=torch.Generator().manual_seed(seed)).tolist()


def test_one_chunk_a_part_shuffles_nothing() -> None:
    assert not Chunks(8, 4, 2, 1).shuffles()
    assert not Chunks(8, None, 2, 2).shuffles()
    assert Chunks(8, 2, 2, 1).shuffles()
    assert Chunks(8, None, 2, 4).shuffles()
    assert Chunks(8, None, 2, 3).shuffles()  # the middle worker has photos of both
