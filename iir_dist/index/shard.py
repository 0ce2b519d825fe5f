"""One shard of an index, loaded: scan of its codes, and exact scores from its float16 vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from iir_dist import artifact
from iir_dist.artifact import FileEntry, shard_name
from iir_dist.errors import CorruptError
from iir_dist.index.build import TEMPLATE, VECTORS, VECTORS_SUFFIX, transforms
from iir_dist.storage import Folder, LocalFolder
from iir_dist.vectors import F32, I64


class Shard:
    """A shard's faiss file and float16 vectors, both verified against the manifest before use.

    On local disk they are memory-mapped; from an object store they are read into memory.
    """

    def __init__(
        self, folder: Folder, number: int, rows: tuple[int, int], dim: int, files: dict[str, FileEntry]
    ) -> None:
        self.folder, self.number, self.dim, self.files = folder, number, dim, files
        self.start, self.stop = rows

    def open(self) -> None:
        """Verify and load; apart from the constructor so that its errors come back from an actor as themselves.

        Raises:
            CorruptError: a file is missing or not the one that was written.
        """
        import faiss

        faiss.omp_set_num_threads(1)  # the fan-out over shards is the parallelism
        folder, count = self.folder, self.stop - self.start
        name, vectors = shard_name(self.number, ".faiss"), shard_name(self.number, VECTORS_SUFFIX, VECTORS)
        for file in (name, vectors):
            # A flipped byte in a faiss file loads without complaint and answers wrongly.
            artifact.check_file(folder, file, self.files[file])
        if isinstance(folder, LocalFolder):
            self.index = faiss.read_index(str(folder.path / name), faiss.IO_FLAG_MMAP)
            self.vectors: Any = np.memmap(folder.path / vectors, np.float16, "r", shape=(count, self.dim))
        else:
            with folder.local(name) as path:
                self.index = faiss.read_index(str(path))
            self.vectors = np.frombuffer(folder.read(vectors), np.float16).reshape(count, self.dim)
        if self.index.ntotal != count:
            raise CorruptError(f"{folder.address(name)} holds {self.index.ntotal} vectors, its manifest says {count}")

    def scan(self, xq: F32, lists: I64, coarse: F32, k: int) -> tuple[F32, I64]:
        """Top k by code.

        Args:
            xq: (nq, d') queries after the index's transform.
            lists: (nq, nprobe) lists to visit, chosen once for all shards.
            coarse: (nq, nprobe) scores of the queries with these centroids.

        Returns:
            scores and database rows, (nq, k); row -1 where the lists hold fewer.
        """
        import faiss
        from faiss.contrib.ivf_tools import search_preassigned

        ivf = faiss.extract_index_ivf(self.index)
        ivf.nprobe = lists.shape[1]
        return search_preassigned(ivf, xq, k, lists, coarse)  # type: ignore[no-any-return]

    def rescore(self, xq: F32, rows: I64) -> F32:
        """Inner products of each query with the rows of its candidates that lie in this shard; -inf elsewhere.

        Args:
            xq: (nq, d) queries as embedded.
            rows: (nq, m) database rows, of any shard.
        """
        scores = np.full(rows.shape, -np.inf, np.float32)
        for q, candidates in enumerate(rows):
            mine = np.flatnonzero((candidates >= self.start) & (candidates < self.stop))
            scores[q, mine] = self.vectors[candidates[mine] - self.start].astype(np.float32) @ xq[q]
        return scores


class Coarse:
    """The template: transforms queries and assigns them to lists, once for all shards."""

    def __init__(self, folder: Folder, entry: FileEntry) -> None:
        import faiss

        artifact.check_file(folder, TEMPLATE, entry)
        with folder.local(TEMPLATE) as path:
            self.index: Any = faiss.read_index(str(path))

    def assign(self, xq: F32, nprobe: int) -> tuple[F32, I64, F32]:
        """(queries transformed, lists (nq, nprobe), scores with their centroids)."""
        import faiss

        xt = xq
        for transform in transforms(self.index):
            xt = transform.apply(xt)
        coarse, lists = faiss.extract_index_ivf(self.index).quantizer.search(xt, nprobe)
        return xt, lists, coarse
