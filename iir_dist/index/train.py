"""Train the template of an index: the one set of transforms, centroids and codebooks that all its shards start from.

The sample is chosen by a hash of row numbers, so it comes from all over the database, and is a function of the number
of rows, the size and the seed alone: neither of shards nor of workers. So is the template, bit for bit, whatever the
number of threads: matrix products and decompositions, whose bits depend on it, run on one thread where they decide.
On a GPU the coarse centroids differ in the last bits.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from iir_dist.data.collection import Collection
from iir_dist.errors import ConfigError
from iir_dist.index.plan import IndexPlan
from iir_dist.vectors import F32, I64

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before faiss is loaded: threads that spin take a core from others

OPQ_ITERATIONS = 10
"""faiss's 50 cost five times as long for nothing: squared error 0.05578 after 10 and 0.05588 after 50 iterations
(3,104 real descriptors of 256 dimensions, OPQ64_256,IVF64,PQ64)."""
TWO_LEVELS_FROM = 8192
"""Lists from which on they are found in two levels: the time grows with sqrt(nlist) and not with nlist."""
KMEANS_ITERATIONS = 10
"""As faiss does for coarse centroids."""
EF_SEARCH, EF_CONSTRUCTION = 128, 200
"""Of an HNSW coarse quantizer: it is built once and asked for every vector and query."""


# ------------------------------------------------------------------------------------------------ the sample


def hashes(rows: I64, seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash of each row number, without collisions (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    z = rows.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def sample_rows(num_rows: int, size: int, seed: int) -> I64:
    """The `size` rows (all, where there are fewer) with the smallest hashes, ascending.

    >>> sample_rows(10**6, 4, seed=0).tolist()
    [26331, 746182, 814239, 836373]
    """
    if size >= num_rows:
        return np.arange(num_rows)
    block = max(2**20, size)
    rows, keys = np.empty(0, np.int64), np.empty(0, np.uint64)
    for first in range(0, num_rows, block):
        more = np.arange(first, min(first + block, num_rows))
        rows, keys = np.concatenate([rows, more]), np.concatenate([keys, hashes(more, seed)])
        if len(rows) > size:
            near = np.argpartition(keys, size - 1)[:size]
            rows, keys = rows[near], keys[near]
    return np.sort(rows)


def distinct(x: F32) -> I64:
    """Ascending numbers of the rows of `x` (n, d) that no row before equals bit for bit."""
    words = np.ascontiguousarray(x).view(np.uint32)
    odd = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    keys = [(words[i : i + 4096] * odd).sum(axis=1, dtype=np.uint64) for i in range(0, len(words), 4096)]
    return np.sort(np.unique(np.concatenate(keys), return_index=True)[1])


def sample(collection: Collection, size: int, seed: int) -> F32:
    """Up to `size` distinct vectors from all over the collection, (n, d) float32, in order of their rows.

    Memory is that of the sample and of one embeddings shard. Exact duplicates count once: they would draw centroids to
    themselves.
    """
    rows = sample_rows(collection.num_rows, size, seed)
    xt = np.empty((len(rows), collection.dim), np.float32)
    for first, x in collection.vectors(0, collection.num_rows):
        low, high = np.searchsorted(rows, (first, first + len(x)))
        xt[low:high] = x[rows[low:high] - first]
    kept = distinct(xt)
    return xt if len(kept) == len(xt) else xt[kept]


# ------------------------------------------------------------------------------------------------ centroids


def kmeans(x: F32, k: int, seed: int) -> F32:
    """k unit centroids (k, d) of `x` (n, d), n >= k, by spherical k-means; on all GPUs where there are some."""
    import faiss

    clustering = faiss.Clustering(x.shape[1], k)
    clustering.niter, clustering.seed, clustering.spherical = KMEANS_ITERATIONS, seed, True
    clustering.min_points_per_centroid = 1  # the plan decides; faiss would only print
    clustering.max_points_per_centroid = len(x) // k + 1  # and has chosen the sample
    clustering.train(np.ascontiguousarray(x), on_gpus(faiss.IndexFlatIP(x.shape[1])))
    return np.asarray(faiss.vector_to_array(clustering.centroids).reshape(k, -1), np.float32)


def on_gpus(flat: Any) -> Any:
    """The same flat index on all GPUs, or itself where there is none."""
    import faiss

    return faiss.index_cpu_to_all_gpus(flat) if faiss.get_num_gpus() else flat


@contextlib.contextmanager
def assigning_on_gpus(index: Any) -> Iterator[None]:
    """Assign what is added to lists on all GPUs meanwhile, where there are some and the coarse quantizer is flat."""
    import faiss

    ivf = ivf_of(index)
    flat: Any = faiss.downcast_index(ivf.quantizer)
    if not faiss.get_num_gpus() or not isinstance(flat, faiss.IndexFlat):
        yield
        return
    ivf.quantizer = on_gpu = on_gpus(flat)
    try:
        yield
    finally:
        ivf.quantizer = flat
        del on_gpu


def nearest(x: F32, centroids: F32) -> I64:
    """Number of the centroid with the largest inner product for each row of `x`."""
    import faiss

    flat = faiss.IndexFlatIP(x.shape[1])
    flat.add(centroids)
    return np.asarray(on_gpus(flat).search(np.ascontiguousarray(x), 1)[1].ravel())


def apportion(counts: I64, total: int) -> I64:
    """Split `total` in proportion to `counts` by largest remainders: whole numbers, none above its count.

    >>> apportion(np.array([5, 3, 1, 0]), 4)
    array([2, 1, 1, 0])
    """
    exact = counts * (total / counts.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), counts)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return np.asarray(shares)


def two_level_centroids(x: F32, k: int, seed: int) -> F32:
    """k unit centroids (k, d) in sqrt(k) clusters: each is clustered alone, into as many as it has points for.

    As `two_level_clustering` in faiss's contrib/clustering.py, for 10^9 vectors in its big-ann entry.
    """
    top = kmeans(x, round(math.sqrt(k)), seed)
    members = nearest(x, top)
    shares = apportion(np.bincount(members, minlength=len(top)), k)
    parts = [kmeans(x[members == j], share, seed + 1 + j) for j, share in enumerate(shares.tolist()) if share]
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------ the template


def train(collection: Collection, todo: IndexPlan, seed: int, threads: int) -> Any:
    """The trained, empty faiss index.

    Raises:
        ConfigError: faiss refuses the factory string, or the sample has fewer distinct vectors than lists.
    """
    import faiss

    xt = sample(collection, todo.train_size, seed)
    with _refusals(todo.factory, collection.dim):
        index = faiss.index_factory(collection.dim, todo.factory, faiss.METRIC_INNER_PRODUCT)
        ivf = ivf_of(index)
        faiss.omp_set_num_threads(1)
        for transform in transforms(index):
            if isinstance(transform, faiss.OPQMatrix):
                _set_up_opq(transform, ivf)
            if not transform.is_trained:
                transform.train(xt)
            xt = transform.apply(xt)
        if len(xt) < ivf.nlist:
            raise ConfigError(
                f"{todo.factory!r} has {ivf.nlist} lists and the sample {len(xt)} distinct vectors; expected at least as "
                "many: --set factory= with fewer lists, for example IVF1,Flat, or a larger train_size"
            )
        faiss.omp_set_num_threads(threads)
        cluster = two_level_centroids if ivf.nlist >= TWO_LEVELS_FROM else kmeans
        centroids = cluster(xt, ivf.nlist, seed + 1234)
        quantizer: Any = faiss.downcast_index(ivf.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efConstruction, quantizer.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
            faiss.omp_set_num_threads(1)  # threads would link the graph in the order in which they come
        quantizer.add(centroids)
        faiss.omp_set_num_threads(threads)
        if hasattr(ivf, "pq"):
            ivf.pq.cp.min_points_per_centroid = 1
        ivf.train(np.ascontiguousarray(xt))
        index.is_trained = True
    return index


def _set_up_opq(transform: Any, ivf: Any) -> None:
    """As few iterations as it takes, towards codebooks of the size that the index has."""
    import faiss

    bits = ivf.pq.nbits if hasattr(ivf, "pq") else 8
    transform.niter = OPQ_ITERATIONS
    transform.pq = pq = faiss.ProductQuantizer(transform.d_out, transform.M, bits)
    pq.cp.min_points_per_centroid = 1
    transform.kept = pq  # faiss holds a bare pointer


@contextlib.contextmanager
def _refusals(factory: str, dim: int) -> Any:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[-1] if str(error) else "unknown"
        raise ConfigError(f"faiss cannot build {factory!r} for dimension {dim}: {reason}") from error


def ivf_of(index: Any) -> Any:
    """The inverted lists of an index, as what they are; what faiss extracts has only the base's members."""
    import faiss

    return faiss.downcast_index(faiss.extract_index_ivf(index))


def transforms(index: Any) -> list[Any]:
    """The vector transforms in front of an index (OPQ, PCA, Pad), in order."""
    import faiss

    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain: Any = index.chain
    return [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
