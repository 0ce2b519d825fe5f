"""A folder in an object store that speaks S3."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from iir_dist.errors import InputError, NotFoundError, StorageError
from iir_dist.storage.folder import Entry, Folder, Publication, sha256_of
from iir_dist.storage.local import local_errors

BLOCK_BYTES = 8 * 2**20
"""Read-ahead of a seekable object, and the part size of uploads."""


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
            with local_errors(scratch):
                yield publication
                publication.size = publication.path.stat().st_size
                publication.sha256 = sha256_of(publication.path)
            with _s3_errors(self, name):
                s3_client().upload_file(str(publication.path), self.bucket, self._key(name))

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="iir-") as scratch:
            path = Path(scratch) / Path(name).name
            with local_errors(scratch), _s3_errors(self, name):
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
