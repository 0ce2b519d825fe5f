"""One folder interface over the local disk and S3.

Every write is atomic: a reader sees the old file, the new one, or none, never a part. Locally that is a temporary
name, fsync and rename; on S3 it is one PUT (multipart above 8 MB, which S3 publishes as a whole). `create` is the
conditional form, for the places where two writers may race.

Credentials, region, endpoint and retries come from the usual AWS variables and profile, read by boto3.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from iir_dist.errors import InputError, NotFoundError, StorageError

BLOCK_BYTES = 8 * 2**20
"""Read-ahead of a seekable S3 object, and the part size of its uploads."""


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
    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises `NotFoundError`."""

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

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the file is there."""

    def delete_all(self, prefix: str) -> None:
        """Delete every file below `prefix`."""
        for entry in list(self.list(prefix)):
            self.delete(entry.name)


def open_folder(uri: str | Path) -> Folder:
    """The folder at a path, `file://` or `s3://bucket/prefix` address."""
    text = str(uri)
    if not text:
        raise InputError("an address is empty; give a path, file:///path or s3://bucket/prefix")
    if "://" not in text:
        return LocalFolder(text)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return LocalFolder(unquote(parts.path))
    if parts.scheme == "s3":
        return S3Folder(text)
    raise InputError(f"{text!r}: scheme {parts.scheme!r} is not known; give a path, file:///path or s3://bucket/prefix")


def split_uri(uri: str | Path) -> tuple[Folder, str]:
    """The folder that holds a file, and the file's name in it."""
    parent, slash, name = str(uri).rstrip("/").rpartition("/")
    if not slash:
        return open_folder("."), name
    return open_folder(parent or "/"), name


# ------------------------------------------------------------------------------------------------ local disk


