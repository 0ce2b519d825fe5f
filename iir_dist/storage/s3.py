"""A folder in an object store that speaks S3.

Passing trouble (no connection, 5xx, a throttled or cut answer) is waited out, every request again as a whole, until
`IIR_STORAGE_PATIENCE_SEC` have gone by without an answer. What will not pass (wrong key, no bucket) is said at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import tenacity

from iir_dist.errors import ChangedError, InputError, NotFoundError, StorageError, UnreachableError
from iir_dist.storage.folder import Entry, Folder, Publication, sha256_of
from iir_dist.storage.local import local_errors
from iir_dist.storage.settings import StorageConfig

BLOCK_BYTES = 8 * 2**20
"""Read-ahead of a seekable object."""
READ_TIMEOUT_SEC = 30.0
"""A connection that says nothing for so long is dropped, and the request is made again."""
T = TypeVar("T")


class S3Folder(Folder):
    """A prefix in a bucket."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if not parts.netloc:
            raise InputError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
        # Not parts.path: a key may hold `?` and `#`.
        self.bucket, self.prefix = parts.netloc, uri.partition("://")[2].partition("/")[2].strip("/")
        super().__init__(f"s3://{self.bucket}/{self.prefix}".rstrip("/"))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _get(self, name: str, version: str, **arguments: str) -> bytes:
        condition = {"IfMatch": f'"{version}"'} if version else {}
        try:
            # The body is read inside: a cut answer is asked for again.
            return self._call(
                name, lambda s3, at: cast(bytes, s3.get_object(**at, **condition, **arguments)["Body"].read())
            )
        except _ConditionError:
            raise ChangedError(f"{self.address(name)} changed since it was listed") from None

    def child(self, name: str) -> S3Folder:
        return S3Folder(self.address(name))

    def read(self, name: str, version: str = "") -> bytes:
        return self._get(name, version)

    def read_range(self, name: str, start: int, length: int, version: str = "") -> bytes:
        try:
            return self._get(name, version, Range=f"bytes={start}-{start + length - 1}") if length else b""
        except _RangeError:
            return b""

    def stat(self, name: str) -> Entry:
        answer = self._call(name, lambda s3, at: s3.head_object(**at))
        return Entry(name, answer["ContentLength"], answer["ETag"].strip('"'))

    def write(self, name: str, data: bytes) -> None:
        self._call(name, lambda s3, at: s3.put_object(Body=data, **at))

    def create(self, name: str, data: bytes) -> bool:
        if self.put_if(name, data, IfNoneMatch="*") is not None:
            return True
        return self.read(name) == data  # ours after all: the PUT arrived, its answer did not, it was sent again

    def put_if(self, name: str, data: bytes, **condition: str) -> str | None:
        """PUT under `IfNoneMatch` or `IfMatch`: the new ETag, or None where the condition does not hold."""
        try:
            return str(self._call(name, lambda s3, at: s3.put_object(Body=data, **at, **condition))["ETag"])
        except _ConditionError:
            return None

    def age(self, name: str) -> tuple[str, float]:
        """ETag of an object and the seconds since its last write, both by the server's clock. Raises `NotFoundError`."""
        from email.utils import parsedate_to_datetime

        answer = self._call(name, lambda s3, at: s3.head_object(**at))
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
            # Multipart above 8 MB; the store shows the object when all of it is there.
            self._call(name, lambda s3, at: s3.upload_file(str(publication.path), *at.values()))

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="iir-") as scratch:
            path = Path(scratch) / Path(name).name
            with local_errors(scratch):
                self._call(name, lambda s3, at: s3.download_file(*at.values(), str(path)))
            yield path

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_S3Reader(self, self.stat(name)), BLOCK_BYTES))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        below = f"{self.prefix}/" if self.prefix else ""
        arguments = {"Bucket": self.bucket, "Prefix": below + prefix}
        while True:
            page = self._call(prefix, lambda s3, _: s3.list_objects_v2(**arguments))
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(below)
                if name and not name.endswith("/"):  # "directory" placeholders
                    yield Entry(name, item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, name: str) -> None:
        self._call(name, lambda s3, at: s3.delete_object(**at))

    def reachable(self) -> bool:
        try:
            with _explained(self, ""):
                s3_client().head_bucket(Bucket=self.bucket)
        except StorageError:
            return False
        return True

    def _call(self, name: str, request: Callable[[Any, dict[str, str]], T]) -> T:
        """One request (client, bucket and key -> answer), again for as long as there is only passing trouble."""
        where = {"Bucket": self.bucket, "Key": self._key(name)}

        def once() -> T:
            with _explained(self, name):
                return request(s3_client(), where)

        with contextlib.suppress(UnreachableError):
            return once()
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnreachableError),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            stop=tenacity.stop_after_delay(StorageConfig.from_environment().patience_sec),
            reraise=True,
        )(once)


