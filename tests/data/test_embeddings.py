"""Embeddings of anybody: plain Parquet is welcome, checked, and said to be unverified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact
from iir_dist.data.collection import open_collection
from iir_dist.data.embeddings import open_embeddings, schema
from iir_dist.errors import CorruptError, InputError
from iir_dist.vectors import normalize


def vectors(n: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).normal(size=(n, dim)))


def write(folder: Path, x: np.ndarray, start: int = 0, name: str = "part.parquet", **columns: object) -> Path:
    folder.mkdir(exist_ok=True)
    n = len(x)
    table = {
        "id": np.arange(start, start + n),
        "name": [f"image_{start + i}" for i in range(n)],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
        **columns,
    }
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), folder / name)
    return folder


def test_a_plain_folder_is_accepted_and_unverified(tmp_path: Path) -> None:
    x = vectors(5)
    found = open_embeddings(write(tmp_path / "e", x))
    assert (found.dim, found.ref.verified, found.encoder) == (8, False, None)
    (block,) = found.blocks()
    assert block.vectors is not None
    assert np.array_equal(block.vectors, x)
    assert block.splits is None
    assert open_embeddings(tmp_path / "e").ref == found.ref


def test_plain_lists_and_half_precision_are_read(tmp_path: Path) -> None:
    x = vectors(5)
    write(tmp_path / "a", x, embedding=pa.array(x.tolist()))
    write(tmp_path / "b", x, embedding=pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), 8))
    for name in ("a", "b"):
        (block,) = open_embeddings(tmp_path / name).blocks()
        assert block.vectors is not None
        assert block.vectors.dtype == np.float32
        assert np.abs(block.vectors - x).max() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_schema_is_a_fixed_size_list(dtype: str) -> None:
    assert schema(8, dtype).field("embedding").type == pa.list_(pa.float16() if dtype == "float16" else pa.float32(), 8)


def broken(kind: str) -> np.ndarray:
    x = vectors(5)
    x[3] = {"nan": np.nan, "zero": 0.0, "long": x[3] * 2}[kind]
    return x


@pytest.mark.parametrize("kind", ["nan", "zero", "long"])
def test_vectors_that_are_not_unit_are_refused(tmp_path: Path, kind: str) -> None:
    found = open_embeddings(write(tmp_path / "e", broken(kind)))
    with pytest.raises(CorruptError, match=r"part\.parquet: 1 of 5 vectors are not of unit norm \(row 3"):
        list(found.blocks())


def test_what_is_not_embeddings_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json; expected the output of embed"):
        open_embeddings(tmp_path)
    with pytest.raises(InputError, match="no column 'name'"):
        open_embeddings(_no_name(tmp_path))
    write(tmp_path / "b", vectors(3), name="1.parquet")
    write(tmp_path / "b", vectors(3, dim=4), start=3, name="2.parquet")
    with pytest.raises(InputError, match=r"mixes vectors of dimensions \[4, 8\]"):
        open_embeddings(tmp_path / "b")
    write(tmp_path / "c", vectors(3), name="1.parquet")
    write(tmp_path / "c", vectors(3), name="2.parquet")
    with pytest.raises(InputError, match="3 duplicate ids"):
        open_embeddings(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorruptError, match=r"x\.parquet is not a Parquet file"):
        open_embeddings(tmp_path / "d")


def _no_name(tmp_path: Path) -> Path:
    folder = write(tmp_path / "a", vectors(3))
    table = pq.read_table(folder / "part.parquet").drop_columns(["name"])
    pq.write_table(table, folder / "part.parquet")
    return folder


def test_rows_of_a_collection_are_dense_and_ids_distinct(tmp_path: Path) -> None:
    splits = ["db", "query", "db", "db", "query"]
    write(tmp_path / "a", vectors(5), split=splits)
    write(tmp_path / "b", vectors(4, seed=1), split=["distractor"] * 4)
    collection, names = open_collection([str(tmp_path / "a"), str(tmp_path / "b")])
    assert collection.num_rows == 7
    assert names.column("id").to_pylist() == [0, 2, 3, 5, 6, 7, 8]
    assert names.column("source").to_pylist() == [0, 0, 0, 1, 1, 1, 1]
    assert names.column("split").to_pylist() == ["db"] * 3 + ["distractor"] * 4
    parts = list(collection.vectors(2, 6))
    assert [(first, len(x)) for first, x in parts] == [(2, 1), (3, 3)]
    expected = np.concatenate([vectors(5)[[0, 2, 3]], vectors(4, seed=1)])
    assert np.array_equal(np.concatenate([x for _, x in collection.vectors(0, 7)]), expected)
    assert not collection.ref.verified


@pytest.mark.ray
def test_a_flipped_byte_in_our_own_shard_is_found(embeddings: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(embeddings / "distractors", tmp_path / "e")
    shard = tmp_path / "e" / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match=r"shard-00001\.parquet has other content"):
        list(open_embeddings(tmp_path / "e").blocks())
    with pytest.raises(CorruptError, match=r"shard-00001\.parquet"):
        artifact.verify(tmp_path / "e")
