"""What a folder can do, wherever it lies."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from iir_dist.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Entry:
    """One file below a folder: its relative name, size in bytes, and a version that changes with the content."""

    name: str
    size: int
    version: str


@dataclass(slots=True)
class Publication:
    """A file being written: fill `path`, then read `size` and `sha256` once the block is left."""

    path: Path
    size: int = 0
    sha256: str = ""


def sha256_of(path: str | Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Folder(ABC):
    """A directory on local disk or a prefix in a bucket. Holds only its address, so it pickles."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def address(self, name: str) -> str:
        """The full address of a file in this folder, for messages and manifests."""
        return f"{self.uri.rstrip('/')}/{name}"

    @abstractmethod
    def child(self, name: str) -> Folder:
        """The folder `name` below this one; it need not exist."""

    @abstractmethod
    def read(self, name: str, version: str = "") -> bytes:
        """All bytes of a file, of the listed version where one is given. Raises `NotFoundError`, `ChangedError`."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int, version: str = "") -> bytes:
        """Up to `length` bytes from offset `start`; fewer where the file ends. Raises as `read` does."""

    @abstractmethod
    def stat(self, name: str) -> Entry:
        """Size and version of one file. Raises `NotFoundError`."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file atomically."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a small file only if it is not there; false if it is. Of several writers exactly one gets true."""

    @abstractmethod
    def publish(self, name: str) -> contextlib.AbstractContextManager[Publication]:
        """A local path to write a file of any size to; leaving the block without an error publishes it."""

    @abstractmethod
    def local(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to read the file from; a remote one is downloaded for the length of the block."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A seekable reader."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every file below `prefix`, recursively, sorted by name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; no error if it is gone."""

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        try:
            self.stat(name)
        except NotFoundError:
            return False
        return True

    @abstractmethod
    def reachable(self) -> bool:
        """Whether the store answers at all, asked once."""

    def delete_all(self, prefix: str) -> None:
        """Delete every file below `prefix`."""
        for entry in list(self.list(prefix)):
            self.delete(entry.name)
