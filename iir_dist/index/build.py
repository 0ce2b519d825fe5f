"""Build a sharded index: train one template on a sample, fill each shard in a task of its own, measure what came out.

Every shard starts from the same trained template (rotation, coarse centroids, codebooks), and says by which SHA-256.
That is what makes the merge of their answers exact: a score means the same in all of them.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import FileEntry, Manifest, shard_name
from iir_dist.data.collection import Collection, check_same_space, open_collection
from iir_dist.data.embeddings import open_embeddings
from iir_dist.errors import IirError
from iir_dist.index import points
from iir_dist.index.fanout import opened_on, searching_actors
from iir_dist.index.plan import ADD_ROWS, MB, IndexConfig, IndexPlan, plan
from iir_dist.index.shard import NAMES_FILE, TEMPLATE, VECTORS, VECTORS_SUFFIX, write_faiss
from iir_dist.index.train import assigning_on_gpus, train
from iir_dist.progress import Progress
from iir_dist.storage import Folder
from iir_dist.vectors import F32

log = logging.getLogger(__name__)


def fill(
    folder: Folder, template_sha256: str, number: int, rows: tuple[int, int], collection: Collection, threads: int = 1
) -> None:
    """Write one shard: its faiss file, ids being database rows, and its float16 vectors; then commit it."""
    import faiss

    faiss.omp_set_num_threads(threads)
    with folder.local(TEMPLATE) as path:
        index = faiss.read_index(str(path))
    start, stop = rows
    vectors_name = shard_name(number, VECTORS_SUFFIX, VECTORS)
    with (
        folder.publish(vectors_name) as vectors,
        open(vectors.path, "wb") as out,
        assigning_on_gpus(index),
    ):
        for first, x in collection.vectors(start, stop):
            for part in range(0, len(x), ADD_ROWS):
                xb = x[part : part + ADD_ROWS]
                index.add_with_ids(xb, np.arange(first + part, first + part + len(xb)))
                out.write(xb.astype(np.float16).data)
    if index.ntotal != stop - start:
        raise IirError(f"index shard {number} holds {index.ntotal} vectors, expected {stop - start}")
    name = shard_name(number, ".faiss")
    with folder.publish(name) as file:
        write_faiss(index, file.path)
    files = {name: artifact.entry_of(file), vectors_name: artifact.entry_of(vectors)}
    info = {"template": template_sha256, "rows": [start, stop], "peak_bytes": peak_bytes()}
    artifact.commit(folder, number, files, {"rows": stop - start}, info)


def peak_bytes() -> int:
    """Memory that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(
    embeddings: list[str], out: str, config: IndexConfig, *, queries: Sequence[str] = (), force: bool = False
) -> Manifest:
    """Build an index over one or more embeddings folders.

    Args:
        queries: embeddings folders with queries to measure recall with; rows of split `query` in `embeddings` are
            used besides.
    """
    collection, names = open_collection(embeddings)
    refs, others = {"embeddings": collection.ref}, tuple(open_embeddings(uri) for uri in queries)
    if others:
        check_same_space((collection.sources[0], *others))
        refs["queries"] = artifact.combine(source.ref for source in others)
    with artifact.begin(out, "index", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        block_rows = max(segment.count for segment in collection.segments)
        todo = plan(collection.num_rows, collection.dim, config, block_rows)
        log.info("index: %s", todo.summary(collection.num_rows, collection.dim))
        start = time.monotonic()
        template = _fill(work, collection, todo, config.seed)
        filled = time.monotonic()
        with work.folder.publish(NAMES_FILE) as file:
            pq.write_table(names, file.path, compression="zstd")
        markers = work.done()
        peaks = [m.info["peak_bytes"] for m in (*markers.values(), work.step("template")) if m is not None]
        info = {
            "factory": todo.factory, "nlist": todo.nlist, "nprobe": todo.nprobe, "refine": todo.refine,
            "dim": collection.dim, "code_bytes": todo.code_bytes, "template": template.sha256,
            "encoder_fingerprint": collection.encoder,
            "shards": [{"template": markers[n].info["template"], "rows": list(r)} for n, r in enumerate(todo.ranges)],
            "sources": [s.ref.model_dump() for s in collection.sources],
        }  # fmt: skip
        draft: dict[str, Any] = {
            "counts": {"rows": collection.num_rows}, "files": {NAMES_FILE: artifact.entry_of(file)}, "info": info,
            "shards": len(todo.ranges),
        }  # fmt: skip
        found = _points(work, draft, (*collection.sources, *others), config)
        info.update(points.choose(found, config))
        memory = {
            "search": found.memory_bytes["index"], "search_planned": todo.search_bytes,
            "build": max(peaks), "build_planned": todo.build_bytes,
        }  # fmt: skip
        info["memory_bytes"] = memory
        info["seconds_of"] = {"build": round(filled - start, 2), "measure": round(time.monotonic() - filled, 2)}
        log.info(
            "index: search holds %.0f MB (planned %.0f), a worker of the build held %.0f MB (planned %.0f)",
            *(size / MB for size in memory.values()),
        )
        return work.publish(**draft)


def _fill(work: artifact.Work, collection: Collection, todo: IndexPlan, seed: int) -> FileEntry:
    """Train the template and fill the shards that are not done."""
    ray = session.connect()
    done = work.done()
    finished = sum(done[n].counts["rows"] for n in range(len(todo.ranges)) if n in done)
    with Progress("index", collection.num_rows, "vectors", done=finished) as progress:
        template = _template(work, ray, collection, todo, seed)
        # Of all shards and not of those that are left: a shard has the same bits when it is made again.
        threads = max(1, min(session.cluster_cpus() // len(todo.ranges), session.largest_node_cpus()))
        gpus = min(1, session.cluster_gpus() / len(todo.ranges))
        task = ray.remote(num_cpus=threads, num_gpus=gpus)(fill)
        tasks = {
            task.remote(work.folder, template.sha256, n, rows, collection, threads): rows
            for n, rows in enumerate(todo.ranges)
            if n not in done
        }
        try:
            while tasks:
                for ref in ray.wait(list(tasks), num_returns=1)[0]:
                    session.result_of(ref)
                    start, stop = tasks.pop(ref)
                    progress.advance(stop - start)
                progress.in_flight(len(tasks))
        finally:  # without the lock they would write into the next run
            for ref in tasks:
                ray.cancel(ref, force=True)
            if tasks:
                ray.wait(list(tasks), num_returns=len(tasks))
    return template


def _template(work: artifact.Work, ray: Any, collection: Collection, todo: IndexPlan, seed: int) -> FileEntry:
    """Train once, or take the template of the run that is being continued."""
    marker = work.step("template")
    if marker is not None:
        return marker.files[TEMPLATE]
    threads = session.largest_node_cpus()
    task = ray.remote(num_cpus=threads, num_gpus=min(1, session.cluster_gpus()))(_train)
    session.result_of(task.remote(work.folder, collection, todo, seed, threads))
    marker = work.step("template")
    assert marker is not None
    return marker.files[TEMPLATE]


def _train(folder: Folder, collection: Collection, todo: IndexPlan, seed: int, threads: int) -> None:
    index = train(collection, todo, seed, threads)
    with folder.publish(TEMPLATE) as file:
        write_faiss(index, file.path)
    artifact.commit(folder, "template", {TEMPLATE: artifact.entry_of(file)}, info={"peak_bytes": peak_bytes()})


def _points(
    work: artifact.Work, draft: dict[str, Any], sources: Sequence[Any], config: IndexConfig
) -> points.OperatingPoints:
    """Measure once, or take what the run that is being continued has measured."""
    if work.step("points") is None:
        others: F32 = points.other_queries(sources, sources[0].dim, config.seed)
        with opened_on(work.folder, work.draft(**draft), searching_actors()) as index:
            found = points.measure(index, others, config.seed)
        artifact.commit(work.folder, "points", points.write_points(work.folder, found))
    return points.read_points(work.folder, work.draft(**draft))
