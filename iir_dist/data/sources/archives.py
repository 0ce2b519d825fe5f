"""Tars and zips, read without unpacking them, on local disk, in an object store or fetched by http(s).

A plain tar and a zip are read by offset, so any worker reads any member with one ranged request. A compressed tar has
no offsets; it is read as a stream, from front to back.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import struct
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from iir_dist.data.sources.member import Member, Source, is_image
from iir_dist.errors import ChangedError, ImageError, InputError, StorageError, UnreachableError
from iir_dist.storage import split_uri


def _zstd(file: Any) -> BinaryIO:
    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))


OPENERS: dict[str, Callable[[Any], Any]] = {
    ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.zst": _zstd, ".tar.bz2": bz2.open, ".tar.xz": lzma.open,
}  # fmt: skip
"""Compressed tars by their ending."""
TAR, ZIP = ".tar", ".zip"
ENDINGS = (TAR, ZIP, *OPENERS)
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowInvalid)
"""What the readers of archives raise on damaged ones; Arrow and bz2 also raise OSError."""

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""Of a zip's member: magic, version, flags, method, time, date, CRC, packed size, size, length of name and extra."""
LABEL_BYTES = 256
SKIP_BYTES = 2**20


class ArchiveSource(Source):
    """One file that holds the images.

    Args:
        path: this machine's copy of it, where its address is not read itself; `content` is the hash of that.
    """

    def __init__(self, uri: str, path: Path | None = None, content: str = "") -> None:
        super().__init__(uri)
        self.folder, self.file = split_uri(path or uri)
        self._content = content
        self._listed = ""

    def version(self) -> str:
        if not self._listed:
            self._listed = self._content or self.folder.stat(self.file).version
        return self._listed

    def _unchanged(self, version: str) -> str:
        """What the folder is to compare with what is there. Raises `ImageError` where the copy is another one."""
        if self._content and self._content != version:
            raise ImageError("changed", f"{self.uri} changed since it was listed")
        return "" if self._content else version

    def members(self) -> Iterator[Member]:
        count = 0
        try:
            with self.folder.open(self.file) as file:
                for member in self._members(file):
                    count += 1
                    yield member
        except (*BROKEN, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error) or type(error).__name__
            raise InputError(
                f"{self.uri} is damaged after {count} members ({reason}); fetch it again, or repack it"
            ) from error

    @abstractmethod
    def _members(self, file: BinaryIO) -> Iterator[Member]:
        """Every file in it."""

    def span(self, member: Member) -> int:
        """How many bytes from its offset hold the member."""
        return member.size

    def unpack(self, member: Member, data: bytes) -> bytes:
        """The member, from the bytes of its span."""
        if len(data) < member.size:
            raise ImageError("corrupt", f"the archive ends after {len(data)} of {member.size} bytes")
        return data

    def read_span(self, offset: int, length: int, version: str) -> bytes:
        """A range of the archive, of the version that was listed."""
        try:
            return self.folder.read_range(self.file, offset, length, self._unchanged(version))
        except ChangedError as error:
            raise ImageError("changed", str(error)) from None
        except UnreachableError:
            raise  # the archive was there when it was listed: it is the store that is gone
        except (StorageError, OSError) as error:
            raise ImageError("unreadable", str(error)) from None

    def read(self, member: Member) -> bytes:
        return self.unpack(member, self.read_span(member.offset, self.span(member), member.version))


class TarSource(ArchiveSource):
    """An uncompressed tar."""

    def _members(self, file: BinaryIO) -> Iterator[Member]:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from labelled(archive, self.uri, self.version())


class StreamSource(ArchiveSource):
    """A compressed tar. An offset counts in the unpacked stream; going back means to begin anew."""

    sequential = True
    _file: BinaryIO | None = None
    _stream: Any = None
    _position = 0

    def _unpacked(self, file: BinaryIO) -> Any:
        ending = next(e for e in OPENERS if self.uri.lower().partition("#")[0].endswith(e))
        return OPENERS[ending](file)

    def _members(self, file: BinaryIO) -> Iterator[Member]:
        with self._unpacked(file) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            yield from labelled(archive, self.uri, self.version())

    def close(self) -> None:
        for file in (self._stream, self._file):
            if file is not None:
                file.close()
        self._stream = self._file = None

    def read_span(self, offset: int, length: int, version: str) -> bytes:
        try:
            if self._stream is None or offset < self._position:
                self.close()
                if self._unchanged(version) not in ("", self.folder.stat(self.file).version):
                    raise ImageError("changed", f"{self.uri} changed since it was listed")
                self._file = self.folder.open(self.file)
                self._stream, self._position = self._unpacked(self._file), 0
            while self._position < offset:
                skipped = len(self._stream.read(min(SKIP_BYTES, offset - self._position)))
                if not skipped:
                    raise EOFError(f"the archive ends at {self._position}, before {offset}")
                self._position += skipped
            data: bytes = self._stream.read(length)
            self._position += len(data)
            return data
        except UnreachableError:
            self.close()
            raise
        except (*BROKEN, StorageError, OSError) as error:
            self.close()
            raise ImageError("unreadable", f"{self.uri}: {error}") from None


