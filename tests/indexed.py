"""Small indexes for tests, made in this process: what the stage writes, without Ray and without a training of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest
from iir_dist.config import StageConfig
from iir_dist.data.collection import open_collection
from iir_dist.data.embeddings import schema
from iir_dist.index import search as stage
from iir_dist.index.build import fill
from iir_dist.index.engine import open_index
from iir_dist.index.search import SearchConfig
from iir_dist.index.shard import NAMES_FILE, TEMPLATE
from iir_dist.storage import open_folder
from iir_dist.vectors import F32, I64, normalize


def random_unit(n: int, dim: int, seed: int) -> F32:
    return normalize(np.random.default_rng(seed).normal(size=(n, dim)))


def exact_unit(n: int, seed: int) -> F32:
    """(n, 8) unit vectors with four coordinates of one half: inner products are exact in float32, and many are equal."""
    rng = np.random.default_rng(seed)
    places = np.argsort(rng.random((n, 8)), axis=1)[:, :4]
    x = np.zeros((n, 8), np.float32)
    np.put_along_axis(x, places, rng.choice([-0.5, 0.5], size=(n, 4)).astype(np.float32), axis=1)
    return x


def write_vectors(
    folder: Path, x: F32, prefix: str = "db", split: str | None = "db", files: int = 1, encoder: str | None = None
) -> Path:
    """Embeddings: plain Parquet of somebody, or, where an encoder is named, the artifact that `embed` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    names, dim = [], x.shape[1]
    for number, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        columns = {
            "id": rows, "name": [f"{prefix}_{r:05d}" for r in rows], "split": [split] * len(rows),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x[rows].ravel()), dim),
        }  # fmt: skip
        names.append(f"shard-{number:05d}.parquet")
        table = pa.table(columns, schema=schema(dim)) if split else pa.table(columns).drop_columns("split")
        if encoder is None:
            pq.write_table(table, folder / names[-1])
            continue
        with open_folder(folder).publish(names[-1]) as file:
            pq.write_table(table, file.path)
        artifact.commit(open_folder(folder), number, {names[-1]: artifact.entry_of(file)})
    if encoder is not None:
        refs = {"images": InputRef(uri="x", fingerprint="y")}
        work = artifact.Work(open_folder(folder), "embed", StageConfig(), refs)
        work.publish({"out": len(x)}, info={"encoder_fingerprint": encoder, "encoder": {"name": encoder}})
    return folder


@functools.cache
def template(factory: str, dim: int) -> bytes:
    """A trained, empty index; from vectors that are in no database."""
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    faiss.extract_index_ivf(index).cp.spherical = True
    index.train(random_unit(2000, dim, seed=99))
    return faiss.serialize_index(index).tobytes()


def make_index(
    folder: Path,
    embeddings: Sequence[Path],
    factory: str = "IVF8,Flat",
    cuts: Sequence[int] = (),
    nprobe: int = 8,
    refine: int = 4,
) -> Manifest:
    """An index over embeddings, cut into shards at these rows."""
    collection, names = open_collection([str(e) for e in embeddings])
    with artifact.begin(folder, "index", StageConfig(), {"embeddings": collection.ref}) as work:
        with work.folder.publish(TEMPLATE) as file:
            file.path.write_bytes(template(factory, collection.dim))
        trained = artifact.entry_of(file)
        artifact.commit(work.folder, "template", {TEMPLATE: trained})
        ranges = list(pairwise([0, *cuts, collection.num_rows]))
        for number, rows in enumerate(ranges):
            fill(work.folder, trained.sha256, number, rows, collection)
        with work.folder.publish(NAMES_FILE) as file:
            pq.write_table(names, file.path)
        empty = faiss.deserialize_index(np.frombuffer(template(factory, collection.dim), np.uint8))
        ivf = faiss.extract_index_ivf(empty)
        info = {
            "factory": factory, "nlist": ivf.nlist, "nprobe": nprobe, "refine": refine, "dim": collection.dim,
            "code_bytes": ivf.code_size, "template": trained.sha256, "encoder_fingerprint": collection.encoder,
            "shards": [{"template": trained.sha256, "rows": list(rows)} for rows in ranges],
        }  # fmt: skip
        return work.publish(
            {"rows": collection.num_rows}, {NAMES_FILE: artifact.entry_of(file)}, info, shards=len(ranges)
        )


def search(folder: Path, xq: F32, k: int, **arguments: object) -> tuple[F32, I64]:
    """One search of an index opened for it."""
    with open_index(folder, threads=2) as index:
        return index.search(xq, k, **arguments)  # type: ignore[arg-type]


def brute_force(xq: F32, xb: F32, k: int, allowed: Sequence[int] | I64 | None = None) -> tuple[F32, I64]:
    """The k best by a full sort: score descending, then row; row -1 and score -inf where there are fewer."""
    rows = np.arange(len(xb)) if allowed is None else np.asarray(allowed, np.int64)
    scores = xq @ xb[rows].T
    found_scores, found = np.full((len(xq), k), -np.inf, np.float32), np.full((len(xq), k), -1)
    for q in range(len(xq)):
        order = sorted(range(len(rows)), key=lambda i: (-scores[q, i], rows[i]))[:k]
        found_scores[q, : len(order)], found[q, : len(order)] = scores[q, order], rows[order]
    return found_scores, found


# ------------------------------------------------------------------------------------------------ through the stages

N, DIM, NQ = 3000, 32, 20
"""Of the vectors that `conftest` writes."""


def clustered(n: int, seed: int) -> F32:
    """Structured but not easy: 60 directions shared by all, noise as large as they are."""
    centres = np.random.default_rng(0).normal(size=(60, DIM))
    rng = np.random.default_rng(seed)
    return normalize(centres[rng.integers(60, size=n)] + rng.normal(size=(n, DIM)))


def ranking(
    database: Path, vectors: Path, out: Path, only: str | None = None, **config: object
) -> tuple[Manifest, I64, F32]:
    """Search by the stage; its rankings are checked for form: (manifest, ids (NQ, k), scores (NQ, k))."""
    settings = SearchConfig.model_validate(config)
    manifest = stage.run([str(database)], [str(vectors / "queries")], str(out), settings, only=only)
    table = pa.concat_tables(pq.read_table(out / name) for name in manifest.shards())
    assert table.schema.equals(stage.RANKINGS)
    k = len(table) // NQ
    ids, scores = table.column("id").to_numpy().reshape(NQ, k), table.column("score").to_numpy().reshape(NQ, k)
    assert table.column("query").to_pylist() == [f"query_{q:05d}" for q in range(NQ) for _ in range(k)]
    assert table.column("rank").to_numpy().reshape(NQ, k).tolist() == [list(range(k))] * NQ
    assert table.column("name").to_pylist() == [f"db_{i:05d}" for i in ids.ravel()]
    assert (np.diff(scores, axis=1) <= 0).all()  # larger is better
    return manifest, ids, scores
