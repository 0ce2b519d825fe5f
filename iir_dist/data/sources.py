"""Where raw images come from: folders, tar and zip archives, on local disk or S3, read without unpacking.

A source lists its members (key, size, where the bytes lie) and reads one member at a time, so that any worker can
read any member. Listing is deterministic: members are sorted by key.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from iir_dist.config import fingerprint
from iir_dist.data.images import EXTENSIONS, MAX_FILE_BYTES
from iir_dist.errors import ImageError, InputError, NotFoundError, StorageError
from iir_dist.storage import LocalFolder, S3Folder, open_folder, split_uri

TAR, ZIP = ".tar", ".zip"
UNSUPPORTED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class Member:
    """One candidate image: address of its source, key in it, size in bytes, and offset where it lies plain (else -1).

    `problem` is a reason for the ledger where the listing already shows that it cannot be used.
    """

    source: str
    key: str
    size: int
    offset: int = -1
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """What the sources of one call hold: image candidates, how many other files there are, a fingerprint."""

    members: tuple[Member, ...]
    names: tuple[str, ...]
    ignored: int
    fingerprint: str


class Source(ABC):
    """A folder or an archive at one address."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """Every file, in any order."""

    @abstractmethod
    def version(self) -> object:
        """A JSON value that changes with the content, without reading it all."""

    @abstractmethod
    def read(self, member: Member) -> bytes:
        """The bytes of a member. Raises `ImageError` with reason `unreadable` or `corrupt`."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Let go of open files."""


class FolderSource(Source):
    """Loose files below a folder or prefix."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.folder = open_folder(uri)

    def members(self) -> Iterator[Member]:
        for entry in self.folder.list():
            yield Member(self.uri, entry.name, entry.size)

    def version(self) -> object:
        return [[e.name, e.size, e.version] for e in self.folder.list()]

    def read(self, member: Member) -> bytes:
        try:
            return self.folder.read(member.key)
        except (StorageError, OSError) as error:
            raise ImageError("unreadable", str(error)) from None


class _ArchiveSource(Source):
    """One file on local disk or S3 that holds the images."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.folder, self.name = split_uri(uri)

    def version(self) -> object:
        for entry in self.folder.list(self.name):
            if entry.name == self.name:
                return [entry.name, entry.size, entry.version]
        raise NotFoundError(f"{self.uri} does not exist")

    def open(self) -> BinaryIO:
        return self.folder.open(self.name)

    def damaged(self, error: Exception, count: int) -> InputError:
        return InputError(
            f"{self.uri} is damaged after {count} members ({error or type(error).__name__}); fetch it again, or repack it"
        )


class TarSource(_ArchiveSource):
    """An uncompressed tar: members lie plain in the file and are read by offset."""

    def members(self) -> Iterator[Member]:
        count = 0
        try:
            with self.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    count += 1
                    if info.isdir():
                        continue
                    plain = info.isreg() and not info.issparse()
                    offset = info.offset_data if plain else -1
                    yield Member(self.uri, info.name, info.size, offset, "" if plain else "not_a_file")
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header; a million of them are a gigabyte
        except (tarfile.TarError, EOFError) as error:
            raise self.damaged(error, count) from error

    def read(self, member: Member) -> bytes:
        try:
            if isinstance(self.folder, S3Folder):
                data = self.folder.read_range(self.name, member.offset, member.size) if member.size else b""
            else:
                with self.open() as file:
                    file.seek(member.offset)
                    data = file.read(member.size)
        except (StorageError, OSError) as error:
            raise ImageError("unreadable", str(error)) from None
        if len(data) != member.size:
            raise ImageError("corrupt", f"the archive ends after {len(data)} of {member.size} bytes")
        return data


class ZipSource(_ArchiveSource):
    """A zip: members may be compressed and are read through its directory, which is parsed once."""

    _archive: zipfile.ZipFile | None = None
    _file: BinaryIO | None = None

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        if self._file is not None:
            self._file.close()
        self._archive = self._file = None

    def members(self) -> Iterator[Member]:
        try:
            with self.open() as file, zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        link = (info.external_attr >> 16) & 0o170000 == 0o120000
                        yield Member(self.uri, info.filename, info.file_size, -1, "not_a_file" if link else "")
        except zipfile.BadZipFile as error:
            raise self.damaged(error, 0) from error

    def read(self, member: Member) -> bytes:
        try:
            if self._archive is None:
                self._file = self.open()
                self._archive = zipfile.ZipFile(self._file)
            return self._archive.read(member.key)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ImageError("corrupt", str(error)) from None
        except (StorageError, OSError, RuntimeError, NotImplementedError, KeyError) as error:
            raise ImageError("unreadable", f"{type(error).__name__}: {error}") from None  # encrypted, unknown method
        except Exception as error:  # zlib and lzma raise types of their own on broken streams
            raise ImageError("corrupt", f"{type(error).__name__}: {error}") from None


