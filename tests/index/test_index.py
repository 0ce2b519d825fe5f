"""The index against brute force, one shard against several, and files that are not what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.embeddings import schema
from iir_dist.errors import ConfigError, CorruptError, InputError, MismatchError
from iir_dist.index import build, search
from iir_dist.index.plan import IndexConfig
from iir_dist.index.search import SearchConfig
from iir_dist.vectors import normalize

pytestmark = pytest.mark.ray
N, DIM, NQ = 3000, 32, 20


def clustered(n: int, seed: int) -> np.ndarray:
    """Structured but not easy: 60 directions shared by all, noise as large as they are."""
    centres = np.random.default_rng(0).normal(size=(60, DIM))
    rng = np.random.default_rng(seed)
    return normalize(centres[rng.integers(60, size=n)] + rng.normal(size=(n, DIM)))


def write(folder: Path, x: np.ndarray, split: str, shards: int) -> Path:
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(x)), shards)):
        columns = {
            "id": rows, "name": [f"{split}_{r:05d}" for r in rows], "split": [split] * len(rows),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x[rows].ravel()), DIM),
        }  # fmt: skip
        pq.write_table(pa.table(columns, schema=schema(DIM)), folder / f"part-{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Database in five shards, and queries; plain Parquet of somebody."""
    root = tmp_path_factory.mktemp("vectors")
    write(root / "db", clustered(N, 1), "db", 5)
    write(root / "queries", clustered(NQ, 2), "query", 1)
    return root


@pytest.fixture(scope="module")
def indexes(vectors: Path, ray_session: None) -> dict[int, Path]:
    """The same index in one and in three shards."""
    for shards in (1, 3):
        build.run([str(vectors / "db")], str(vectors / f"index-{shards}"), IndexConfig(shards=shards))
    return {shards: vectors / f"index-{shards}" for shards in (1, 3)}


def ranking(database: Path, vectors: Path, out: Path, **config: object) -> tuple[Manifest, np.ndarray, np.ndarray]:
    settings = SearchConfig.model_validate(config)
    manifest = search.run([str(database)], [str(vectors / "queries")], str(out), settings)
    table = pq.read_table(out / "shard-00000.parquet")
    assert table.schema.equals(search.RANKINGS)
    k = len(table) // NQ
    ids, scores = table.column("id").to_numpy().reshape(NQ, k), table.column("score").to_numpy().reshape(NQ, k)
    assert table.column("query").to_pylist() == [f"query_{q:05d}" for q in range(NQ) for _ in range(k)]
    assert table.column("rank").to_numpy().reshape(NQ, k).tolist() == [list(range(k))] * NQ
    assert table.column("name").to_pylist() == [f"db_{i:05d}" for i in ids.ravel()]
    assert (np.diff(scores, axis=1) <= 0).all()  # larger is better
    return manifest, ids, scores


def brute_force() -> tuple[np.ndarray, np.ndarray]:
    scores = clustered(NQ, 2).astype(np.float64) @ clustered(N, 1).T.astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")
    return order, np.take_along_axis(scores, order, axis=1)


def test_exact_search_is_brute_force(vectors: Path, tmp_path: Path, ray_session: None) -> None:
    manifest, ids, scores = ranking(vectors / "db", vectors, tmp_path / "all")
    expected, expected_scores = brute_force()
    assert manifest.info["exact"]
    assert ids.shape == (NQ, N)
    assert (ids == expected).mean() > 0.999  # float32 may swap neighbours whose scores are equal to 1e-7
    assert np.abs(scores - expected_scores).max() < 1e-5
    _, top, _ = ranking(vectors / "db", vectors, tmp_path / "top", k=7)
    assert np.array_equal(top, ids[:, :7])


