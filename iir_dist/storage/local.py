"""A folder on the local disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from iir_dist.errors import ChangedError, NotFoundError, StorageError
from iir_dist.storage.folder import Entry, Folder, Publication, sha256_of


class LocalFolder(Folder):
    """A directory on the local disk (or a mount); made on first write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        super().__init__(str(self.path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.path),)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def read(self, name: str, version: str = "") -> bytes:
        return self.read_range(name, 0, -1, version)

    def read_range(self, name: str, start: int, length: int, version: str = "") -> bytes:
        with local_errors(self.address(name)), open(self.path / name, "rb") as file:
            if version and version != _version(os.fstat(file.fileno())):
                raise ChangedError(f"{self.address(name)} changed since it was listed")
            file.seek(start)
            return file.read(length)

    def stat(self, name: str) -> Entry:
        with local_errors(self.address(name)):
            found = (self.path / name).stat()
        if not stat.S_ISREG(found.st_mode):
            raise NotFoundError(f"{self.address(name)} is not a file")
        return Entry(name, found.st_size, _version(found))

    def write(self, name: str, data: bytes) -> None:
        with self.publish(name) as file:
            file.path.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        target = self.path / name
        with local_errors(self.address(name)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(target)
            try:
                temporary.write_bytes(data)
                sync(temporary)
                os.link(temporary, target)  # unlike rename, a link never replaces what is there
                sync(target.parent)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Publication]:
        target = self.path / name
        with local_errors(self.address(name)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(target)
            publication = Publication(temporary)
            try:
                yield publication
                publication.size, publication.sha256 = temporary.stat().st_size, sha256_of(temporary)
                sync(temporary)
                os.replace(temporary, target)
                sync(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        path = self.path / name
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist")
        yield path

    def open(self, name: str) -> BinaryIO:
        with local_errors(self.address(name)):
            return open(self.path / name, "rb")

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with local_errors(self.uri):
            yield from self._walk("", prefix, frozenset())

    def _walk(self, below: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
        """Files in order of their whole names, a directory at a time; `above` are the directories we are inside of."""
        with contextlib.suppress(FileNotFoundError):
            found = (self.path / below).stat()
            identity = (found.st_dev, found.st_ino)
            if identity in above:  # a link to a directory that it lies in
                return
            with os.scandir(self.path / below) as entries:
                # "a/" sorts as its files do: after "a-b", before "a0".
                names = sorted(e.name + "/" if e.is_dir() else e.name for e in entries)
            for name in names:
                whole = below + name
                if whole.endswith("/"):
                    if whole.startswith(prefix) or prefix.startswith(whole):
                        yield from self._walk(whole, prefix, above | {identity})
                elif whole.startswith(prefix):
                    with contextlib.suppress(NotFoundError):  # renamed meanwhile, or a pipe or dead link
                        yield self.stat(whole)

    def delete(self, name: str) -> None:
        with local_errors(self.address(name)):
            (self.path / name).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        super().delete_all(prefix)
        if prefix.endswith("/"):
            shutil.rmtree(self.path / prefix, ignore_errors=True)

    def reachable(self) -> bool:
        return self.path.exists()


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}-{found.st_size}"


def _temporary_beside(target: Path) -> Path:
    # The leading dot hides it from Parquet readers; the random part keeps two writers apart.
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"


def sync(path: Path) -> None:
    """Have what was written to a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def local_errors(address: str) -> Iterator[None]:
    """Turn what the system says of a local path into errors that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename or address} does not exist") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left on the disk that holds {address}; free some and run the same command again, "
                "what is finished is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise StorageError(f"cannot use {error.filename or address}: {error.strerror}") from error
        raise
