"""Images that lie as files of their own: below a folder or prefix, or named by a list."""

from __future__ import annotations

import csv
import http.client
import io
import posixpath
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tenacity

from iir_dist.data.images import MAX_FILE_BYTES
from iir_dist.data.sources.member import Member, Source
from iir_dist.errors import ChangedError, ImageError, InputError, NotFoundError, StorageError, UnreachableError
from iir_dist.storage import Folder, StorageConfig, open_folder, split_uri

LISTS = (".csv", ".parquet")
COLUMNS = ("uri", "name", "label", "split", "size")
SPLITS = ("db", "query", "train", "distractor")
WEB = ("http://", "https://")


def read_file(folder: Folder, name: str, version: str) -> bytes:
    """A whole file, for the ledger where it is the file that cannot be read, and an error where it is the store."""
    try:
        return folder.read(name, version)
    except ChangedError as error:
        raise ImageError("changed", str(error)) from None
    except UnreachableError as error:
        if not folder.reachable():
            raise
        raise ImageError("unreadable", str(error)) from None
    except (StorageError, OSError) as error:
        raise ImageError("unreadable", str(error)) from None


class FolderSource(Source):
    """All files below a folder or prefix."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.folder = open_folder(uri)

    def members(self) -> Iterator[Member]:
        for entry in self.folder.list():
            yield Member(self.uri, entry.name, entry.size, version=entry.version)

    def version(self) -> str:
        return ""

    def read(self, member: Member) -> bytes:
        return read_file(self.folder, member.key, member.version)


class ListSource(Source):
    """A CSV or Parquet file with a column `uri`, and `name`, `label`, `split`, `size` where they are known.

    An address without a scheme is relative to the list. Images may lie anywhere: disk, S3, http(s).
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.folder, self.file = split_uri(uri)

    def members(self) -> Iterator[Member]:
        for number, row in enumerate(self._rows()):
            uri, split = row.get("uri"), row.get("split") or None
            if not uri:
                raise InputError(f"{self.uri}: row {number} has no uri; expected a path or address in every row")
            if split is not None and split not in SPLITS:
                raise InputError(f"{self.uri}: row {number} has split {split!r}; expected one of {', '.join(SPLITS)}")
            size = int(row["size"]) if str(row.get("size") or "").isdigit() else -1
            yield Member(self.uri, uri, size, name=row.get("name") or None, label=row.get("label") or None, split=split)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.uri.lower().endswith(".csv"):
            with self.folder.open(self.file) as file:
                reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
                self._check(reader.fieldnames or [])
                try:
                    yield from reader
                except (csv.Error, UnicodeDecodeError) as error:
                    raise InputError(f"{self.uri}: line {reader.line_num} is not CSV in UTF-8: {error}") from error
        else:
            with self.folder.open(self.file) as file:
                try:
                    parquet = pq.ParquetFile(file)
                except (pa.ArrowInvalid, OSError) as error:
                    raise InputError(f"{self.uri} is not a Parquet file: {error}") from error
                self._check(parquet.schema_arrow.names)
                columns = [c for c in COLUMNS if c in parquet.schema_arrow.names]
                for batch in parquet.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        yield {k: None if v is None else str(v) for k, v in row.items()}

    def _check(self, names: Any) -> None:
        if "uri" not in names:
            raise InputError(
                f"{self.uri} has the columns {', '.join(names) or '(none)'}; expected uri, and if known "
                f"{', '.join(COLUMNS[1:])}"
            )

    def version(self) -> str:
        return self.folder.stat(self.file).version

    def read(self, member: Member) -> bytes:
        if member.key.startswith(WEB):
            return download(member.key)
        relative = "://" not in member.key and not posixpath.isabs(member.key)
        folder, name = (self.folder, member.key) if relative else split_uri(member.key)
        return read_file(folder, name, member.version)


def download(url: str) -> bytes:
    """One image by http(s); what passes (no connection, 429, 5xx) is tried again."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnreachableError),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        stop=tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(StorageConfig.from_environment().patience_sec),
        reraise=True,
    )
    try:
        return retry(_get, url)
    except StorageError as error:
        raise ImageError("unreadable", str(error)) from None


def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "iir_dist"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            data: bytes = answer.read(MAX_FILE_BYTES + 1)
            expected = answer.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        kind = UnreachableError if error.code == 429 or error.code >= 500 else NotFoundError
        raise kind(f"{url}: the server answered {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreachableError(f"{url}: {getattr(error, 'reason', error)}") from None
    if expected is not None and expected.isdigit() and len(data) < int(expected):
        raise UnreachableError(f"{url}: the answer ended after {len(data)} of {expected} bytes")
    return data
