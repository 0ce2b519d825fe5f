"""The template: from a sample that is spread, without duplicates, and the same whoever draws it."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed import DIM, N, clustered, random_unit, write_vectors

from iir_dist.data.collection import open_collection
from iir_dist.errors import ConfigError
from iir_dist.index.plan import IndexConfig, plan
from iir_dist.index.train import (
    apportion,
    assigning_on_gpus,
    distinct,
    hashes,
    kmeans,
    nearest,
    sample,
    sample_rows,
    train,
    two_level_centroids,
)
from iir_dist.vectors import F32


def trained(
    embeddings: Path, factory: str = "IVF16,PQ16x4fsr", threads: int = 1, seed: int = 0, **config: int
) -> bytes:
    collection, _ = open_collection([str(embeddings)])
    todo = plan(collection.num_rows, collection.dim, IndexConfig.model_validate({"factory": factory, **config}))
    return faiss.serialize_index(train(collection, todo, seed, threads)).tobytes()


def test_the_sample_is_spread_over_all_rows() -> None:
    rows = sample_rows(100_000, 1000, seed=3)
    assert len(set(rows.tolist())) == 1000
    assert (rows == sample_rows(100_000, 1000, seed=3)).all()
    quarters = [((rows >= a) & (rows < a + 25_000)).sum() for a in range(0, 100_000, 25_000)]
    assert min(quarters) > 200  # the first n would be 1000, 0, 0, 0
    assert sample_rows(10, 20, seed=0).tolist() == list(range(10))


def test_the_sample_has_the_smallest_hashes() -> None:
    """Also where there are more rows than are hashed at a time."""
    n = 2**20 + 12345
    keys = hashes(np.arange(n), seed=7)
    assert len(np.unique(keys)) == n
    assert sample_rows(n, 500, seed=7).tolist() == sorted(np.argsort(keys)[:500].tolist())
    assert sample_rows(n, 500, seed=8).tolist() != sample_rows(n, 500, seed=7).tolist()


def test_duplicates_are_dropped_bit_for_bit() -> None:
    x = random_unit(50, 8, seed=0)[np.random.default_rng(1).integers(50, size=400)]
    x[7] = np.nextafter(x[3], np.float32(2))
    first = sorted({row.tobytes(): -i for i, row in reversed(list(enumerate(x)))}.values(), reverse=True)
    assert distinct(x).tolist() == [-i for i in first]


def test_the_sample_does_not_depend_on_files(tmp_path: Path) -> None:
    x = clustered(N, 1)
    samples = []
    for files in (1, 7):
        collection, _ = open_collection([str(write_vectors(tmp_path / str(files), x, files=files))])
        samples.append(sample(collection, 500, seed=5))
    assert samples[0].tobytes() == samples[1].tobytes()
    assert samples[0].tobytes() == x[sample_rows(N, 500, seed=5)].tobytes()


@given(counts=st.lists(st.integers(0, 1000), min_size=1).filter(sum), share=st.floats(0, 1))
def test_apportion_is_in_proportion(counts: list[int], share: float) -> None:
    total = round(share * sum(counts))
    shares = apportion(np.array(counts), total)
    assert shares.sum() == total
    assert (shares <= counts).all()
    assert (np.abs(shares - np.array(counts) * total / sum(counts)) < 1).all()


def error(x: F32, centroids: F32) -> float:
    return float(np.mean(1 - (x * centroids[nearest(x, centroids)]).sum(axis=1)))


def test_centroids_are_unit_vectors_and_two_levels_lose_little() -> None:
    x = clustered(6000, 3)
    one, two = kmeans(x, 64, seed=0), two_level_centroids(x, 64, seed=0)
    assert one.shape == two.shape == (64, DIM)
    np.testing.assert_allclose(np.linalg.norm([one, two], axis=2), 1, atol=1e-5)
    rng = np.random.default_rng(0)
    assert error(x, two) < 1.1 * error(x, one)
    assert error(x, one) < 0.9 * error(x, x[rng.choice(len(x), 64, replace=False)])


@pytest.mark.parametrize("factory", ["IVF16,PQ16x4fsr", "OPQ8_16,IVF16_HNSW8,PQ8np", "PCA16,IVF16,SQ8"])
def test_a_template_is_the_same_bit_for_bit(factory: str, tmp_path: Path) -> None:
    """Whatever the number of threads and of files; another seed gives another one."""
    once = trained(write_vectors(tmp_path / "a", clustered(N, 1)), factory)
    again = trained(write_vectors(tmp_path / "b", clustered(N, 1), files=5), factory, threads=2)
    assert once == again
    assert once != trained(tmp_path / "a", factory, seed=1)


def test_too_few_distinct_vectors_are_refused(tmp_path: Path) -> None:
    x = np.repeat(clustered(10, 1), 200, axis=0)
    with pytest.raises(
        ConfigError, match="'IVF16,PQ16x4fsr' has 16 lists and the sample 10 distinct vectors; expected"
    ):
        trained(write_vectors(tmp_path / "db", x))
    with pytest.raises(ConfigError, match="faiss cannot build 'IVF4,PQ5np' for dimension 32"):
        trained(tmp_path / "db", "IVF4,PQ5")


@pytest.mark.gpu
@pytest.mark.skipif(not faiss.get_num_gpus(), reason="faiss sees no GPU here")
def test_a_gpu_assigns_as_the_cpu_does(tmp_path: Path) -> None:
    """All but vectors that lie between two centroids up to rounding, at most one in a thousand."""
    x = clustered(20_000, 1)
    template = trained(write_vectors(tmp_path / "db", x))
    on_cpu, on_gpu = (faiss.deserialize_index(np.frombuffer(template, np.uint8)) for _ in range(2))
    on_cpu.add(x)
    with assigning_on_gpus(on_gpu):
        on_gpu.add(x)
    found = [faiss.extract_index_ivf(i).invlists for i in (on_cpu, on_gpu)]
    lists = []
    for invlists in found:
        assert invlists is not None
        of = np.empty(len(x), int)
        for number in range(invlists.nlist):
            ids = faiss.rev_swig_ptr(invlists.get_ids(number), invlists.list_size(number))
            of[ids] = number
        lists.append(of)
    assert (lists[0] == lists[1]).mean() > 0.999
