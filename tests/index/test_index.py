"""The index by its stage: against brute force, continued, and over the vectors of somebody else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from indexed import DIM, NQ, N, brute_force, clustered, ranking, write_vectors

from iir_dist import artifact
from iir_dist.cli import main
from iir_dist.errors import ConfigError, CorruptError, InputError
from iir_dist.index import build, search
from iir_dist.index.engine import open_index
from iir_dist.index.plan import IndexConfig
from iir_dist.index.search import SearchConfig
from iir_dist.storage import open_folder
from iir_dist.vectors import normalize

pytestmark = pytest.mark.ray


def test_three_shards_answer_as_one(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    for refine in (0, 4):
        _, one, one_scores = ranking(indexes[1], vectors, tmp_path / f"one-{refine}", k=30, refine=refine)
        _, three, three_scores = ranking(indexes[3], vectors, tmp_path / f"three-{refine}", k=30, refine=refine)
        assert np.array_equal(one_scores, three_scores)
        assert np.array_equal(one, three)
    templates = {artifact.require(p, "index")[1].info["template"] for p in indexes.values()}
    assert len(templates) == 1  # trained from the same sample: byte for byte the same


def test_recall_against_brute_force(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    """All lists visited and many candidates rescored: recall near 1; it does not fall as more lists are visited."""
    expected = brute_force(clustered(NQ, 2), clustered(N, 1), 10)[1]

    def recall(nprobe: int, refine: int) -> float:
        out = tmp_path / f"{nprobe}-{refine}"
        found = ranking(indexes[3], vectors, out, k=10, nprobe=nprobe, refine=refine)[1]
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


def test_what_search_does_not_read_is_verified_where_asked(indexes: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(indexes[3], tmp_path / "index")
    with open(tmp_path / "index" / "operating_points.json", "a") as file:
        file.write(" ")
    open_index(tmp_path / "index", threads=1).close()
    with pytest.raises(CorruptError, match=r"operating_points\.json has \d+ bytes, its manifest says"):
        open_index(tmp_path / "index", verify=True, threads=1)


def test_a_small_set_is_scanned_exactly(vectors: Path, tmp_path: Path, ray_session: None) -> None:
    write_vectors(tmp_path / "few", clustered(300, 1), files=2)
    manifest = build.run([str(tmp_path / "few")], str(tmp_path / "index"), IndexConfig())
    assert manifest.info["factory"] == "IVF1,Flat"
    _, exact, _ = ranking(tmp_path / "few", vectors, tmp_path / "a", k=20)
    _, found, _ = ranking(tmp_path / "index", vectors, tmp_path / "b", k=20, refine=0)
    assert np.array_equal(exact, found)


def test_wrong_requests(indexes: dict[int, Path], vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.nprobe = 9999: the index has \d+ lists"):
        ranking(indexes[1], vectors, tmp_path / "a", nprobe=9999)
    with pytest.raises(InputError, match="no row of split 'query'"):
        search.run([str(indexes[1])], [str(vectors / "db")], str(tmp_path / "b"), SearchConfig())
    with pytest.raises(InputError, match="no database rows, all are queries"):
        build.run([str(vectors / "queries")], str(tmp_path / "c"), IndexConfig())
    with pytest.raises(InputError, match="2 databases given"):
        search.run([str(indexes[1]), str(indexes[3])], [str(vectors / "queries")], str(tmp_path / "d"), SearchConfig())
    write_vectors(tmp_path / "narrow", normalize(np.random.default_rng(0).normal(size=(3, 8))), "query", None)
    with pytest.raises(InputError, match=r"queries have dimension 8, .* has 32"):
        search.run([str(indexes[1])], [str(tmp_path / "narrow")], str(tmp_path / "e"), SearchConfig())
    with pytest.raises(ConfigError, match="faiss cannot build 'IVF16,PQ7np' for dimension 32"):
        build.run([str(vectors / "db")], str(tmp_path / "f"), IndexConfig(factory="IVF16,PQ7np"))


def test_an_interrupted_build_goes_on_from_its_template(
    vectors: Path, indexes: dict[int, Path], tmp_path: Path
) -> None:
    """As if killed after training and the second shard: the rest is filled from the same template.

    What was measured is taken too, which spares the time here.
    """
    whole = artifact.require(indexes[3], "index")[1]
    out = tmp_path / "index"
    (out / "_work" / "done").mkdir(parents=True)
    kept = ["trained.faiss", "shard-00001.faiss", "vectors-00001.f16", "operating_points.json"]
    for name in kept:
        shutil.copy(indexes[3] / name, out / name)
    config = IndexConfig(shards=3)
    with artifact.begin(tmp_path / "plan", "index", config, whole.inputs) as work:
        plan = (tmp_path / "plan" / "_work" / "plan.json").read_bytes()
    assert work.finished is None
    (out / "_work" / "plan.json").write_bytes(plan)
    folder, peak = open_folder(out), {"peak_bytes": 1}
    artifact.commit(folder, "template", {kept[0]: whole.files[kept[0]]}, info=peak)
    info = {"template": whole.info["template"], "rows": [1000, 2000], **peak}
    artifact.commit(folder, 1, {name: whole.files[name] for name in kept[1:3]}, {"rows": 1000}, info)
    artifact.commit(folder, "points", {kept[3]: whole.files[kept[3]]})
    times = {name: (out / name).stat().st_mtime_ns for name in kept}
    resumed = build.run([str(vectors / "db")], str(out), config)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == times
    assert resumed.files == whole.files


# ------------------------------------------------------------------------------------------------ somebody's Parquet


def columns_of(kind: str, x: np.ndarray, rows: np.ndarray) -> dict[str, object]:
    flat = x[rows].ravel()
    if kind == "fixed float16":
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.astype(np.float16)), DIM)
    elif kind == "fixed float32":
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), DIM)
    elif kind == "list float32":
        vectors = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, DIM, dtype=np.int32)), pa.array(flat))
    else:
        offsets = pa.array(np.arange(0, len(flat) + 1, DIM))
        vectors = pa.LargeListArray.from_arrays(offsets, pa.array(flat.astype(np.float64)))
    return {"name": [f"their_{r}" for r in rows], "embedding": vectors}


@pytest.mark.parametrize("kind", ["fixed float16", "fixed float32", "list float32", "large list float64"])
def test_any_folder_of_parquet_vectors(kind: str, vectors: Path, tmp_path: Path, ray_session: None) -> None:
    """Through the command line: ids with holes and in no order, extra columns, no split; results carry their ids."""
    x, ids = clustered(200, 5), np.random.default_rng(0).permutation(10_000)[:200]
    (tmp_path / "theirs").mkdir()
    for number, rows in enumerate(np.array_split(np.arange(200), 3)):
        columns = {
            **columns_of(kind, x, rows),
            "id": pa.array(ids[rows].astype(np.int32)),
            "colour": ["red"] * len(rows),
        }
        pq.write_table(pa.table(columns), tmp_path / "theirs" / f"{number}.parquet")
    for arguments in (
        ["index", str(tmp_path / "theirs"), "--out", str(tmp_path / "index")],
        [
            "search",
            str(tmp_path / "index"),
            "--queries",
            str(vectors / "queries"),
            "-k",
            "5",
            "--out",
            str(tmp_path / "r"),
        ],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    table = pq.read_table(tmp_path / "r" / "shard-00000.parquet")
    expected = brute_force(clustered(NQ, 2), x.astype(np.float16).astype(np.float32), 5)[1]
    assert table["id"].to_numpy().reshape(NQ, 5).tolist() == ids[expected].tolist()
    assert table["name"].to_pylist() == [f"their_{r}" for r in expected.ravel()]
    assert artifact.require(tmp_path / "index", "index")[1].info["encoder_fingerprint"] is None


@pytest.mark.s3
def test_in_s3(s3: str, vectors: Path, indexes: dict[int, Path], tmp_path: Path) -> None:
    folder = open_folder(f"{s3}/{tmp_path.name}")
    for path in (vectors / "db").iterdir():
        folder.write(f"db/{path.name}", path.read_bytes())
    manifest = build.run([folder.address("db")], folder.address("index"), IndexConfig(shards=3))
    assert manifest.fingerprint == artifact.require(indexes[3], "index")[1].fingerprint
    search.run([folder.address("index")], [str(vectors / "queries")], folder.address("r"), SearchConfig(k=9))
    with folder.local("r/shard-00000.parquet") as path:
        found = pq.read_table(path)
    ranking(indexes[3], vectors, tmp_path / "r", k=9)
    assert found.equals(pq.read_table(tmp_path / "r" / "shard-00000.parquet"))
