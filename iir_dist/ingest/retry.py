"""What a finished ingest rejected, tried again and appended."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest
from iir_dist.data.listing import Listing
from iir_dist.errors import MismatchError
from iir_dist.ingest.execute import execute, write_plan
from iir_dist.ingest.ledger import LEDGER, gather, read_table
from iir_dist.ingest.plan import IngestConfig, Plan, ledger, plan, where
from iir_dist.lock import lock

log = logging.getLogger(__name__)

TRANSIENT = ("unreadable", "changed")
"""Reasons that may be gone at the next try."""


def retry_rejected(
    out: str,
    config: IngestConfig,
    inputs: Mapping[str, InputRef],
    listing: Listing,
    labels: pa.Table | None,
    reasons: Sequence[str],
) -> Manifest:
    """Append what can be had now of the images that were rejected for one of `reasons`; ids of the others stay."""
    folder, manifest = artifact.require(out, "ingest")
    differences = artifact.differences(
        {k: v for k, v in manifest.config.items() if k in ("split", "dedupe")},
        {k: v for k, v in config.resolved().items() if k in ("split", "dedupe")},
    )
    if differences:
        raise MismatchError(f"{folder.uri} was ingested with another config: {'; '.join(differences)}")
    with lock(folder):
        work = artifact.Work(folder, "ingest", config, inputs)
        planned = work.step("plan")
        if planned is None:
            artifact.check_file(folder, LEDGER, manifest.files[LEDGER])
            todo = _again(plan(listing, config, labels=labels), read_table(folder, LEDGER), reasons, config.shard_mb)
            if not todo.shards:
                log.info(
                    "ingest: nothing to try again: no image that is still there was rejected for %s", ", ".join(reasons)
                )
                return manifest
            first, base = manifest.info["shards"], manifest.counts["rows"]
            planned = write_plan(folder, todo, manifest.counts, first, base)
        execute(folder, planned, config, work.done())
        markers = work.done()
        shards = [*manifest.shards(), *sorted(name for marker in markers.values() for name in marker.files)]
        counts, files, info = gather(folder, planned, markers, shards, None)
        return work.amend(manifest, counts, files, info)


def _again(todo: Plan, old: pa.Table, reasons: Sequence[str], shard_mb: float) -> Plan:
    """The part of a plan that an old ledger rejected for one of `reasons`, with the rest of that ledger."""
    chosen = old.filter(pc.is_in(old["reason"], pa.array(reasons)))
    likely = todo.places[
        pc.is_in(todo.listing.names.take(pa.array(todo.places)), chosen["name"]).to_numpy(zero_copy_only=False)
    ]
    wanted = set(zip(chosen["name"].to_pylist(), chosen["source"].to_pylist(), strict=True))
    table = todo.listing.take(likely)
    keys = list(zip(table["name"].to_pylist(), where(table), strict=True))
    places = likely[[key in wanted for key in keys]]
    tried = wanted & set(keys)
    rest = [
        line for line in zip(*old.to_pydict().values(), strict=True) if line[:2] not in tried or line[2] not in reasons
    ]
    return todo.only(places, ledger(rest), int(shard_mb * 2**20))
