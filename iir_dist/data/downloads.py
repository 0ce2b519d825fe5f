"""Files over HTTP(S) into a local folder: continued where they stopped, verified, downloaded once.

A file lies under the name that its address ends with, beside `NAME.json`, which says where it came from and what it
is. Until it is complete it is `NAME.part`, with `NAME.part.json`. A file that somebody placed there by hand is
verified as far as possible and accepted, so that a dead address never blocks a run.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import json
import logging
import os
import random
import re
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from iir_dist import __version__
from iir_dist.errors import CorruptError, InputError, NotFoundError, StorageError, UnreachableError
from iir_dist.progress import Progress
from iir_dist.storage import LocalFolder
from iir_dist.storage.local import local_errors

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**20
PATIENCE_SECONDS = 120.0
"""A download that has received nothing for so long, over all its attempts, is given up."""
STALL_SECONDS = 30.0
"""A connection that says nothing for so long is dropped and made again."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
"""Waits between attempts double from the first to the longest, with jitter."""
MAX_RESTARTS = 5
"""How often one call starts a file from zero again, because the server cannot continue it or it has changed."""
POLL_SECONDS = 0.2
"""How often a process that waits for another one's download looks again."""

SCHEMES = ("http", "https")
ALGORITHMS = {"sha256": 64, "md5": 32}
TRANSIENT = {408, 425, 429}
GONE = {404, 410}
MB = 10**6


@dataclass(frozen=True, slots=True)
class Item:
    """One file to fetch: address, `sha256:HEX` or `md5:HEX` where known, size in bytes where known (for progress)."""

    url: str
    checksum: str | None = None
    size: int | None = None


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
    targets = [_target(item, folder) for item in items]
    _refuse_shared_names(targets)
    with local_errors(str(folder)):
        missing = [target for target in targets if not _recorded(target)]
    if missing:
        _obtain_all(missing, parallel)
    return [target.path for target in targets]


def content_of(path: Path) -> str:
    """SHA-256 (hex) of a file that `fetch` gave, as recorded beside it."""
    return str(_read_json(path).get("sha256", ""))


def file_name(url: str) -> str:
    """The local name of the file at an address: the end of its path, without anything that could leave the folder.

    >>> file_name("https://host/data/set%201.tar.gz?x=1"), file_name("https://host/a/..%2F..%2Fetc%2Fpasswd")
    ('set_1.tar.gz', '_.._etc_passwd')
    """
    end = unquote(urlsplit(url).path.rpartition("/")[2])
    name = re.sub(r"[^\w.+-]+", "_", end)
    # Room for `.part.json` and temporary names below the 255 bytes that file systems allow; the ending matters most.
    name = name.encode()[-200:].decode(errors="ignore").lstrip(".-")
    if not name:
        raise InputError(f"{_redacted(url)} names no file; expected the address of one file, like https://host/set.tar")
    return name


# ------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True, slots=True)
class _Target:
    """A file to obtain. `url` is what is requested, `shown` what messages and records say: it holds no secret.

    `query` is the SHA-256 of the address's query (empty without one): it tells addresses apart, and a query may hold
    a signature that must not be stored.
    """

    url: str
    shown: str
    query: str
    authorization: str = field(repr=False)
    path: Path
    algorithm: str
    expected: str
    size: int | None

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def forget_part(self) -> None:
        """Delete what is there of an unfinished download."""
        self.part.unlink(missing_ok=True)
        self.part.with_name(self.part.name + ".json").unlink(missing_ok=True)

    @property
    def by_hand(self) -> str:
        return f"get the file elsewhere and place it at {self.path}, then run the same command again"


