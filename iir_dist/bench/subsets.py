"""Distractors in an order by hash, cut at the steps: embeddings folders of which each step takes the first so many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest, shard_name
from iir_dist.bench.mixture import Mixture
from iir_dist.config import StageConfig
from iir_dist.data.collection import database_rows
from iir_dist.data.embeddings import Embeddings, schema
from iir_dist.index.train import hashes
from iir_dist.vectors import F32

SYNTHETIC = "synthetic"
"""Split of rows that are no photo's."""
ROWS_PER_SHARD = 50_000


class SubsetConfig(StageConfig):
    """Rows [start, stop) of the distractors in their order; those from `real` on are synthetic."""

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    real: int = Field(ge=0)
    seed: int = 0


class Distractors:
    """Real vectors in an order by hash, and then synthetic ones without end."""

    def __init__(self, sources: Sequence[Embeddings], seed: int, mixture: Mixture | None = None) -> None:
        blocks = [database_rows(block) for source in sources for block in source.blocks()]
        names = np.concatenate([b.names for b in blocks]) if blocks else np.empty(0, object)
        x = [b.vectors for b in blocks if b.vectors is not None]
        order = np.argsort(hashes(np.arange(len(names)), seed))
        self.names: np.ndarray[tuple[int], np.dtype[np.object_]] = names[order]
        self.vectors: F32 | None = np.concatenate(x)[order] if x else None
        self.mixture, self.seed = mixture, seed

    def rows(self, start: int, stop: int) -> Iterator[tuple[list[str], str, F32]]:
        """Names, split and vectors of rows [start, stop), in pieces."""
        real = len(self.names)
        if start < real:
            assert self.vectors is not None
            end = min(stop, real)
            yield [str(n) for n in self.names[start:end]], "distractor", self.vectors[start:end]
        for block in range(max(0, start - real) // ROWS_PER_SHARD, -(-max(0, stop - real) // ROWS_PER_SHARD)):
            assert self.mixture is not None
            x = self.mixture.sample(ROWS_PER_SHARD, (self.seed, 3, block))
            first = real + block * ROWS_PER_SHARD
            low, high = max(start, first), min(stop, first + ROWS_PER_SHARD)
            yield [f"{SYNTHETIC}/{row:09d}" for row in range(low, high)], SYNTHETIC, x[low - first : high - first]


def write_subset(
    out: str, distractors: Distractors, config: SubsetConfig, source: InputRef, space: Manifest, *, force: bool = False
) -> Manifest:
    """Write rows [start, stop) as embeddings of the space of `space`, another embeddings folder."""
    with artifact.begin(out, "distractors", config, {"distractors": source}, force=force) as work:
        if work.finished:
            return work.finished
        done = work.done()
        pieces = range(config.start, config.stop, ROWS_PER_SHARD)
        for number, first in enumerate(pieces):
            if number in done:
                continue
            last = min(first + ROWS_PER_SHARD, config.stop)
            tables = []
            for names, split, x in distractors.rows(first, last):
                columns = {
                    "name": names, "split": [split] * len(names),
                    "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
                }  # fmt: skip
                tables.append(pa.table(columns))
            table = pa.concat_tables(tables)
            table = table.add_column(0, "id", pa.array(np.arange(first - config.start, last - config.start)))
            kind = schema(table.column("embedding").type.list_size)
            with work.folder.publish(shard_name(number)) as file:
                pq.write_table(table.cast(kind), file.path, use_dictionary=["split"])
            counts = {"out": last - first, SYNTHETIC: last - max(first, min(last, config.real))}
            artifact.commit(work.folder, number, {shard_name(number): artifact.entry_of(file)}, counts)
        markers = work.done().values()
        totals = {key: sum(m.counts[key] for m in markers) for key in ("out", SYNTHETIC)}
        info = {key: space.info.get(key) for key in ("encoder_fingerprint", "encoder")}
        return work.publish(totals, info=info, shards=len(pieces))
