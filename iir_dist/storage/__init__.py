"""One folder interface over the local disk and S3.

Every write is atomic: a reader sees the old file, the new one, or none, never a part. Locally that is a temporary
name, fsync and rename; on S3 it is one PUT (multipart above 8 MB, which S3 publishes as a whole). `create` is the
conditional form, for the places where two writers may race.

Credentials, region, endpoint and retries come from the usual AWS variables and profile, read by boto3.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from iir_dist.errors import InputError
from iir_dist.storage.folder import Entry, Folder, Publication, sha256_of
from iir_dist.storage.local import LocalFolder
from iir_dist.storage.s3 import S3Folder, s3_client
from iir_dist.storage.settings import StorageConfig

__all__ = [
    "Entry",
    "Folder",
    "LocalFolder",
    "Publication",
    "S3Folder",
    "StorageConfig",
    "open_folder",
    "s3_client",
    "sha256_of",
    "split_uri",
]


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
