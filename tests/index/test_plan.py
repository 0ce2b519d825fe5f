"""The plan is arithmetic; what it says of faiss's sizes is what faiss writes."""

from __future__ import annotations

import re

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed import random_unit

from iir_dist.errors import ConfigError
from iir_dist.index.plan import (
    EXACT_BELOW,
    GB,
    KEPT,
    MIN_POINTS_PER_CENTROID,
    REFINE,
    SHARD_BYTES,
    IndexConfig,
    parse,
    plan,
    refine_for,
)

SIZES = {"n": st.integers(1, 10**9), "dim": st.integers(1, 4096)}


@given(**SIZES, shards=st.none() | st.integers(1, 9), recall=st.floats(0.01, 0.999))
def test_every_plan_can_be_built(n: int, dim: int, shards: int | None, recall: float) -> None:
    found = plan(n, dim, IndexConfig(shards=shards, recall=recall))
    assert found.ranges[0][0] == 0
    assert found.ranges[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(found.ranges, found.ranges[1:], strict=False))
    sizes = [stop - start for start, stop in found.ranges]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0
    if shards is None:
        assert max(sizes) == 1 or max(sizes) * (found.code_bytes + 8 + 2 * dim) <= 2 * SHARD_BYTES
    assert 1 <= found.nprobe <= found.nlist
    assert found.train_size <= n
    if n < EXACT_BELOW:
        assert found.factory == "IVF1,Flat"
    else:
        assert found.nlist * MIN_POINTS_PER_CENTROID <= found.train_size
        assert found.nprobe > 1
    again = parse(found.factory, dim)
    assert (again.text, again.nlist, again.code_bytes) == (found.factory, found.nlist, found.code_bytes)


def test_worked_example() -> None:
    """sqrt(1,000,000) = 1000, next power of two 1024; 4 bits for 2 of 512 dimensions are 128 bytes."""
    found = plan(1_000_000, 512, IndexConfig(shards=4))
    assert (found.factory, found.nlist, found.code_bytes) == ("IVF1024,PQ256x4fsr", 1024, 128)
    assert found.ranges == ((0, 250_000), (250_000, 500_000), (500_000, 750_000), (750_000, 1_000_000))
    assert "128 + 8 B a vector in the index and 1024 B for refinement" in found.summary(1_000_000, 512)
    large = plan(10**9, 256, IndexConfig())
    assert large.factory == "IVF32768_HNSW32,PQ128x4fsr"
    assert len(large.ranges) == 136  # (64 + 8 + 512) B x 10^9 in pieces of 4 GB


@given(n=st.integers(EXACT_BELOW, 10**8), dim=st.integers(16, 2048), share=st.floats(0.01, 2))
def test_a_memory_bound_is_kept_or_refused_with_one_that_can_be(n: int, dim: int, share: float) -> None:
    free = plan(n, dim, IndexConfig())
    bound = max(1e-9, share * free.search_bytes / GB)
    try:
        found = plan(n, dim, IndexConfig(memory_gb=bound))
    except ConfigError as error:
        named = re.search(r"index\.memory_gb=([\d.e-]+)", str(error))
        assert named
        assert plan(n, dim, IndexConfig(memory_gb=float(named[1]))).search_bytes <= float(named[1]) * GB
    else:
        assert found.search_bytes <= bound * GB
        assert (found == free) == (free.search_bytes <= bound * GB)


@given(n=st.integers(EXACT_BELOW, 10**8), dim=st.integers(16, 2048), share=st.floats(0.01, 2))
def test_a_latency_bound_is_kept_or_refused_with_one_that_can_be(n: int, dim: int, share: float) -> None:
    bound = share * plan(n, dim, IndexConfig()).latency_ms
    try:
        assert plan(n, dim, IndexConfig(latency_ms=bound)).latency_ms <= bound
    except ConfigError as error:
        named = re.search(r"index\.latency_ms=([\d.e-]+)", str(error))
        assert named
        assert plan(n, dim, IndexConfig(latency_ms=float(named[1]))).latency_ms <= float(named[1])


FACTORIES = [
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ8np",
    "IVF16,PQ16x4fsr",
    "IVF32_HNSW16,PQ16x4fs",
    "IVF16,SQfp16",
    "IVF16,RaBitQ",
]


@pytest.mark.parametrize("factory", [*FACTORIES, "OPQ8_16,IVF16,PQ8np", "PCA16,IVF16,SQ8", "Pad34,IVF16,PQ17x4fsr"])
def test_sizes_are_those_that_faiss_writes(factory: str) -> None:
    n, x = 20_000, random_unit(20_000, 32, seed=0)
    index = faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(x[:2000])
    index.add(x)
    written = len(faiss.serialize_index(index))
    found = parse(factory, 32)
    ivf = faiss.extract_index_ivf(index)
    assert (found.nlist, found.dim, found.text) == (ivf.nlist, ivf.d, factory)
    assert found.code_bytes == ivf.code_size
    assert found.file_bytes(n, 1) == pytest.approx(written, rel=0.03)


def test_a_given_factory_is_taken() -> None:
    found = plan(5000, 64, IndexConfig(factory="PCA32,IVF16,PQ8", nprobe=4, refine=2))
    assert found.factory == "PCA32,IVF16,PQ8np"  # polysemous training costs twenty times the rest
    assert (found.nlist, found.nprobe, found.refine, found.code_bytes) == (16, 4, 2, 8)


@pytest.mark.parametrize(
    "factory", ["HNSW32", "IVF16", "IVF0,Flat", "IVF16,PQ8x4fs,RFlat", "IVF16,ITQ,LSH", "Flat", ""]
)
def test_a_factory_of_another_kind_is_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"index.factory = {factory!r}: expected")):
        plan(5000, 64, IndexConfig(factory=factory))


def test_refine_is_the_smallest_that_keeps_half_of_the_misses_for_the_lists() -> None:
    for bits, kept in KEPT.items():
        for recall in np.linspace(0.01, 0.99, 50):
            needed = refine_for(bits, recall)
            allowed = 1 - (1 - recall) / 2
            assert (needed is None) == (max(kept) < allowed)
            if needed is not None:
                at = REFINE.index(needed)
                assert kept[at] >= allowed
                assert at == 0 or kept[at - 1] < allowed
