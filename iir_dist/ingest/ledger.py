"""The books of an ingest: what was refused, what is there twice, and that the counts add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Marker
from iir_dist.data.groundtruth import GroundTruth
from iir_dist.errors import ArtifactError, GroundTruthError, InputError
from iir_dist.ingest.plan import ledger
from iir_dist.storage import Folder

PLAN = "_work/plan/"
LEDGER = "rejected.parquet"
DUPLICATES = "duplicates.parquet"
DUPLICATE = pa.schema([(name, pa.string()) for name in ("name", "first", "sha256")])


def write_table(folder: Folder, name: str, table: pa.Table) -> FileEntry:
    """Publish a table as a Parquet file."""
    with folder.publish(name) as file:
        pq.write_table(table, file.path)
    return artifact.entry_of(file)


def read_table(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns."""
    with folder.open(name) as file:
        return pq.read_table(file, columns=columns)


def gather(
    folder: Folder, planned: Marker, markers: Mapping[int, Marker], shards: Sequence[str], truth: GroundTruth | None
) -> tuple[dict[str, int], dict[str, FileEntry], dict[str, object]]:
    """Counts and ledgers of all shards.

    Raises:
        InputError: no row is left.
        GroundTruthError: the image of a query cannot be used.
        ArtifactError: the counts do not add up.
    """
    # A query's image may be tried twice, as a query and as a database row; it is one image, so one line.
    late = ledger({tuple(line) for marker in markers.values() for line in marker.info["rejected"]})
    early = read_table(folder, f"{PLAN}{LEDGER}")
    rejected = pa.concat_tables([early, late]).sort_by([("name", "ascending"), ("source", "ascending")])
    images = planned.counts["in"]
    rows = planned.info["base"] + sum(marker.counts["rows"] for marker in markers.values())
    if not rows:
        first = rejected.slice(0, 1).to_pylist()[0]
        raise InputError(
            f"none of {images} images can be used; the first, {first['source']}: {first['reason']}, {first['detail']}"
        )
    if truth is not None:
        refused = {line["name"]: line for line in late.to_pylist()}
        for query in truth.queries:
            bad = next((refused[n] for n in refused if n == query.image or n.endswith("/" + query.image)), None)
            if bad is not None:
                raise GroundTruthError(
                    f"the image of query {query.name!r} cannot be used: {bad['reason']}, {bad['detail']}; "
                    "mend it and run again with --force"
                )
    duplicates, distinct = find_duplicates(folder, shards, planned.counts["queries"] > 0)
    reasons = {
        f"rejected_{reason['values']}": reason["counts"]
        for reason in rejected["reason"].value_counts().to_pylist()
    }  # fmt: skip
    counts = {
        "in": images, "out": images - len(rejected), "rejected": len(rejected), **dict(sorted(reasons.items())),
        "rows": rows, "queries": planned.counts["queries"], "duplicates": len(duplicates),
        "ignored_files": planned.counts["ignored_files"],
    }  # fmt: skip
    if distinct != counts["out"]:
        raise ArtifactError(
            f"{folder.uri}: {counts['in']} images went in, {counts['rejected']} were rejected and {distinct} came out; "
            "expected them to add up: report this, and run again with --force"
        )
    files = {LEDGER: write_table(folder, LEDGER, rejected), DUPLICATES: write_table(folder, DUPLICATES, duplicates)}
    return counts, files, {"shards": planned.info["first"] + len(planned.info["sizes"])}


def find_duplicates(folder: Folder, shards: Sequence[str], queries: bool) -> tuple[pa.Table, int]:
    """Images whose bytes an earlier one has (schema `DUPLICATE`), and how many distinct images the shards hold.

    A query's image may be a database row as well: that is one image. Held are 16 bytes an image.
    """
    repeated = _queries_in_database(folder, shards) if queries else pa.array([], pa.string())
    digests: list[npt.NDArray[np.uint64]] = []
    places: list[npt.NDArray[np.int64]] = []
    for number, shard in enumerate(shards):
        table = read_table(folder, shard, ["name", "split", "sha256"])
        again = pc.and_(pc.equal(table["split"], "query"), pc.is_in(table["name"], repeated)).to_numpy()
        rows = np.flatnonzero(~again)
        text = "".join(table["sha256"].take(pa.array(rows)).to_pylist())
        digests.append(np.frombuffer(bytes.fromhex(text), np.uint64).reshape(-1, 4)[:, :2])
        places.append(np.stack([np.full(len(rows), number), rows], axis=1))
    digest, place = np.concatenate(digests), np.concatenate(places)
    order = np.lexsort((digest[:, 1], digest[:, 0]))
    same = np.zeros(len(order), bool)
    same[1:] = (digest[order[1:]] == digest[order[:-1]]).all(axis=1)
    runs, again = np.flatnonzero(~same), np.flatnonzero(same)
    first = place[order[runs[np.searchsorted(runs, again, side="right") - 1]]]
    found = place[order[again]]
    columns = [_look_up(folder, shards, *which) for which in ((found, "name"), (first, "name"), (found, "sha256"))]
    return pa.table(columns, schema=DUPLICATE).sort_by("name"), len(order)


def _queries_in_database(folder: Folder, shards: Sequence[str]) -> pa.Array:
    """Names of the queries whose image is a database row too."""
    names: list[str] = []
    for shard in shards:
        table = read_table(folder, shard, ["name", "split"])
        names += table["name"].filter(pc.equal(table["split"], "query")).to_pylist()
    wanted, there = pa.array(names, pa.string()), set[str]()
    for shard in shards:
        table = read_table(folder, shard, ["name", "split"])
        database = table["name"].filter(pc.not_equal(table["split"], "query"))
        there.update(database.filter(pc.is_in(database, wanted)).to_pylist())
    return pa.array(sorted(there), pa.string())


def _look_up(folder: Folder, shards: Sequence[str], places: npt.NDArray[np.int64], column: str) -> pa.Array:
    """A column's values at rows given as (shard, row)."""
    order = np.argsort(places[:, 0], kind="stable")
    numbers, rows = places[order].T
    parts = [
        read_table(folder, shards[number], [column])[column].take(pa.array(rows[numbers == number])).combine_chunks()
        for number in np.unique(numbers)
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(back)) if parts else pa.array([], pa.string())