def _target(item: Item, folder: Path) -> _Target:
    scheme = item.url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise InputError(f"{_redacted(item.url)!r} cannot be downloaded; expected http:// or https://")
    try:
        parts = urlsplit(item.url)
        host = parts.netloc.rpartition("@")[2].encode("idna").decode()
        port = parts.port  # raises where it is no number
    except ValueError:
        raise InputError(f"{_redacted(item.url)!r} is not an address; expected http(s)://host/path/file") from None
    if not parts.hostname or port == 0:
        raise InputError(f"{_redacted(item.url)!r} names no host; expected http(s)://host/path/file")
    safe = "/%:@!$&'()*+,;=~"
    path, query = quote(parts.path, safe), quote(parts.query, safe + "?")
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    algorithm, expected = _checksum(item.checksum)
    return _Target(
        url=urlunsplit((scheme, host, path, query, "")),
        shown=urlunsplit((scheme, host, path, "", "")),
        query=hashlib.sha256(query.encode()).hexdigest() if query else "",
        authorization=authorization,
        path=folder.expanduser().absolute() / file_name(item.url),
        algorithm=algorithm,
        expected=expected,
        size=item.size,
    )


def _redacted(url: str) -> str:
    """An address that could not be read, for a message: nothing before an @, no query."""
    start, slashes, rest = url.partition("//")
    rest = re.split(r"[?#]", rest.rpartition("@")[2])[0]
    return start.rpartition("@")[2] + slashes + rest


def _checksum(text: str | None) -> tuple[str, str]:
    if text is None:
        return "", ""
    algorithm, _, expected = text.lower().partition(":")
    if not re.fullmatch(r"[0-9a-f]+", expected) or ALGORITHMS.get(algorithm) != len(expected):
        raise InputError(f"checksum {text!r} is not one; expected sha256: with 64, or md5: with 32, hexadecimal digits")
    return algorithm, expected


def _refuse_shared_names(targets: Iterable[_Target]) -> None:
    taken: dict[str, _Target] = {}
    for target in targets:
        other = taken.setdefault(target.path.name, target)
        if (other.url, other.expected) != (target.url, target.expected):
            raise InputError(
                f"{other.shown} and {target.shown} have the same file name {target.path.name!r}; "
                "fetch them into different folders"
            )
    for name in taken:
        for ending in (".json", ".part", ".part.json"):
            if name + ending in taken:
                raise InputError(
                    f"{name + ending!r} is where the state of {name!r} is kept; fetch them into different folders"
                )


# ------------------------------------------------------------------------------------------------ what is there