def labelled(archive: tarfile.TarFile, uri: str, version: str) -> Iterator[Member]:
    """The members of a tar in order. Files of one sample lie together in a WebDataset tar; its `.cls` is the label."""
    sample, label = "", None
    waiting: list[tarfile.TarInfo] = []

    def flush() -> Iterator[Member]:
        for info in waiting:
            plain = info.isreg() and not info.issparse()
            yield Member(
                uri, info.name, info.size, info.offset_data if plain else 0, version=version,
                problem="" if plain else "not_a_file", label=label,
            )  # fmt: skip
        waiting.clear()

    for info in archive:
        folder, name = posixpath.split(info.name)
        key = posixpath.join(folder, name.partition(".")[0])
        if key != sample:
            yield from flush()
            sample, label = key, None
        if info.isreg() and name.endswith(".cls") and info.size <= LABEL_BYTES:
            content = archive.extractfile(info)
            label = content.read().decode("utf-8", "replace").strip() if content is not None else None
        if not info.isdir():
            waiting.append(info)
        if not (info.isdir() or is_image(info.name) or len(waiting) < 64):
            yield from flush()  # files of one name without end are no sample
        archive.members.clear()  # type: ignore[attr-defined]  # it keeps every header; a million of them are a gigabyte
    yield from flush()


class ZipSource(ArchiveSource):
    """A zip. Its directory is parsed once, when it is listed; members are read and unpacked by offset."""

    def _members(self, file: BinaryIO) -> Iterator[Member]:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                link = (info.external_attr >> 16) & 0o170000 == 0o120000
                coding = f"{info.compress_type} {info.compress_size} {info.CRC} {info.flag_bits & 1}"
                yield Member(
                    self.uri, info.filename, info.file_size, info.header_offset, coding, self.version(),
                    "not_a_file" if link else "",
                )  # fmt: skip

    def span(self, member: Member) -> int:
        # The extra fields of the local header are not those of the directory; 512 bytes hold them as good as always.
        name = len(member.key.encode("utf-8", "surrogateescape"))
        return LOCAL_HEADER.size + name + 512 + int(member.coding.split()[1])

    def unpack(self, member: Member, data: bytes) -> bytes:
        method, packed, crc, encrypted = map(int, member.coding.split())
        if encrypted:
            raise ImageError("unreadable", "the member is encrypted; repack the archive without a password")
        if len(data) < LOCAL_HEADER.size or data[:4] != b"PK\3\4":
            raise ImageError("corrupt", f"no member begins at byte {member.offset} of the archive")
        *_, name, extra = LOCAL_HEADER.unpack(data[: LOCAL_HEADER.size])
        start = LOCAL_HEADER.size + name + extra
        if len(data) < start + packed:  # longer extra fields than allowed for, or the archive was cut
            data = self.read_span(member.offset, start + packed, member.version)
        content = self._decoded(method, data[start : start + packed], member.size)
        if len(content) != member.size or zlib.crc32(content) != crc:
            raise ImageError("corrupt", f"{len(content)} bytes with another checksum than the archive's directory says")
        return content

    def _decoded(self, method: int, data: bytes, size: int) -> bytes:
        try:
            if method == zipfile.ZIP_STORED:
                return data
            if method == zipfile.ZIP_DEFLATED:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            if method == zipfile.ZIP_BZIP2:
                return bz2.BZ2Decompressor().decompress(data, size + 1)
        except (zlib.error, OSError, EOFError) as error:
            raise ImageError("corrupt", f"the archive's member cannot be unpacked: {error}") from None
        raise ImageError(
            "unreadable", f"compression method {method} is not known here; repack the archive with deflate, or as .tar"
        )
