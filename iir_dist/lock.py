"""One writer at a time in a folder: a kernel lock on local disk, a lease in an object store."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iir_dist.errors import BusyError, NotFoundError
from iir_dist.storage import Folder, LocalFolder, S3Folder
from iir_dist.storage.local import local_errors

LEASE = "_work/lease.json"
LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long belongs to a process that is gone."""


def lock(folder: Folder) -> contextlib.AbstractContextManager[None]:
    """Hold a folder for the length of the block. Raises `BusyError`, naming the process that holds it."""
    return _local_lock(folder) if isinstance(folder, LocalFolder) else _s3_lease(folder)  # type: ignore[arg-type]


def _owner() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _process_start(pid: int) -> str:
    """A value that tells a process from a later one with the same number; empty where it is gone or unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _busy(folder: Folder, owner: Mapping[str, Any]) -> BusyError:
    return BusyError(
        f"{folder.uri} is being written by process {owner.get('pid')} on {owner.get('host')}; "
        "wait for it, stop it, or give another --out"
    )


@contextlib.contextmanager
def _local_lock(folder: LocalFolder) -> Iterator[None]:
    """A kernel lock on `.lock`: it goes with the process, however that ends. Raises `StorageError` on a full disk."""
    import fcntl

    path = folder.path / ".lock"
    while True:
        with local_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(descriptor, 4096)
            os.close(descriptor)
            raise _busy(folder, json.loads(text or b"{}")) from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)  # its last owner removed the file between our open and our lock
    try:
        with local_errors(str(path)):
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(_owner()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def _s3_lease(folder: S3Folder) -> Iterator[None]:
    """A lease object, taken and renewed by conditional PUT and aged by the server's clock alone."""
    owner = _owner()
    body = json.dumps(owner).encode()
    etag = folder.put_if(LEASE, body, IfNoneMatch="*")
    if etag is None:
        try:
            etag_there, age = folder.age(LEASE)
            holder = json.loads(folder.read(LEASE))
        except NotFoundError:
            raise _busy(folder, {}) from None
        ours = holder.get("token") == owner["token"]  # the PUT arrived, its answer did not, boto3 tried again
        same_host = holder.get("host") == owner["host"]
        gone = ours or (same_host and _process_start(int(holder["pid"])) != holder.get("started"))
        if age < LEASE_SECONDS and not gone:
            raise _busy(folder, holder)
        etag = folder.put_if(LEASE, body, IfMatch=etag_there)
        if etag is None:
            raise _busy(folder, {})
    stop = threading.Event()

    def renew() -> None:
        current = etag
        while not stop.wait(LEASE_SECONDS / 4):
            # The token changes nothing; writing the same bytes renews LastModified. A lost lease is not
            # fought for: the manifest is created conditionally, so only one of two writers can finish.
            with contextlib.suppress(Exception):
                current = folder.put_if(LEASE, body, IfMatch=current) or current

    thread = threading.Thread(target=renew, daemon=True, name="iir-lease")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(Exception):
            folder.delete(LEASE)
