"""The download of one file: asked for, continued, waited for, verified."""

from __future__ import annotations

import email.utils
import http.client
import logging
import os
import random
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, cast
from urllib.parse import urlsplit

from iir_dist import __version__
from iir_dist.data.downloads.target import (
    CHUNK_BYTES,
    SCHEMES,
    Target,
    hash_file,
    new_digests,
    read_json,
    write_json,
    write_record,
)
from iir_dist.data.downloads.watch import Watch
from iir_dist.errors import CorruptError, NotFoundError, StorageError, UnreachableError
from iir_dist.storage.local import sync

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""A download that has received nothing for so long, over all its attempts, is given up."""
STALL_SECONDS = 30.0
"""A connection that says nothing for so long is dropped and made again."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
"""Waits between attempts double from the first to the longest, with jitter."""
MAX_RESTARTS = 5
"""How often one call starts a file from zero again, because the server cannot continue it or it has changed."""

TRANSIENT = {408, 425, 429}
GONE = {404, 410}


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


class Download:
    """The download of one file by one process, which holds its lock.

    `offset` bytes are in the part and in the digests; `until` is where the current answer ends, and `total` the size
    of the whole file (bytes; None where the server does not say).
    """

    def __init__(self, target: Target, watch: Watch) -> None:
        self.target, self.watch, self.opener = target, watch, _opener()
        self.digests = new_digests(target)
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
        state = read_json(self.target.part)
        same = (state.get("url"), state.get("query")) == (self.target.shown, self.target.query)
        if not (same and self.target.part.is_file()):
            return
        self.etag, self.modified, self.total = state.get("etag"), state.get("last_modified"), state.get("total")
        self.digests = hash_file(self.target, self.target.part, self.watch)
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
        self.digests = new_digests(self.target)

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
        write_json(
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
        sync(target.part)
        os.replace(target.part, target.path)
        sync(target.path.parent)
        write_record(target, found, self.etag, self.modified)
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
