"""The plan is arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.errors import ConfigError
from iir_dist.index.build import sample_rows
from iir_dist.index.plan import EXACT_BELOW, MIN_POINTS_PER_CENTROID, IndexConfig, plan


@given(n=st.integers(1, 3_000_000), dim=st.integers(1, 4096), shards=st.integers(1, 9))
def test_every_plan_can_be_built(n: int, dim: int, shards: int) -> None:
    found = plan(n, dim, IndexConfig(shards=shards))
    assert found.ranges[0][0] == 0
    assert found.ranges[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(found.ranges, found.ranges[1:], strict=False))
    sizes = [stop - start for start, stop in found.ranges]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0
    assert 1 <= found.nprobe <= found.nlist
    if n >= EXACT_BELOW and dim >= 4:
        assert found.nlist * MIN_POINTS_PER_CENTROID <= found.train_size <= n
        assert found.nprobe > 1
        assert 4 * found.code_bytes <= dim
        assert found.factory.endswith("np")  # polysemous training costs twenty times the rest
    else:
        assert found.factory == "IVF1,Flat"


def test_worked_example() -> None:
    """4 sqrt(1,000,000) = 4000, next power of two 4096; 64 bytes for 256 dimensions after OPQ; an eighth is probed."""
    found = plan(1_000_000, 512, IndexConfig(shards=4))
    assert (found.factory, found.nlist, found.nprobe, found.code_bytes) == ("OPQ64_256,IVF4096,PQ64np", 4096, 512, 64)
    assert found.ranges == ((0, 250_000), (250_000, 500_000), (500_000, 750_000), (750_000, 1_000_000))
    assert "64 + 8 B a vector in the index and 1024 B for refinement" in found.summary(1_000_000, 512)


def test_a_given_factory_is_taken() -> None:
    found = plan(5000, 64, IndexConfig(factory="PCA32,IVF16,PQ8np", nprobe=4))
    assert (found.factory, found.nlist, found.nprobe, found.code_bytes) == ("PCA32,IVF16,PQ8np", 16, 4, 8)
    with pytest.raises(ConfigError, match=r"index.factory = 'HNSW32'.*expected an IVF index"):
        plan(5000, 64, IndexConfig(factory="HNSW32"))


def test_the_sample_is_spread_over_all_rows() -> None:
    rows = sample_rows(100_000, 1000, seed=3)
    assert len(set(rows.tolist())) == 1000
    assert (rows == sample_rows(100_000, 1000, seed=3)).all()
    quarters = [((rows >= a) & (rows < a + 25_000)).sum() for a in range(0, 100_000, 25_000)]
    assert min(quarters) > 200  # the first n would be 1000, 0, 0, 0
    assert sample_rows(10, 20, seed=0).tolist() == list(range(10))
