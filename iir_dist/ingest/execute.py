"""The plan on file, and the loop that has its shards checked and written on Ray.

Ids are dense over the accepted images, so shard k is written once the number accepted before it is known; until then
its checked rows wait in the object store, not in a worker's heap.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from iir_dist import artifact, session
from iir_dist.artifact import Marker, shard_name
from iir_dist.ingest.check import Checked, check, write
from iir_dist.ingest.ledger import LEDGER, PLAN, read_table, write_table
from iir_dist.ingest.plan import IngestConfig, Plan
from iir_dist.progress import Progress
from iir_dist.storage import Folder


def write_plan(folder: Folder, todo: Plan, totals: Mapping[str, int], first: int, base: int) -> Marker:
    """Put the plan on file, a shard each, so that workers read their part and a later run goes on with this plan."""
    for number in range(len(todo.shards)):
        with folder.publish(f"{PLAN}{shard_name(first + number)}") as file:
            pq.write_table(todo.rows(number), file.path, compression="zstd")
    write_table(folder, f"{PLAN}{LEDGER}", todo.rejected)
    sizes = [stop - start for start, stop in todo.shards]
    marker = Marker(
        shard="plan", files={}, counts={key: totals[key] for key in ("in", "ignored_files", "queries")},
        info={"sizes": sizes, "first": first, "base": base},
    )  # fmt: skip
    artifact.commit(folder, "plan", {}, marker.counts, marker.info)
    return marker


class _Seen:
    """The first name of every digest, for --dedupe; half of a SHA-256 tells a billion images apart."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def note(self, digest: bytes, name: str) -> str | None:
        """The name that has these bytes already, None where this is the first."""
        first = self._names.setdefault(digest[:16], name)
        return None if first is name else first


def execute(folder: Folder, planned: Marker, config: IngestConfig, done: Mapping[int, Marker]) -> None:
    """Check and write what is planned and not done."""
    sizes: list[int] = planned.info["sizes"]
    first, base = planned.info["first"], planned.info["base"]
    numbers = range(first, first + len(sizes))
    pending = [n for n in numbers if n not in done]
    if not pending:
        return
    seen = _Seen() if config.dedupe else None
    counts = {number: done[number].counts["rows"] for number in numbers if number in done}
    ray = session.connect()
    check_task = ray.remote(num_returns=2)(check)
    write_task = ray.remote(write)
    tables: dict[int, object] = {}
    checked: dict[int, Checked] = {}
    checking: dict[object, int] = {}
    writing: dict[object, int] = {}
    window = session.cluster_cpus() + 1
    next_write, queue = first, list(reversed(pending))
    finished = sum(sizes[n - first] for n in counts)
    with Progress("ingest", sum(sizes), "images", finished) as progress:
        while queue or checking or writing:
            # Not further ahead than `window` of the first shard that is not counted: checked tables wait in memory.
            while queue and queue[-1] < next_write + window and len(checking) + len(writing) < window:
                number = queue.pop()
                tables[number], result = check_task.remote(folder, number, config.max_megapixels, config.dedupe)
                checking[result] = number
            for ref in ray.wait([*checking, *writing], num_returns=1)[0] if checking or writing else []:
                result = session.result_of(ref)
                if ref in writing:
                    progress.advance(sizes[writing.pop(ref) - first])
                else:
                    checked[checking.pop(ref)] = result
            progress.in_flight(len(checking) + len(writing))
            while next_write in counts or next_write in checked:
                if next_write in checked:
                    one = checked.pop(next_write)
                    keep = _keep(one, seen)
                    counts[next_write] = int(keep.sum())
                    ref = write_task.remote(
                        folder, next_write, base, tables.pop(next_write), one.rejected, None if keep.all() else keep
                    )
                    writing[ref] = next_write
                elif seen is not None:
                    _recall(folder, done[next_write], seen)
                base += counts[next_write]
                next_write += 1


def _keep(one: Checked, seen: _Seen | None) -> npt.NDArray[np.bool_]:
    """Which rows of a shard stay; the others are added to its rejected ones."""
    keep = np.ones(one.good, bool)
    if seen is not None:
        for i, (name, place, digest) in enumerate(one.rows):
            first = seen.note(digest, name)
            if first is not None:
                keep[i] = False
                one.rejected.append((name, place, "duplicate", f"the same bytes as {first}"))
    return keep


def _recall(folder: Folder, marker: Marker, seen: _Seen) -> None:
    """Note what an earlier run wrote."""
    for name in marker.files:
        table = read_table(folder, name, ["name", "sha256"])
        for image, digest in zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True):
            seen.note(bytes.fromhex(digest), image)
