"""What the sources of one ingest hold, as a table on disk: a million keys take no memory to speak of.

Members are written to a scratch file as they are listed and mapped into memory; only their order, one integer each,
is held. The order is that of the keys within each SOURCE argument, whatever kind of source it is; members of
compressed tars stay as they lie, since they can be read in no other order.
"""

from __future__ import annotations

import hashlib
import mmap
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from iir_dist.data.images import MAX_FILE_BYTES
from iir_dist.data.sources import (
    ENDINGS,
    ArchiveSource,
    FolderSource,
    Member,
    Source,
    clean,
    hidden,
    is_image,
    is_unsafe,
    open_source,
)
from iir_dist.data.sources.member import shared_folder
from iir_dist.errors import InputError, NotFoundError
from iir_dist.storage import LocalFolder
from iir_dist.vectors import I64

MEMBERS = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("key", pa.binary()),  # paths are bytes; not all are text
        pa.field("size", pa.int64()),
        pa.field("offset", pa.int64()),
        pa.field("coding", pa.string()),
        pa.field("version", pa.string()),
        pa.field("problem", pa.string()),
        pa.field("name", pa.string()),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
    ]
)
SPOOL = pa.schema(
    [
        *[field for field in MEMBERS if field.name != "source"],
        pa.field("address", pa.int32()),  # number of the source
        pa.field("path", pa.string()),  # `clean(key)`; `key` is null where it is the same
        pa.field("group", pa.int32()),  # number of the SOURCE argument
        pa.field("place", pa.int64()),  # within it, where that is not the order of the keys
    ]
)
BATCH = 8192
ARCHIVES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Listing:
    """Image candidates in order, as a table of schema `MEMBERS` with every name filled in, read in pieces.

    `ignored` counts the other files; `fingerprint` changes with what the sources hold.
    """

    spool: pa.Table
    sources: pa.Array
    order: I64
    names: pa.Array
    ignored: int
    fingerprint: str
    memory: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.order)

    def take(self, places: I64) -> pa.Table:
        """Rows by place in the order."""
        table = _pick(self.spool, self.order[places])
        columns = {name: table[name] for name in MEMBERS.names if name != "source"}
        columns["key"] = pc.coalesce(table["key"], table["path"].cast(pa.binary()))
        columns["name"] = self.names.take(pa.array(places))
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)  # pages that were looked at are memory until they are given back
        return pa.table({"source": self.sources.take(table["address"]), **columns}, schema=MEMBERS)


def _pick(table: pa.Table, rows: I64) -> pa.Table:
    """Rows by number. Arrow's own `take` joins all batches of a string column first, for every call."""
    batches = table.to_batches()
    starts = np.cumsum([0, *map(len, batches)])
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    cuts = np.searchsorted(ascending, starts)
    parts = [
        batch.take(pa.array(ascending[low:high] - start))
        for batch, start, low, high in zip(batches, starts, cuts, cuts[1:], strict=False)
        if low < high
    ]
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.Table.from_batches(parts, table.schema).combine_chunks().take(pa.array(back))


def to_members(table: pa.Table) -> list[Member]:
    """Rows of schema `MEMBERS` as objects."""
    rows = table.select(MEMBERS.names).to_pylist()
    return [Member(**{**row, "key": row["key"].decode("utf-8", "surrogateescape")}) for row in rows]


def list_sources(uris: Iterable[str | Sequence[str]], scratch: Path, any_ending: bool = False) -> Listing:
    """Every image candidate of several SOURCE arguments.

    Args:
        uris: addresses; archives that belong together, so that their images are named together, as a sequence.
        any_ending: take every file for a candidate that is not hidden, whatever its name ends with.
        scratch: folder for the table; it must stay as long as the listing is used.

    Raises:
        InputError: a source does not exist, is damaged, or holds no image.
    """
    digest = hashlib.sha256()
    groups: list[_Group] = []
    addresses: dict[str, int] = {}
    path = scratch / "members.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SPOOL) as writer:
        for number, uri in enumerate(uris):
            group = _Group(number, addresses, (lambda key: not hidden(key)) if any_ending else is_image)
            for batch in _batches(uri, group, digest):
                writer.write_batch(batch)
            if not group.count:
                raise InputError(
                    f"{uri} holds no image ({group.ignored} other files); expected files that end as images do (.jpg, .png, …)"
                )
            groups.append(group)
    with open(path, "rb") as written:
        memory = mmap.mmap(written.fileno(), 0, prot=mmap.PROT_READ)
    spool = pa.ipc.open_file(pa.py_buffer(memory)).read_all()
    keys = [(name, "ascending") for name in ("group", "place", "path", "address")]
    order = pc.sort_indices(spool, sort_keys=keys).to_numpy().astype(np.int64)
    names = pa.concat_arrays(list(_names(spool, order, groups)))
    ignored = sum(group.ignored for group in groups)
    memory.madvise(mmap.MADV_DONTNEED)
    return Listing(spool, pa.array(addresses, pa.string()), order, names, ignored, digest.hexdigest(), memory)


