"""Which image becomes which row of which shard, decided before a byte of an image is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from iir_dist.config import StageConfig
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.data.images import MAX_MEGAPIXELS
from iir_dist.data.listing import MEMBERS, Listing
from iir_dist.errors import GroundTruthError, InputError
from iir_dist.ingest.labels import find_labels, folders, labelled
from iir_dist.vectors import I64

Split = Literal["db", "query", "train", "distractor"]
ROWS = pa.schema([*MEMBERS, pa.field("box", pa.list_(pa.float32(), 4))])
"""A plan's rows: a member of a source, and what its row of `images/` is to say."""
REJECTED = pa.schema([(name, pa.string()) for name in ("name", "source", "reason", "detail")])
MAX_SHARD_ROWS = 8192
"""However small the images are: a shard is also what a killed run does again."""
PIECE = 8192
"""Rows that are looked at at once."""
UNKNOWN_BYTES = 2**18
"""Stands for the size of an image whose list does not say it."""


class IngestConfig(StageConfig):
    """`[ingest]`."""

    split: Split = "db"
    """Split of the rows: `query` for photos to search with; queries of a ground truth have it anyway."""
    shard_mb: float = Field(256, gt=0, le=1024)
    """Target size of a shard, in MB of image bytes."""
    max_megapixels: float = Field(MAX_MEGAPIXELS, gt=0, le=178)
    """Larger images are rejected (a decompression bomb is small as a file)."""
    allow_missing: bool = False
    """Accept a ground truth that names images which are not there; they count as never found."""
    dedupe: bool = False
    """Leave out an image whose bytes are those of an earlier one; without it they are only reported."""
    any_ending: bool = False
    """Take every file for an image, whatever its name ends with: stores by content have no endings."""
    folder_labels: bool = True
    """Label an image that has no other label with the folder that it lies in."""
    only_labelled: bool = False
    """Only images that --labels names; the others are not looked at."""
    max_rejected: float = Field(0.01, ge=0, le=1)
    """The largest fraction of rejected images with which the command still succeeds; the work is kept in any case."""
    execution: ClassVar[frozenset[str]] = frozenset({"max_rejected"})


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows by place in the listing: first the database, then one for each query; and what the listing alone refuses."""

    listing: Listing
    num_images: int
    places: I64
    shards: tuple[tuple[int, int], ...]
    rejected: pa.Table
    split: Split
    boxes: tuple[tuple[float, float, float, float] | None, ...]
    labels: pa.Array | None
    folder_labels: bool

    def rows(self, number: int) -> pa.Table:
        """The rows of one shard, schema `ROWS`."""
        start, stop = self.shards[number]
        table = self.listing.take(self.places[start:stop])
        first_query = len(self.places) - len(self.boxes)
        queries = np.arange(start, stop) >= first_query
        boxes = [self.boxes[i - first_query] if i >= first_query else None for i in range(start, stop)]
        split = pc.if_else(pa.array(queries), "query", pc.coalesce(table["split"].combine_chunks(), self.split))
        columns = {name: table[name].combine_chunks() for name in MEMBERS.names} | {"split": split}
        if self.labels is not None:
            columns["label"] = pc.coalesce(self.labels.take(pa.array(self.places[start:stop])), columns["label"])
        if self.folder_labels:
            columns["label"] = pc.coalesce(columns["label"], folders(columns["name"]))
        return pa.table({**columns, "box": pa.array(boxes, ROWS.field("box").type)}, schema=ROWS)

    def only(self, places: I64, rejected: pa.Table, shard_bytes: int) -> Plan:
        """A plan of some of the database rows, with another ledger."""
        shards = tuple(_cut(_sizes(self.listing)[places], shard_bytes))
        return dataclasses.replace(self, places=places, shards=shards, rejected=rejected, boxes=())


def plan(
    listing: Listing, config: IngestConfig, truth: GroundTruth | None = None, labels: pa.Table | None = None
) -> Plan:
    """Decide every row; pure.

    Database rows come in the listing's order, then one row for each query. A query's image is a database row as
    well if the ground truth labels it (original Oxford and Paris: it is one of the Good ones), and is not otherwise
    (revisited: queries are not in the database).

    Args:
        labels: `name` and `label` (strings), for the labels of rows before any that a source gives.

    Raises:
        GroundTruthError: it names images that are not there, and `config.allow_missing` is not set.
    """
    found = find_labels(listing.names, labels) if labels is not None else None
    considered = np.ones(len(listing), bool)
    if config.only_labelled:
        if found is None:
            raise InputError("only_labelled = true needs labels to go by; give --labels FILE")
        considered = labelled(found)
    usable, rejected = _usable(listing, considered)
    boxes: list[tuple[float, float, float, float] | None] = []
    queries = np.zeros(0, np.int64)
    if truth is not None:
        queries, only_queries = _queries(truth, listing.names, usable, config.allow_missing)
        boxes = [query.box for query in truth.queries]
        usable = usable[~np.isin(usable, only_queries)]
    places = np.concatenate([usable, queries])
    shards = tuple(_cut(_sizes(listing)[places], int(config.shard_mb * 2**20)))
    return Plan(
        listing,
        int(considered.sum()),
        places,
        shards,
        rejected,
        config.split,
        tuple(boxes),
        found,
        config.folder_labels,
    )


def _sizes(listing: Listing) -> I64:
    sizes: I64 = listing.spool["size"].take(pa.array(listing.order)).to_numpy()
    return np.where(sizes < 0, UNKNOWN_BYTES, sizes)


def _usable(listing: Listing, considered: npt.NDArray[np.bool_]) -> tuple[I64, pa.Table]:
    """Places that can become rows, and the ledger of the others: those with a problem, and all but the first of a name."""
    problem = pc.not_equal(listing.spool["problem"].take(pa.array(listing.order)), "").to_numpy()
    bad, good = np.flatnonzero(problem & considered), np.flatnonzero(~problem & considered)
    names = listing.names.take(pa.array(good)) if len(good) < len(listing) else listing.names
    order = pc.sort_indices(
        pa.table({"name": names, "at": good}), [("name", "ascending"), ("at", "ascending")]
    ).to_numpy()
    same = np.zeros(len(good), bool)
    for start in range(1, len(good), PIECE):
        piece = names.take(pa.array(order[start - 1 : start + PIECE]))
        same[start : start + PIECE] = pc.equal(piece[1:], piece[:-1]).to_numpy(zero_copy_only=False)
    runs = np.flatnonzero(~same)  # where each name begins
    again = np.flatnonzero(same)
    twice, taken = good[order[again]], good[order[runs[np.searchsorted(runs, again, side="right") - 1]]]
    lines: list[tuple[str, str, str, str]] = []
    for start in range(0, len(bad), PIECE):
        table = listing.take(bad[start : start + PIECE])
        sizes = [f"{size} bytes" for size in table["size"].to_pylist()]
        lines += zip(table["name"].to_pylist(), where(table), table["problem"].to_pylist(), sizes, strict=True)
    for start in range(0, len(twice), PIECE):
        table, firsts = listing.take(twice[start : start + PIECE]), listing.take(taken[start : start + PIECE])
        details = [f"already taken by {place}" for place in where(firsts)]
        lines += zip(table["name"].to_pylist(), where(table), ["duplicate_name"] * len(table), details, strict=True)
    return np.setdiff1d(good, twice), ledger(lines)


def _queries(truth: GroundTruth, names: pa.Array, usable: I64, allow_missing: bool) -> tuple[I64, I64]:
    """Place of each query's image, and the places of those that are no database rows."""
    wanted = truth.images()
    # A name is matched whole or by its last component; only such candidates become Python strings.
    last = pa.array(sorted({name.rpartition("/")[2] for name in wanted}))
    candidates = names.take(pa.array(usable))
    likely = pc.is_in(pc.replace_substring_regex(candidates, r"^.*/", ""), last).to_numpy(zero_copy_only=False)
    place_of = dict(zip(candidates.filter(pa.array(likely)).to_pylist(), usable[likely].tolist(), strict=True))
    found = groundtruth.match(wanted, place_of)
    missing = sorted(wanted - set(found))
    missing_queries = [q.image for q in truth.queries if q.image not in found]
    if missing and not allow_missing:
        raise GroundTruthError(
            f"the ground truth names {len(missing)} of {len(wanted)} images that are not in the source "
            f"(first: {', '.join(missing[:3])}); complete the source, or --set allow_missing=true to count them as "
            "never found"
        )
    if missing_queries:
        raise GroundTruthError(
            f"{len(missing_queries)} query images are not in the source, first {missing_queries[0]!r}"
        )
    queries = np.array([place_of[found[q.image]] for q in truth.queries], np.int64)
    labelled = [place_of[found[n]] for q in truth.queries for names in q.labels.values() for n in names if n in found]
    return queries, np.setdiff1d(queries, np.array(labelled, np.int64))


def _cut(sizes: I64, shard_bytes: int) -> Iterable[tuple[int, int]]:
    """Ranges of rows of at most `shard_bytes` and `MAX_SHARD_ROWS`, of at least one row."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + shard_bytes, side="right"))
        stop = min(max(stop, start + 1), start + MAX_SHARD_ROWS)
        yield start, stop
        start = stop


def where(table: pa.Table) -> list[str]:
    """Source and key of each row, for the ledger."""
    keys = [key.decode("utf-8", "backslashreplace") for key in table["key"].to_pylist()]
    return [f"{source}!{key}" for source, key in zip(table["source"].to_pylist(), keys, strict=True)]


def ledger(lines: Iterable[Sequence[Any]]) -> pa.Table:
    """Lines (name, source, reason, detail) as a table of schema `REJECTED`, in order of name and source."""
    lines = sorted(lines, key=lambda line: (line[0], line[1]))
    return pa.table({n: [line[i] for line in lines] for i, n in enumerate(REJECTED.names)}, schema=REJECTED)