class _S3Reader(io.RawIOBase):
    """Ranged reads of one version of an object; wrap it in a BufferedReader for read-ahead."""

    def __init__(self, folder: S3Folder, entry: Entry) -> None:
        self._folder, self._entry, self._position = folder, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._entry.size - self._position)
        if length <= 0:
            return 0
        data = self._folder.read_range(self._entry.name, self._position, length, self._entry.version)
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

    config = StorageConfig.from_environment()
    retries: dict[str, Any] = {"mode": os.environ.get("AWS_RETRY_MODE", "adaptive"), "total_max_attempts": 3}
    if config.attempts is not None:
        retries["total_max_attempts"] = config.attempts
    # A session of its own: boto3's default one would keep the credentials that it saw first.
    return boto3.session.Session().client(
        "s3",
        config=BotoConfig(
            max_pool_connections=64, retries=retries, connect_timeout=10, read_timeout=READ_TIMEOUT_SEC,
            s3={"addressing_style": "path"} if config.path_style else None,
        ),
    )  # fmt: skip


os.register_at_fork(after_in_child=s3_client.cache_clear)


class _ConditionError(StorageError):
    """The condition of a request does not hold."""


class _RangeError(StorageError):
    """A range that starts behind the end."""


_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; check its name, AWS_REGION and AWS_ENDPOINT_URL",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret does not fit the access key; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the session token has expired; renew AWS_SESSION_TOKEN or the profile's login",
    "AccessDenied": "access is denied; the identity of AWS_ACCESS_KEY_ID or AWS_PROFILE lacks the permission",
    "403": "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the store's; set it (NTP)",
}
_PASSING = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BadDigest"}


@contextlib.contextmanager
def _explained(folder: S3Folder, name: str) -> Iterator[None]:
    """Errors of boto3 as ours: what is passing as `UnreachableError`, the others with a remedy."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    where = f"{folder.address(name) if name else folder.uri} (bucket {folder.bucket!r})"
    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError) as error:
        # The transfer manager wraps the answer of the store in an error of its own.
        inner = error if isinstance(error, ClientError) else error.__context__
        if isinstance(inner, ClientError):
            raise _answered(inner, where) from error
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            raise StorageError(
                f"{where}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        raise UnreachableError(
            f"{where}: the store cannot be reached ({type(error).__name__}); "
            "check the network, AWS_ENDPOINT_URL and AWS_REGION, then run the same command again"
        ) from error


def _answered(error: Any, where: str) -> StorageError:
    """Our error for an answer of the store. Only its code is passed on: the body may repeat the access key."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
        return _ConditionError(f"{where}: a condition does not hold")
    if code in ("InvalidRange", "416"):
        return _RangeError(f"{where}: the object is shorter than the range")
    if code in ("NoSuchKey", "404"):
        return NotFoundError(f"{where} does not exist")
    if code in _PASSING or status >= 500:
        return UnreachableError(
            f"{where}: the store is overloaded or broken (it answered {code or status}); run the same command again later"
        )
    return StorageError(f"{where}: {_REMEDIES.get(code, f'the store answered {code or status}')}")