@dataclass(slots=True)
class _Group:
    """What is known of one SOURCE argument when all of it is listed."""

    number: int
    addresses: dict[str, int]
    wanted: Callable[[str], bool]
    count: int = 0
    ignored: int = 0
    shared: str | None = None
    rows: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SPOOL.names})

    def add(self, member: Member, place: int) -> pa.RecordBatch | None:
        """Note a member; a batch when enough have come together."""
        problem, path = member.problem, clean(member.key)
        if is_unsafe(member.key) and member.offset >= 0:
            problem = "unsafe_path"
        elif not problem and member.size > MAX_FILE_BYTES:
            problem = "too_large"
        if problem != "unsafe_path":
            # A path that climbs out would take part in the shared folder and so change every other name.
            folder = posixpath.dirname(path)
            if self.shared is None:
                self.shared = folder
            elif not (folder + "/").startswith(self.shared + "/" if self.shared else ""):
                self.shared = shared_folder([self.shared, folder]).rstrip("/")
        key = None if path == member.key else member.key.encode("utf-8", "surrogateescape")
        address = self.addresses.setdefault(member.source, len(self.addresses))
        values = (
            key, member.size, member.offset, member.coding,
            member.version, problem, member.name, member.label, member.split, address, path, self.number, place,
        )  # fmt: skip
        for column, value in zip(self.rows.values(), values, strict=True):
            column.append(value)
        self.count += 1
        return self.flush() if len(self.rows["key"]) >= BATCH else None

    def flush(self) -> pa.RecordBatch:
        """What has come together so far."""
        batch = pa.record_batch(self.rows, schema=SPOOL)
        for column in self.rows.values():
            column.clear()
        return batch


def _batches(uri: str | Sequence[str], group: _Group, digest: Any) -> Iterator[pa.RecordBatch]:
    """The candidates of one SOURCE argument. A folder that holds archives stands for them and its loose images."""
    archives: list[str] = []
    if isinstance(uri, str):
        source = open_source(uri)
        _check_exists(source)
        for member in _candidates(source, group, archives, digest):
            batch = group.add(member, group.count if source.sequential else 0)
            if batch is not None:
                yield batch
    else:
        archives += uri

    def listed(address: str) -> tuple[Source, list[Member], str]:
        archive = open_source(address)
        return archive, list(archive.members()), archive.version()

    with ThreadPoolExecutor(ARCHIVES_AT_ONCE, thread_name_prefix="iir-list") as pool:
        for start in range(0, len(archives), ARCHIVES_AT_ONCE):
            for archive, members, version in pool.map(listed, archives[start : start + ARCHIVES_AT_ONCE]):
                digest.update(f"{posixpath.basename(archive.uri)}\0{version}\n".encode())
                for member in members:
                    if not group.wanted(member.key):
                        group.ignored += 1
                        continue
                    batch = group.add(member, group.count + 1 if archive.sequential else 0)
                    if batch is not None:
                        yield batch
    yield group.flush()


def _candidates(source: Source, group: _Group, archives: list[str], digest: Any) -> Iterator[Member]:
    if not isinstance(source, FolderSource):
        digest.update(f"{posixpath.basename(source.uri)}\0{source.version()}\n".encode())
    for member in source.members():
        if isinstance(source, FolderSource):
            if member.key.lower().endswith(ENDINGS) and not hidden(member.key):
                archives.append(source.folder.address(member.key))
                continue
            digest.update(f"{member.key}\0{member.size}\0{member.version}\n".encode("utf-8", "surrogateescape"))
        if isinstance(source, FolderSource | ArchiveSource) and not group.wanted(member.key):
            group.ignored += 1
            continue
        yield member


def _check_exists(source: Source) -> None:
    if isinstance(source, FolderSource):
        if isinstance(source.folder, LocalFolder) and not source.folder.path.is_dir():
            there = source.folder.path.exists()
            what = (
                f"is a file; expected a folder, a list, or one of {', '.join(ENDINGS)}" if there else "does not exist"
            )
            raise InputError(f"{source.uri} {what}")
        return
    try:
        source.version()
    except NotFoundError as error:
        raise InputError(str(error)) from None


def _names(spool: pa.Table, order: I64, groups: list[_Group]) -> Iterator[pa.Array]:
    """The name of every member, in order: as the source gives it, else its path below the shared folder."""
    cuts = np.array([len(g.shared) + 1 if g.shared else 0 for g in groups])
    for start in range(0, len(order), BATCH):
        table = _pick(spool.select(["path", "problem", "name", "group"]), order[start : start + BATCH])
        path, group = table["path"].combine_chunks(), table["group"].to_numpy()
        for number in np.unique(group):
            mask = pa.array(group == number)
            below = pc.utf8_slice_codeunits(path, int(cuts[number]))
            below = pc.replace_substring_regex(below, r"\.[^./]*$", "")
            path = pc.if_else(
                pc.and_(mask, pc.not_equal(table["problem"].combine_chunks(), "unsafe_path")), below, path
            )
        yield pc.coalesce(table["name"].combine_chunks(), path)
