"""Build a sharded index: train one template on a sample, then fill each shard in a task of its own.

Every shard starts from the same trained template (rotation, coarse centroids, codebooks), and says by which SHA-256.
That is what makes the merge of their answers exact: a score means the same in all of them.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, Manifest, shard_name
from iir_dist.data.collection import Collection, open_collection
from iir_dist.errors import ConfigError, IirError
from iir_dist.index.plan import IndexConfig, IndexPlan, plan
from iir_dist.progress import Progress
from iir_dist.storage import Folder

log = logging.getLogger(__name__)

OPQ_ITERATIONS = 10
"""faiss's 50 cost five times as long for nothing: squared error 0.05578 after 10 and 0.05588 after 50 iterations
(3,104 real descriptors of 256 dimensions, OPQ64_256,IVF64,PQ64)."""
TEMPLATE, NAMES_FILE = "trained.faiss", "names.parquet"
VECTORS, VECTORS_SUFFIX = "vectors", ".f16"


def sample_rows(num_rows: int, size: int, seed: int) -> np.ndarray[Any, Any]:
    """`size` distinct rows spread over all, ascending; the same for the same seed."""
    if size >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False))


def train(collection: Collection, todo: IndexPlan, seed: int, threads: int) -> Any:
    """The trained, empty faiss index.

    Raises:
        ConfigError: faiss refuses the factory string.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    rows = sample_rows(collection.num_rows, todo.train_size, seed)
    parts = [
        x[rows[(rows >= first) & (rows < first + len(x))] - first]
        for first, x in collection.vectors(0, collection.num_rows)
    ]
    xt = np.unique(np.concatenate(parts), axis=0)  # exact duplicates would draw centroids to themselves
    try:
        index = faiss.index_factory(collection.dim, todo.factory, faiss.METRIC_INNER_PRODUCT)
        ivf = faiss.extract_index_ivf(index)
        ivf.cp.spherical = True  # centroids of unit vectors under inner product
        ivf.cp.seed = seed + 1234
        ivf.cp.min_points_per_centroid = 1  # the plan decides; faiss would only print
        ivf.cp.max_points_per_centroid = max(256, len(xt) // max(ivf.nlist, 1) + 1)
        for transform in transforms(index):
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter = OPQ_ITERATIONS
        index.train(np.ascontiguousarray(xt))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1] if str(error) else "unknown"
        raise ConfigError(f"faiss cannot build {todo.factory!r} for dimension {collection.dim}: {reason}") from error
    return index


def transforms(index: Any) -> list[Any]:
    """The vector transforms in front of an index (OPQ, PCA), in order."""
    import faiss

    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain: Any = index.chain
    return [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]


def fill(folder: Folder, template_sha256: str, number: int, rows: tuple[int, int], collection: Collection) -> None:
    """Write one shard: its faiss file, ids being database rows, and its float16 vectors; then commit it."""
    import faiss

    faiss.omp_set_num_threads(1)
    with folder.local(TEMPLATE) as path:
        index = faiss.read_index(str(path))
    start, stop = rows
    vectors_name = shard_name(number, VECTORS_SUFFIX, VECTORS)
    with folder.publish(vectors_name) as vectors, open(vectors.path, "wb") as out:
        for first, x in collection.vectors(start, stop):
            index.add_with_ids(x, np.arange(first, first + len(x)))
            out.write(x.astype(np.float16).tobytes())
    if index.ntotal != stop - start:
        raise IirError(f"index shard {number} holds {index.ntotal} vectors, expected {stop - start}")
    name = shard_name(number, ".faiss")
    with folder.publish(name) as file:
        faiss.write_index(index, str(file.path))
    files = {name: artifact.entry_of(file), vectors_name: artifact.entry_of(vectors)}
    info = {"template": template_sha256, "rows": [start, stop]}
    artifact.commit(folder, number, files, {"rows": stop - start}, info)


def run(embeddings: list[str], out: str, config: IndexConfig, *, force: bool = False) -> Manifest:
    """Build an index over one or more embeddings folders."""
    collection, names = open_collection(embeddings)
    with artifact.begin(out, "index", config, {"embeddings": collection.ref}, force=force) as work:
        if work.finished:
            return work.finished
        todo = plan(collection.num_rows, collection.dim, config)
        log.info("index: %s", todo.summary(collection.num_rows, collection.dim))
        ray = session.connect()
        done = work.done()
        finished = sum(done[n].counts["rows"] for n in range(len(todo.ranges)) if n in done)
        with Progress("index", collection.num_rows, "vectors", done=finished) as progress:
            template = _template(work, ray, collection, todo, config.seed)
            task = ray.remote(fill)
            tasks = {
                task.remote(work.folder, template.sha256, n, rows, collection): rows
                for n, rows in enumerate(todo.ranges)
                if n not in done
            }
            while tasks:
                for ref in ray.wait(list(tasks), num_returns=1)[0]:
                    session.result_of(ref)
                    start, stop = tasks.pop(ref)
                    progress.advance(stop - start)
        with work.folder.publish(NAMES_FILE) as file:
            pq.write_table(names, file.path, compression="zstd")
        markers = work.done()
        info = {
            "factory": todo.factory, "nlist": todo.nlist, "nprobe": todo.nprobe, "refine": config.refine,
            "dim": collection.dim, "code_bytes": todo.code_bytes, "template": template.sha256,
            "encoder_fingerprint": collection.encoder,
            "shards": [{"template": markers[n].info["template"], "rows": list(r)} for n, r in enumerate(todo.ranges)],
        }  # fmt: skip
        return work.publish(
            {"rows": collection.num_rows}, {NAMES_FILE: artifact.entry_of(file)}, info, shards=len(todo.ranges)
        )


def _template(work: artifact.Work, ray: Any, collection: Collection, todo: IndexPlan, seed: int) -> FileEntry:
    """Train once, or take the template of the run that is being continued."""
    marker = work.step("template")
    if marker is not None:
        return marker.files[TEMPLATE]
    threads = session.cpu_count()
    task = ray.remote(num_cpus=min(threads, session.cluster_cpus()))(_train_bytes)
    with work.folder.publish(TEMPLATE) as file:
        file.path.write_bytes(session.result_of(task.remote(collection, todo, seed, threads)))
    entry = artifact.entry_of(file)
    artifact.commit(work.folder, "template", {TEMPLATE: entry})
    return entry


def _train_bytes(collection: Collection, todo: IndexPlan, seed: int, threads: int) -> bytes:
    import faiss

    return bytes(faiss.serialize_index(train(collection, todo, seed, threads)).tobytes())
