"""What must hold of a search whatever the data, the shards and the parameters: on many small indexes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexed import brute_force, exact_unit, make_index, random_unit, search, write_vectors

from iir_dist.index import living
from iir_dist.index.engine import open_index

few = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
FACTORIES = (
    "IVF8,Flat", "IVF8,PQ4np", "OPQ4_8,IVF8,PQ4np", "IVF8,SQ8", "IVF8,PQ4x4fs", "IVF8,PQ4x4fsr", "IVF8,RaBitQ",
    "IVF8,RaBitQfs", "IVF8_HNSW4,PQ4np",
)  # fmt: skip
seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("factory", FACTORIES)
@settings(few, max_examples=4)
@given(seed=seeds, n=st.integers(60, 200), k=st.integers(1, 50), nprobe=st.integers(1, 8), data=st.data())
def test_shards_answer_as_one(factory: str, seed: int, n: int, k: int, nprobe: int, data: st.DataObject) -> None:
    """The same rows and scores, bit for bit; half of the vectors are copies of three, so that many scores tie."""
    x = random_unit(n, 8, seed)
    x[n // 2 :] = x[np.random.default_rng(seed).integers(0, 3, size=n - n // 2)]
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=4)))
    xq = np.concatenate([random_unit(9, 8, seed + 1), x[:3]])
    dropped = [f"db_{i:05d}" for i in range(0, n, 7)]
    allowed = np.random.default_rng(seed).random(n) < 0.5
    with tempfile.TemporaryDirectory() as root:
        emb = write_vectors(Path(root) / "emb", x)
        make_index(Path(root) / "one", [emb], factory)
        make_index(Path(root) / "many", [emb], factory, cuts)
        for _ in range(2):
            for refine in (0, 2):
                for mask in (None, allowed):
                    arguments = {"nprobe": nprobe, "refine": refine, "allowed": mask}
                    one = search(Path(root) / "one", xq, k, **arguments)
                    many = search(Path(root) / "many", xq, k, **arguments)
                    assert np.array_equal(one[1], many[1])
                    assert np.array_equal(one[0], many[0])
            for name in ("one", "many"):
                living.delete(str(Path(root) / name), dropped)


@few
@given(seed=seeds, n=st.integers(1, 150), k=st.integers(1, 60), shards=st.integers(1, 4))
def test_all_lists_of_flat_codes_are_brute_force(seed: int, n: int, k: int, shards: int) -> None:
    """With and without rescoring, with deleted rows and a filter; inner products are exact, and most are ties."""
    x, xq = exact_unit(n, seed), exact_unit(5, seed + 1)
    rng = np.random.default_rng(seed)
    cuts = sorted({n * i // shards for i in range(1, shards)} - {0})
    dropped = np.flatnonzero(rng.random(n) < 0.3)
    allowed = np.flatnonzero(rng.random(n) < 0.5)
    with tempfile.TemporaryDirectory() as root:
        index = Path(root) / "index"
        make_index(index, [write_vectors(Path(root) / "emb", x)], cuts=cuts)
        living.delete(str(index), ids=dropped.tolist())
        left = np.setdiff1d(np.arange(n), dropped)
        for refine in (0, 1, 3):
            for chosen, expected in ((None, left), (allowed, np.intersect1d(left, allowed))):
                scores, rows = search(index, xq, k, refine=refine, allowed=chosen)
                expected_scores, expected_rows = brute_force(xq, x, k, expected)
                assert np.array_equal(rows, expected_rows)
                assert np.array_equal(scores, expected_scores)


@few
@given(seed=seeds, n=st.integers(20, 200), k=st.integers(1, 20), factory=st.sampled_from(FACTORIES))
def test_recall_does_not_fall_with_more_lists(seed: int, n: int, k: int, factory: str) -> None:
    """All candidates of the visited lists are rescored, so that every query finds what it found with fewer lists."""
    x, xq = random_unit(n, 8, seed), random_unit(7, 8, seed + 1)
    k = min(k, n)
    with tempfile.TemporaryDirectory() as root:
        index = Path(root) / "index"
        make_index(index, [write_vectors(Path(root) / "emb", x)], factory, [n // 2])
        with open_index(index, threads=1) as opened:
            found = [opened.search(xq, k, nprobe, refine=-(-n // k))[1] for nprobe in (1, 2, 4, 8)]
        best = found[-1]
        half = x.astype(np.float16).astype(np.float32)
        assert np.array_equal(best, brute_force(xq, half, k)[1])
        hits = np.array([[len(set(row) & set(b)) for row, b in zip(rows, best, strict=True)] for rows in found])
        assert (np.diff(hits, axis=0) >= 0).all()


@few
@given(seed=seeds, n=st.integers(20, 120), k=st.integers(1, 20), factory=st.sampled_from(FACTORIES))
def test_permuted_rows_give_permuted_ids(seed: int, n: int, k: int, factory: str) -> None:
    x, xq = random_unit(n, 8, seed), random_unit(7, 8, seed + 1)
    order = np.random.default_rng(seed).permutation(n)
    with tempfile.TemporaryDirectory() as root:
        for name, vectors in (("a", x), ("b", x[order])):
            make_index(Path(root) / name, [write_vectors(Path(root) / f"emb-{name}", vectors)], factory, [n // 3])
        # Deep enough that no tie of codes decides what is rescored.
        scores, rows = search(Path(root) / "a", xq, k, nprobe=3, refine=n)
        other_scores, other_rows = search(Path(root) / "b", xq, k, nprobe=3, refine=n)
        assert np.array_equal(scores, other_scores)
        assert np.array_equal(rows, np.where(other_rows < 0, -1, order[other_rows]))


@pytest.mark.ray
@settings(few, max_examples=8)
@given(seed=seeds, n=st.integers(30, 150), factory=st.sampled_from(FACTORIES), rounds=st.integers(1, 3))
def test_a_life_of_changes(ray_session: None, seed: int, n: int, factory: str, rounds: int) -> None:
    """Add, delete, compact in turn: rows keep their numbers and answers, deleted ones never return."""
    rng = np.random.default_rng(seed)
    xq = random_unit(5, 8, seed + 1)
    with tempfile.TemporaryDirectory() as root:
        index = Path(root) / "index"
        x = random_unit(n, 8, seed)
        make_index(index, [write_vectors(Path(root) / "emb", x)], factory, [n // 2])
        gone: set[int] = set()
        for change in range(rounds):
            more = random_unit(int(rng.integers(1, 40)), 8, seed + 10 + change)
            living.add([str(write_vectors(Path(root) / f"more-{change}", more, prefix=f"add{change}"))], str(index))
            x = np.concatenate([x, more])
            dropped = rng.choice(len(x), size=int(rng.integers(1, len(x))), replace=False)
            manifest = living.delete(str(index), ids=dropped.tolist())
            gone |= set(dropped.tolist())
            assert manifest.counts == {"rows": len(x), "deleted": len(gone)}
            before = search(index, xq, 20, refine=0)
            left = np.setdiff1d(np.arange(len(x)), sorted(gone))
            assert set(before[1].ravel().tolist()) <= {*left.tolist(), -1}
            living.compact(str(index), above=float(rng.choice([0.0, 0.3, 0.6])))
            after = search(index, xq, 20, refine=0)
            assert np.array_equal(before[0], after[0])
            assert np.array_equal(before[1], after[1])
            half = x.astype(np.float16).astype(np.float32)
            found = search(index, xq, 10, refine=len(x))
            expected = brute_force(xq, half, 10, left)
            assert np.array_equal(found[1], expected[1])
            assert np.allclose(found[0], expected[0], atol=1e-6)