def test_three_shards_answer_as_one(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    for refine in (0, 4):
        _, one, one_scores = ranking(indexes[1], vectors, tmp_path / f"one-{refine}", k=30, refine=refine)
        _, three, three_scores = ranking(indexes[3], vectors, tmp_path / f"three-{refine}", k=30, refine=refine)
        assert np.allclose(one_scores, three_scores, atol=1e-6)
        for a, b in zip(one, three, strict=True):  # equal scores may be in another order at the last place
            assert len(set(a[:-1]) ^ set(b[:-1])) <= 1
    templates = {artifact.require(p, "index")[1].info["template"] for p in indexes.values()}
    assert len(templates) == 1  # trained from the same sample: byte for byte the same


def test_recall_against_brute_force(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    """All lists visited and many candidates rescored: recall near 1; it does not fall as more lists are visited."""
    expected = brute_force()[0][:, :10]

    def recall(**config: object) -> float:
        name = "-".join(str(v) for v in config.values())
        found = ranking(indexes[3], vectors, tmp_path / name, k=10, **config)[1]
        return float(np.mean([len(set(f) & set(e)) / 10 for f, e in zip(found, expected, strict=True)]))

    nlist = artifact.require(indexes[3], "index")[1].info["nlist"]
    assert recall(nprobe=nlist, refine=50) > 0.995
    steps = [recall(nprobe=p, refine=10) for p in (1, 4, 16, nlist)]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    assert recall(nprobe=nlist, refine=0) < recall(nprobe=nlist, refine=10)  # what product quantization loses


def test_refined_scores_are_inner_products(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    _, ids, scores = ranking(indexes[3], vectors, tmp_path / "r", k=20)
    exact = np.einsum("qkd,qd->qk", clustered(N, 1)[ids], clustered(NQ, 2))
    assert np.abs(scores - exact).max() < 2e-3  # float16


def test_the_files_are_plain_faiss(indexes: dict[int, Path]) -> None:
    import faiss

    _, manifest = artifact.require(indexes[3], "index")
    rows = [tuple(s["rows"]) for s in manifest.info["shards"]]
    assert rows == [(0, 1000), (1000, 2000), (2000, 3000)]
    for number, (start, stop) in enumerate(rows):
        shard = faiss.read_index(str(indexes[3] / f"shard-{number:05d}.faiss"))
        assert shard.ntotal == stop - start
        half = np.fromfile(indexes[3] / f"vectors-{number:05d}.f16", np.float16).reshape(-1, DIM)
        assert np.abs(half - clustered(N, 1)[start:stop]).max() < 1e-3
    assert pq.read_table(indexes[3] / "names.parquet").column("name").to_pylist() == [f"db_{i:05d}" for i in range(N)]
    artifact.verify(indexes[3])


def test_a_small_set_is_scanned_exactly(vectors: Path, tmp_path: Path, ray_session: None) -> None:
    write(tmp_path / "few", clustered(300, 1), "db", 2)
    manifest = build.run([str(tmp_path / "few")], str(tmp_path / "index"), IndexConfig())
    assert manifest.info["factory"] == "IVF1,Flat"
    _, exact, _ = ranking(tmp_path / "few", vectors, tmp_path / "a", k=20)
    _, found, _ = ranking(tmp_path / "index", vectors, tmp_path / "b", k=20, refine=0)
    assert np.array_equal(exact, found)


@pytest.mark.parametrize("file", ["shard-00001.faiss", "vectors-00002.f16", "trained.faiss", "names.parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused_and_named(
    indexes: dict[int, Path], vectors: Path, tmp_path: Path, file: str, damage: str
) -> None:
    shutil.copytree(indexes[3], tmp_path / "index")
    path = tmp_path / "index" / file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        ranking(tmp_path / "index", vectors, tmp_path / "r", k=5)


def test_a_shard_of_another_template_is_refused(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    shutil.copytree(indexes[3], tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    value = json.loads(path.read_text())
    value["info"]["shards"][1]["template"] = "f" * 64
    path.write_text(json.dumps(value))
    with pytest.raises(MismatchError, match=r"shard-00001\.faiss was filled from template ffffffffffff"):
        ranking(tmp_path / "index", vectors, tmp_path / "r", k=5)


def test_wrong_requests(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.nprobe = 9999: the index has \d+ lists"):
        ranking(indexes[1], vectors, tmp_path / "a", nprobe=9999)
    with pytest.raises(InputError, match="no row of split 'query'"):
        search.run([str(indexes[1])], [str(vectors / "db")], str(tmp_path / "b"), SearchConfig())
    with pytest.raises(InputError, match="no database rows, all are queries"):
        build.run([str(vectors / "queries")], str(tmp_path / "c"), IndexConfig())
    with pytest.raises(InputError, match="2 databases given"):
        search.run([str(indexes[1]), str(indexes[3])], [str(vectors / "queries")], str(tmp_path / "d"), SearchConfig())
    narrow = normalize(np.random.default_rng(0).normal(size=(3, 8)))
    (tmp_path / "narrow").mkdir()
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(narrow.ravel()), 8)
    pq.write_table(pa.table({"name": ["a", "b", "c"], "embedding": embedding}), tmp_path / "narrow" / "x.parquet")
    with pytest.raises(InputError, match=r"queries have dimension 8, .* has 32"):
        search.run([str(indexes[1])], [str(tmp_path / "narrow")], str(tmp_path / "e"), SearchConfig())
    with pytest.raises(ConfigError, match="faiss cannot build 'IVF16,PQ7np' for dimension 32"):
        build.run([str(vectors / "db")], str(tmp_path / "f"), IndexConfig(factory="IVF16,PQ7np"))


def test_an_interrupted_build_goes_on_from_its_template(
    vectors: Path, indexes: dict[int, Path], tmp_path: Path
) -> None:
    """As if killed after training and the second shard: the rest is filled from the same template."""
    whole = artifact.require(indexes[3], "index")[1]
    out = tmp_path / "index"
    (out / "_work" / "done").mkdir(parents=True)
    kept = ["trained.faiss", "shard-00001.faiss", "vectors-00001.f16"]
    for name in kept:
        shutil.copy(indexes[3] / name, out / name)
    config = IndexConfig(shards=3)
    with artifact.begin(tmp_path / "plan", "index", config, whole.inputs) as work:
        plan = (tmp_path / "plan" / "_work" / "plan.json").read_bytes()
    assert work.finished is None
    (out / "_work" / "plan.json").write_bytes(plan)
    folder = artifact.open_folder(out)
    artifact.commit(folder, "template", {kept[0]: whole.files[kept[0]]})
    info = {"template": whole.info["template"], "rows": [1000, 2000]}
    artifact.commit(folder, 1, {name: whole.files[name] for name in kept[1:]}, {"rows": 1000}, info)
    times = {name: (out / name).stat().st_mtime_ns for name in kept}
    resumed = build.run([str(vectors / "db")], str(out), config)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == times
    assert resumed.files == whole.files


@pytest.mark.s3
def test_in_s3(s3: str, vectors: Path, indexes: dict[int, Path], tmp_path: Path) -> None:
    from iir_dist.storage import open_folder

    folder = open_folder(f"{s3}/{tmp_path.name}")
    for path in (vectors / "db").iterdir():
        folder.write(f"db/{path.name}", path.read_bytes())
    manifest = build.run([folder.address("db")], folder.address("index"), IndexConfig(shards=3))
    assert manifest.files == artifact.require(indexes[3], "index")[1].files
    search.run([folder.address("index")], [str(vectors / "queries")], folder.address("r"), SearchConfig(k=9))
    with folder.local("r/shard-00000.parquet") as path:
        found = pq.read_table(path)
    ranking(indexes[3], vectors, tmp_path / "r", k=9)
    assert found.equals(pq.read_table(tmp_path / "r" / "shard-00000.parquet"))