class Reader:
    """Reads members of any source; archives stay open for the length of the `with` block."""

    def __init__(self) -> None:
        self._sources: dict[str, Source] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._sources.values():
            source.close()

    def read(self, member: Member) -> bytes:
        """The bytes of a member. Raises `ImageError` with reason `unreadable` or `corrupt`."""
        if member.source not in self._sources:
            self._sources[member.source] = open_source(member.source)
        return self._sources[member.source].read(member)


def open_source(uri: str) -> Source:
    """The source at an address: an archive by its ending, else a folder."""
    lower = uri.lower()
    if lower.endswith(UNSUPPORTED):
        raise InputError(f"{uri}: this kind of archive cannot be read without unpacking; repack it as .tar or .zip")
    if lower.endswith(TAR):
        return TarSource(uri)
    if lower.endswith(ZIP):
        return ZipSource(uri)
    return FolderSource(uri)


def expand(uri: str) -> list[str]:
    """A folder that holds archives stands for these archives and, where it has any, its loose images."""
    source = open_source(uri)
    if not isinstance(source, FolderSource):
        folder, name = split_uri(uri)
        if not folder.exists(name):
            raise InputError(f"{uri} does not exist")
        return [uri]
    if isinstance(source.folder, LocalFolder) and not source.folder.path.is_dir():
        what = "is a file; expected a folder, .tar or .zip" if source.folder.path.exists() else "does not exist"
        raise InputError(f"{uri} {what}")
    names = [entry.name for entry in source.folder.list()]
    archives = [source.folder.address(n) for n in names if n.lower().endswith((TAR, ZIP)) and not hidden(n)]
    loose = any(is_image(n) for n in names)
    return archives + ([uri] if loose or not archives else [])


def list_sources(uris: Iterable[str]) -> Listing:
    """Every image candidate of several SOURCE arguments, sorted within each, with its name.

    Raises:
        InputError: one does not exist, is damaged, or holds no image.
    """
    members: list[Member] = []
    names: list[str] = []
    versions: list[object] = []
    ignored = 0
    for uri in uris:
        found: list[Member] = []
        for part in expand(uri):
            source = open_source(part)
            versions.append(source.version())
            for member in source.members():
                if is_image(member.key):
                    found.append(_checked(member))
                else:
                    ignored += 1
        if not found:
            raise InputError(
                f"{uri} holds no image ({ignored} other files); expected files ending in {' '.join(sorted(EXTENSIONS))}"
            )
        found.sort(key=lambda m: (m.key, m.source))
        members += found
        # A path that climbs out would take part in the shared folder and so change every other name.
        safe = iter(image_names([m.key for m in found if m.problem != "unsafe_path"]))
        names += [m.key if m.problem == "unsafe_path" else next(safe) for m in found]
    return Listing(tuple(members), tuple(names), ignored, fingerprint(versions))


def _checked(member: Member) -> Member:
    problem = member.problem
    if is_unsafe(member.key):
        problem = "unsafe_path"
    elif not problem and member.size > MAX_FILE_BYTES:
        problem = "too_large"
    return Member(member.source, member.key, member.size, member.offset, problem)


def is_unsafe(key: str) -> bool:
    """Whether a path inside an archive would climb out of the folder that it is unpacked to.

    >>> is_unsafe("a/../../etc/x.jpg"), is_unsafe("/x.jpg"), is_unsafe("a/b..c.jpg")
    (True, True, False)
    """
    parts = key.replace("\\", "/").split("/")
    return key.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":") or "\0" in key


def hidden(key: str) -> bool:
    """Files that systems leave about: dot files, resource forks of macOS archives."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in key.split("/"))


def is_image(key: str) -> bool:
    """Whether a file counts as an image of the source (by its ending; decoding shows whether it is one)."""
    return posixpath.splitext(key)[1].lower() in EXTENSIONS and not hidden(key)


def image_names(keys: list[str]) -> list[str]:
    """Path below the deepest folder that all keys share, without extension.

    >>> image_names(["jpg/taj_mahal_000060.jpg", "jpg/taj_mahal_000061.jpg"]), image_names(["pisa/1.jpg", "rome/1.jpg"])
    (['taj_mahal_000060', 'taj_mahal_000061'], ['pisa/1', 'rome/1'])
    """
    clean = [posixpath.normpath(key).lstrip("/") for key in keys]
    folders = [posixpath.dirname(key) for key in clean]
    shared = os.path.commonpath(folders) if all(folders) else ""
    cut = len(shared) + 1 if shared else 0
    return [posixpath.splitext(key[cut:])[0] for key in clean]


def label_of(name: str) -> str | None:
    """The folder that a name lies in, which is its class in `class/file` layouts.

    >>> label_of("pisa/0001"), label_of("taj_mahal_000060")
    ('pisa', None)
    """
    return posixpath.dirname(name) or None