class LocalFolder(Folder):
    """A directory on the local disk (or a mount); made on first write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        super().__init__(str(self.path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.path),)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def read(self, name: str) -> bytes:
        with _local_errors(self.address(name)):
            return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with self.publish(name) as file:
            file.path.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        target = self.path / name
        with _local_errors(self.address(name)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(target)
            try:
                temporary.write_bytes(data)
                _sync(temporary)
                os.link(temporary, target)  # unlike rename, a link never replaces what is there
                _sync(target.parent)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Publication]:
        target = self.path / name
        with _local_errors(self.address(name)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(target)
            publication = Publication(temporary)
            try:
                yield publication
                publication.size, publication.sha256 = temporary.stat().st_size, sha256_of(temporary)
                _sync(temporary)
                os.replace(temporary, target)
                _sync(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        path = self.path / name
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist")
        yield path

    def open(self, name: str) -> BinaryIO:
        with _local_errors(self.address(name)):
            return open(self.path / name, "rb")

    def list(self, prefix: str = "") -> Iterator[Entry]:
        names = []
        for root, _, files in os.walk(self.path, followlinks=True):
            for file in files:
                name = os.path.relpath(os.path.join(root, file), self.path).replace(os.sep, "/")
                if name.startswith(prefix):
                    names.append(name)
        for name in sorted(names):
            with contextlib.suppress(FileNotFoundError):  # a temporary file that was renamed meanwhile
                stat = (self.path / name).stat()
                yield Entry(name, stat.st_size, str(stat.st_mtime_ns))

    def delete(self, name: str) -> None:
        with _local_errors(self.address(name)):
            (self.path / name).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        super().delete_all(prefix)
        if prefix.endswith("/"):
            shutil.rmtree(self.path / prefix, ignore_errors=True)

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()


def _temporary_beside(target: Path) -> Path:
    # The leading dot hides it from Parquet readers; the random part keeps two writers apart.
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _local_errors(address: str) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------------------ S3


class S3Folder(Folder):
    """A prefix in a bucket."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if not parts.netloc:
            raise InputError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        super().__init__(f"s3://{self.bucket}/{self.prefix}".rstrip("/"))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def child(self, name: str) -> S3Folder:
        return S3Folder(self.address(name))

    def read(self, name: str) -> bytes:
        with _s3_errors(self, name):
            body = s3_client().get_object(Bucket=self.bucket, Key=self._key(name))["Body"]
            return cast(bytes, body.read())

    def write(self, name: str, data: bytes) -> None:
        with _s3_errors(self, name):
            s3_client().put_object(Bucket=self.bucket, Key=self._key(name), Body=data)

    def create(self, name: str, data: bytes) -> bool:
        if self.put_if(name, data, IfNoneMatch="*") is not None:
            return True
        return self.read(name) == data  # ours after all: the PUT arrived, its answer did not, boto3 tried again

    def put_if(self, name: str, data: bytes, **condition: str) -> str | None:
        """PUT under `IfNoneMatch` or `IfMatch`: the new ETag, or None where the condition does not hold."""
        from botocore.exceptions import ClientError

        with _s3_errors(self, name):
            try:
                answer = s3_client().put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **condition)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in (
                    "PreconditionFailed", "ConditionalRequestConflict", "412", "409",
                ):  # fmt: skip
                    return None
                raise
            return str(answer["ETag"])

    def age(self, name: str) -> tuple[str, float]:
        """ETag of an object and the seconds since its last write, both by the server's clock. Raises `NotFoundError`."""
        from email.utils import parsedate_to_datetime

        with _s3_errors(self, name):
            answer = s3_client().head_object(Bucket=self.bucket, Key=self._key(name))
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return str(answer["ETag"]), (now - answer["LastModified"]).total_seconds()

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Publication]:
        with tempfile.TemporaryDirectory(prefix="iir-") as scratch:
            publication = Publication(Path(scratch) / Path(name).name)
            with _local_errors(scratch):
                yield publication
                publication.size = publication.path.stat().st_size
                publication.sha256 = sha256_of(publication.path)
            with _s3_errors(self, name):
                s3_client().upload_file(str(publication.path), self.bucket, self._key(name))

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="iir-") as scratch:
            path = Path(scratch) / Path(name).name
            with _local_errors(scratch), _s3_errors(self, name):
                s3_client().download_file(self.bucket, self._key(name), str(path))
            yield path

    def open(self, name: str) -> BinaryIO:
        with _s3_errors(self, name):
            size = s3_client().head_object(Bucket=self.bucket, Key=self._key(name))["ContentLength"]
        return cast(BinaryIO, io.BufferedReader(_S3Reader(self, name, size), BLOCK_BYTES))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        below = f"{self.prefix}/" if self.prefix else ""
        with _s3_errors(self, prefix):
            pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below + prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    name = item["Key"].removeprefix(below)
                    if name and not name.endswith("/"):  # "directory" placeholders
                        yield Entry(name, item["Size"], item["ETag"].strip('"'))

    def delete(self, name: str) -> None:
        with _s3_errors(self, name):
            s3_client().delete_object(Bucket=self.bucket, Key=self._key(name))

    def exists(self, name: str) -> bool:
        try:
            self.age(name)
        except NotFoundError:
            return False
        return True

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from offset `start`."""
        with _s3_errors(self, name):
            span = f"bytes={start}-{start + length - 1}"
            body = s3_client().get_object(Bucket=self.bucket, Key=self._key(name), Range=span)["Body"]
            return cast(bytes, body.read())


class _S3Reader(io.RawIOBase):
    """Ranged reads of one object; wrap it in a BufferedReader for read-ahead."""

    def __init__(self, folder: S3Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._position = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        data = self._folder.read_range(self._name, self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@functools.lru_cache(maxsize=1)
def s3_client() -> Any:
    """One client a process: making one costs 50 ms and a pool of connections.

    Ray workers and forked children start with an empty cache of their own process, so no socket is shared.
    """
    import boto3
    from botocore.config import Config as BotoConfig

    retries: dict[str, Any] = {"mode": os.environ.get("AWS_RETRY_MODE", "adaptive")}
    retries["total_max_attempts"] = int(os.environ.get("AWS_MAX_ATTEMPTS", "8"))
    # A session of its own: boto3's default one would keep the credentials that it saw first.
    return boto3.session.Session().client(
        "s3", config=BotoConfig(max_pool_connections=32, retries=retries, read_timeout=60)
    )


os.register_at_fork(after_in_child=s3_client.cache_clear)

_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; check its name, AWS_REGION and AWS_ENDPOINT_URL",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret does not fit the access key; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the session token has expired; renew AWS_SESSION_TOKEN or the profile's login",
    "AccessDenied": "access is denied; the identity of AWS_ACCESS_KEY_ID or AWS_PROFILE lacks the permission",
    "403": "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
}


@contextlib.contextmanager
def _s3_errors(folder: S3Folder, name: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    where = folder.address(name) if name else folder.uri
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in ("NoSuchKey", "404"):
            raise NotFoundError(f"{where} does not exist") from error
        # Only the code is passed on: the body of an S3 error may repeat the access key.
        remedy = _REMEDIES.get(code, f"the store answered {code or 'an error'}")
        raise StorageError(f"{where} (bucket {folder.bucket!r}): {remedy}") from error
    except NoCredentialsError as error:
        raise StorageError(
            f"{where} (bucket {folder.bucket!r}): no credentials found; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{where} (bucket {folder.bucket!r}): the store cannot be reached ({type(error).__name__}); "
            "check the network, AWS_ENDPOINT_URL and AWS_REGION"
        ) from error