def _recorded(target: _Target) -> bool:
    """Whether the file lies there as its record says; nothing is read."""
    record = _read_json(target.path)
    try:
        stat = target.path.stat()
    except FileNotFoundError:
        return False
    if (record.get("size"), record.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
        return False
    if target.algorithm:
        return record.get(target.algorithm) == target.expected
    return (record.get("url"), record.get("query")) == (target.shown, target.query)


def _present(target: _Target, watch: _Watch) -> bool:
    """Whether the file is there; one that has no matching record is read, verified and recorded."""
    if _recorded(target):
        return True
    if not target.path.exists():
        return False
    record = _read_json(target.path)
    found = {name: value.hexdigest() for name, value in _hash_file(target, target.path, watch).items()}
    kind = target.algorithm or "sha256"
    expected = target.expected or record.get(kind, found[kind])
    if found[kind] != expected:
        otherwise = (
            "replace it with the right file"
            if target.algorithm
            else f"delete {target.path.name}.json beside it to take it as it lies there"
        )
        raise CorruptError(
            f"{target.path} is not {target.shown}: {kind} {found[kind]}, expected {expected}; delete it and run the "
            f"same command again, or {otherwise}"
        )
    if not target.algorithm and record and (record.get("url"), record.get("query")) != (target.shown, target.query):
        raise InputError(
            f"{target.path} was downloaded from {record.get('url')}, and {target.shown} ends with the same name; "
            "move it away, or fetch into another folder"
        )
    if not target.path.stat().st_size:
        raise InputError(f"{target.path} is empty; replace it with the file of {target.shown}, or delete it")
    if not record:
        log.info("%s is taken as it lies there%s", target.path, "" if target.algorithm else "; no checksum is known")
    _write_record(target, found, record.get("etag"), record.get("last_modified"))
    target.forget_part()  # of a download that somebody was tired of
    return True


def _write_record(target: _Target, digests: dict[str, str], etag: str | None, modified: str | None) -> None:
    stat = target.path.stat()
    _write_json(
        target.path,
        {
            "url": target.shown, "query": target.query, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            **digests, "etag": etag, "last_modified": modified,
        },
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    """The record beside a file; empty where there is none that can be read."""
    try:
        value = json.loads(path.with_name(path.name + ".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    LocalFolder(path.parent).write(path.name + ".json", json.dumps(value, indent=1).encode())


def _hash_file(target: _Target, path: Path, watch: _Watch) -> dict[str, Any]:
    """Digests of a file on disk: SHA-256, and MD5 where that is the checksum."""
    digests = _digests(target)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            watch.check()
            for digest in digests.values():
                digest.update(chunk)
    return digests


def _digests(target: _Target) -> dict[str, Any]:
    names = {"sha256", target.algorithm or "sha256"}
    return {name: hashlib.new(name, usedforsecurity=False) for name in sorted(names)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ several at once


class _Stopped(Exception):
    """Another download has failed; this one lets go, its part stays."""


class _Watch:
    """What the downloads of one call share: whether to stop, and the progress."""

    def __init__(self, progress: Progress) -> None:
        self.stop = threading.Event()
        self._progress, self._lock, self._bytes = progress, threading.Lock(), 0

    def check(self) -> None:
        if self.stop.is_set():
            raise _Stopped

    def sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _Stopped

    def received(self, count: int) -> None:
        with self._lock:
            whole, self._bytes = divmod(self._bytes + count, MB)
            if whole:
                self._progress.advance(whole)


def _obtain_all(targets: Sequence[_Target], parallel: int) -> None:
    sizes = [target.size for target in targets]
    total = None if None in sizes else sum(cast(list[int], sizes)) // MB
    done = sum(target.part.stat().st_size for target in targets if target.part.is_file()) // MB
    with Progress("fetch", total, "MB", done) as progress, ThreadPoolExecutor(parallel, "iir-fetch") as pool:
        watch = _Watch(progress)
        futures = [pool.submit(_obtain, target, watch) for target in targets]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            # The pool waits for its threads, so nothing writes any more when the caller sees the error.
            watch.stop.set()
            raise


def _obtain(target: _Target, watch: _Watch) -> None:
    with local_errors(str(target.path)):
        target.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, watch):
            if not _present(target, watch):
                _Download(target, watch).run()


@contextlib.contextmanager
def _lock(target: _Target, watch: _Watch) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------------------ one download


class _AgainError(Exception):
    """This attempt failed and another may not; `after` are the seconds that the server asks for, None for no wait."""

    def __init__(self, reason: str, after: float | None = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https and nothing else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        if urlsplit(newurl).scheme.lower() not in SCHEMES:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Knows http, https and the usual proxy variables; unlike `urlopen`, no file:, data: or ftp:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(), urllib.request.HTTPDefaultErrorHandler(), _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


class _Download:
    """The download of one file by one process, which holds its lock.

    `offset` bytes are in the part and in the digests; `until` is where the current answer ends, and `total` the size
    of the whole file (bytes; None where the server does not say).
    """

    def __init__(self, target: _Target, watch: _Watch) -> None:
        self.target, self.watch, self.opener = target, watch, _opener()
        self.digests = _digests(target)
        self.offset = 0
        self.until: int | None = None
        self.total: int | None = None
        self.etag: str | None = None
        self.modified: str | None = None
        self.ended = False
        self.failures = self.restarts = 0
        self.last_progress = 0.0

    def run(self) -> None:
        """Download until the file is complete, verify it and give it its name."""
        self._resume()
        self.last_progress = time.monotonic()
        while not self.ended:
            try:
                with self._open() as response:
                    self._begin(response)
                    self._receive(response)
            except _AgainError as error:
                self._wait(error)
        self._finish()

    def _resume(self) -> None:
        """Take over what an earlier run left, if it came from the same address."""
        state = _read_json(self.target.part)
        same = (state.get("url"), state.get("query")) == (self.target.shown, self.target.query)
        if not (same and self.target.part.is_file()):
            return
        self.etag, self.modified, self.total = state.get("etag"), state.get("last_modified"), state.get("total")
        self.digests = _hash_file(self.target, self.target.part, self.watch)
        self.offset = self.target.part.stat().st_size
        self.ended = self.offset == self.total
        if self.offset:
            log.info("%s goes on at %d bytes", self.target.shown, self.offset)

    def _restart(self, why: str) -> None:
        """Forget what was received; the next answer begins the part anew."""
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise StorageError(
                f"{self.target.shown} had to be started from zero {self.restarts} times (the last time its download "
                f"{why}); {self.target.by_hand}"
            )
        self.offset, self.total, self.etag, self.modified = 0, None, None, None
        self.digests = _digests(self.target)

    # -- asking

    def _open(self) -> http.client.HTTPResponse:
        headers = {"User-Agent": f"iir_dist/{__version__}", "Accept-Encoding": "identity", **self._range()}
        request = urllib.request.Request(self.target.url, headers=headers)
        if self.target.authorization:
            request.add_unredirected_header("Authorization", self.target.authorization)  # for this host alone
        try:
            return cast(http.client.HTTPResponse, self.opener.open(request, timeout=STALL_SECONDS))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error.code, error.headers) from error
        except http.client.InvalidURL as error:
            raise StorageError(f"{self.target.shown} redirects to no address; {self.target.by_hand}") from error
        except (OSError, http.client.HTTPException) as error:
            inner = error.reason if isinstance(error, urllib.error.URLError) else error
            raise self._unreachable(inner) from error

    def _range(self) -> dict[str, str]:
        """Headers that ask for the rest, under the condition that it is the rest of the same file."""
        if not self.offset:
            return {}
        strong = self.etag if self.etag and not self.etag.startswith("W/") else None
        condition = strong or self.modified
        if not condition and not self.target.algorithm:
            self._restart("could not be continued, because the server names no version and no checksum is known")
            return {}
        return {"Range": f"bytes={self.offset}-"} | ({"If-Range": condition} if condition else {})

    def _refusal(self, code: int, headers: Message) -> Exception:
        """The error that an HTTP status means."""
        target, phrase = self.target, f"{code} {http.client.responses.get(code, '')}".strip()
        if code in GONE:
            return NotFoundError(f"{target.shown} is gone ({phrase}); {target.by_hand}")
        if code == 416 and self.offset:
            self._restart("could not be continued (416 Range Not Satisfiable)")
            return _AgainError(phrase, after=None)
        if code in TRANSIENT or code >= 500:
            return _AgainError(phrase, after=_retry_after(headers.get("Retry-After")))
        if 300 <= code < 400:
            return StorageError(f"{target.shown} redirects to what is not http(s), or in a circle; {target.by_hand}")
        return StorageError(f"{target.shown} is refused ({phrase}); {target.by_hand}")

    def _unreachable(self, error: object) -> Exception:
        """The error that a connection which was not made means."""
        target = self.target
        if isinstance(error, socket.gaierror) and not (self.offset and error.errno == socket.EAI_AGAIN):
            return StorageError(
                f"the host of {target.shown} is not found ({error.strerror}); check the network, or {target.by_hand}"
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            return StorageError(
                f"{target.shown} has no valid certificate ({error.verify_message}); check this machine's clock and "
                f"certificates, or {target.by_hand}"
            )
        return _AgainError(_words(error))

    # -- receiving

    def _begin(self, response: http.client.HTTPResponse) -> None:
        """Decide from status and headers where the body belongs, and remember what it is a version of."""
        headers = response.headers
        if response.status == 206:
            if not self._continues(headers):
                self._restart("was continued with something else")
                raise _AgainError("another version", after=None)
            return
        if response.status != 200:
            raise StorageError(f"{self.target.shown} answers {response.status}, expected 200; {self.target.by_hand}")
        page = headers.get_content_type() == "text/html" and "Content-Type" in headers
        if page and not self.target.path.name.lower().endswith((".html", ".htm")):
            raise StorageError(f"{self.target.shown} answers with a web page, not the file; {self.target.by_hand}")
        if self.offset:
            self._restart("could not be continued, because the server sent the file from its beginning")
        self.total = self.until = response.length
        self.etag, self.modified = headers.get("ETag"), headers.get("Last-Modified")
        self._check_space()
        with open(self.target.part, "wb"):
            pass  # emptied before its state says what it is a part of
        _write_json(
            self.target.part,
            {
                "url": self.target.shown, "query": self.target.query, "total": self.total, "etag": self.etag,
                "last_modified": self.modified,
            },
        )  # fmt: skip

    def _continues(self, headers: Message) -> bool:
        """Whether a partial answer begins where the part ends and is of the same version."""
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
        if match is None or int(match[1]) != self.offset:
            return False
        total, until = (self.total if match[3] == "*" else int(match[3])), int(match[2]) + 1
        versions = ((self.etag, headers.get("ETag")), (self.modified, headers.get("Last-Modified")))
        if self.total not in (None, total) or any(a and b and a != b for a, b in versions):
            return False
        self.total, self.until = total, until
        return self.offset < until and (total is None or until <= total)

    def _check_space(self) -> None:
        part = self.target.part
        free = shutil.disk_usage(part.parent).free + (part.stat().st_size if part.is_file() else 0)
        if self.total is not None and self.total > free:
            raise StorageError(
                f"{self.target.shown} has {self.total} bytes and the disk that holds {part.parent} has room for {free}; "
                "free some, or take a larger disk (IIR_CACHE), and run the same command again"
            )

    def _receive(self, response: http.client.HTTPResponse) -> None:
        with open(self.target.part, "ab" if self.offset else "wb") as file:
            while self.until is None or self.offset < self.until:
                self.watch.check()
                wanted = CHUNK_BYTES if self.until is None else min(CHUNK_BYTES, self.until - self.offset)
                try:
                    chunk = response.read1(wanted)
                except (OSError, http.client.HTTPException) as error:
                    raise _AgainError(_words(error)) from error
                if not chunk:
                    break
                file.write(chunk)
                self._count(chunk)
        if self.until is None:
            self.total = self.until = self.offset  # the end of the connection is the end of the file
        if self.offset < self.until:
            raise _AgainError(f"the connection ended after {self.offset} of {self.total or 'unknown'} bytes")
        self.ended = self.total in (None, self.offset)

    def _count(self, chunk: bytes) -> None:
        for digest in self.digests.values():
            digest.update(chunk)
        self.offset += len(chunk)
        self.watch.received(len(chunk))
        self.last_progress, self.failures = time.monotonic(), 0

    def _wait(self, error: _AgainError) -> None:
        """Sleep until the next attempt, or give up where patience would end before it."""
        if error.after is None:
            return
        longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**self.failures)
        wait = max(error.after, longest * random.uniform(0.5, 1.0))
        self.failures += 1
        silent = time.monotonic() - self.last_progress
        if silent + wait > PATIENCE_SECONDS:
            asks = f", and the server asks to come back in {error.after:.0f} s" if error.after else ""
            raise UnreachableError(
                f"{self.target.shown} has sent nothing for {silent:.0f} s ({error}{asks}); run the same command again "
                f"later, it goes on at {self.offset} bytes, or {self.target.by_hand}"
            ) from error
        log.warning("%s: %s; trying again in %.1f s", self.target.shown, error, wait)
        self.watch.sleep(wait)

    # -- finishing

    def _finish(self) -> None:
        target = self.target
        found = {name: digest.hexdigest() for name, digest in self.digests.items()}
        if target.algorithm and found[target.algorithm] != target.expected:
            target.forget_part()
            raise CorruptError(
                f"{target.shown} has {target.algorithm} {found[target.algorithm]}, expected {target.expected}; what "
                f"was downloaded is deleted: run the same command again, or {target.by_hand}"
            )
        _sync(target.part)
        os.replace(target.part, target.path)
        _sync(target.path.parent)
        _write_record(target, found, self.etag, self.modified)
        target.forget_part()


def _words(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer for {STALL_SECONDS:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date.

    >>> _retry_after("7"), _retry_after(None), _retry_after("soon")
    (7.0, 0.0, 0.0)
    """
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
