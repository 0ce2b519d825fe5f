"""Files over HTTP(S) into a local folder: continued where they stopped, verified, downloaded once.

A file lies under the name that its address ends with, beside `NAME.json`, which says where it came from and what it
is. Until it is complete it is `NAME.part`, with `NAME.part.json`. A file that somebody placed there by hand is
verified as far as possible and accepted, so that a dead address never blocks a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import cast

from iir_dist.data.downloads.target import (
    Item,
    Target,
    file_name,
    present,
    read_json,
    recorded,
    refuse_shared_names,
    target_of,
)
from iir_dist.data.downloads.transfer import Download
from iir_dist.data.downloads.watch import MB, Watch
from iir_dist.progress import Progress
from iir_dist.storage.local import local_errors

__all__ = ["Item", "content_of", "downloads_folder", "fetch", "fetch_all", "file_name"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""How often a process that waits for another one's download looks again."""


def downloads_folder() -> Path:
    """Where downloads go by default: `downloads` below the cache folder (`IIR_CACHE`)."""
    from iir_dist.data.cache import cache_folder  # it brings Arrow, which only some callers need

    return cache_folder() / "downloads"


def fetch(url: str, folder: Path, checksum: str | None = None) -> Path:
    """The local path of the file at an address, downloaded if it is not there; see `fetch_all`."""
    return fetch_all([Item(url, checksum)], folder, parallel=1)[0]


def fetch_all(items: Sequence[Item], folder: Path, parallel: int = 4) -> list[Path]:
    """Fetch several files into one folder, at most `parallel` at a time; their paths, in the order of `items`.

    After the first failure the other downloads stop where they are, and the next call continues them.

    Raises:
        InputError: an address that is not http(s), names no file, or whose name another address has taken.
        NotFoundError: the server no longer has the file; says where to place it by hand.
        CorruptError: a file is not what its checksum, or the record beside it, says.
        UnreachableError: nothing was received for `PATIENCE_SECONDS`; the same call later continues.
        StorageError: the server or the disk refuses.
    """
    targets = [target_of(item, folder) for item in items]
    refuse_shared_names(targets)
    with local_errors(str(folder)):
        missing = [target for target in targets if not recorded(target)]
    if missing:
        _obtain_all(missing, parallel)
    return [target.path for target in targets]


def content_of(path: Path) -> str:
    """SHA-256 (hex) of a file that `fetch` gave, as recorded beside it."""
    return str(read_json(path).get("sha256", ""))


def _obtain_all(targets: Sequence[Target], parallel: int) -> None:
    sizes = [target.size for target in targets]
    total = None if None in sizes else sum(cast(list[int], sizes)) // MB
    done = sum(target.part.stat().st_size for target in targets if target.part.is_file()) // MB
    with Progress("fetch", total, "MB", done) as progress, ThreadPoolExecutor(parallel, "iir-fetch") as pool:
        watch = Watch(progress)
        futures = [pool.submit(_obtain, target, watch) for target in targets]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            # The pool waits for its threads, so nothing writes any more when the caller sees the error.
            watch.stop.set()
            raise


def _obtain(target: Target, watch: Watch) -> None:
    with local_errors(str(target.path)):
        target.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, watch):
            if not present(target, watch):
                Download(target, watch).run()


@contextlib.contextmanager
def _lock(target: Target, watch: Watch) -> Iterator[None]:
    """Hold a file's name among all processes; a kernel lock, so it goes with the process, however that ends."""
    import fcntl

    path = target.path.with_name(f".{target.path.name}.lock")
    waiting = False
    while True:
        watch.check()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if not waiting:
                log.info("waiting for another process, which is downloading %s", target.path)
            waiting = True
            watch.sleep(POLL_SECONDS)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)  # its last owner removed the file between our open and our lock
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
