"""What keeps a request from costing more than it may: bodies, time, number, token, and headers that tell browsers to be
careful."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from iir_dist.errors import (
    ConfigError,
    CorruptError,
    IirError,
    ImageError,
    InputError,
    NotFoundError,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from iir_dist.serve.metrics import Metrics

log = logging.getLogger(__name__)
R = TypeVar("R")

COOKIE = "iir_token"
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
"""Names of this machine. Without a token no other is answered to: a page elsewhere whose name is made to point here would
otherwise read the photos."""
TOKEN_LENGTH = 16
"""Characters of a token, at least."""
OPEN = ("/healthz", "/readyz")
"""Told to everybody."""
HEADERS = (
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
     b"connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"geolocation=(), microphone=()"),
)  # fmt: skip


def check_token(token: str) -> str:
    """The token, where it can be one; raises `ConfigError`. An empty one would let everybody in."""
    if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or token != token.strip():
        raise ConfigError(
            f"a token of {len(token)} characters; expected at least {TOKEN_LENGTH}, of ASCII and no space at an end, as a "
            "header carries them"
        )
    return token


class Refusal(Exception):
    """An answer that is not 2xx: a status, a word for programs, a sentence for people."""

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refusal_of(error: Exception) -> Refusal:
    """What an error looks like from outside. What is nobody's fault but ours tells nothing of what is inside."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ImageError):
        status = 413 if error.reason == "too_large" else 422
        return Refusal(status, f"image_{error.reason}", error.detail)
    if isinstance(error, NotFoundError):
        return Refusal(404, "not_found", str(error))
    if isinstance(error, InputError | ConfigError):
        return Refusal(400, "bad_request", str(error))
    if isinstance(error, IirError):
        log.error("serve: %s", error)
        kind = "corrupt" if isinstance(error, CorruptError) else "unavailable"
        return Refusal(
            503, kind, "a file of the index or of the photos cannot be read; the log says which", retry_after="5"
        )
    log.error("serve: an error that should not be", exc_info=error)
    return Refusal(500, "internal", "something went wrong here; the log has it")


class Slots:
    """At most so many calls at a time, each in a thread; more are refused at once, never queued.

    A call that takes too long is given up by its client alone: the slot is free when the work is over, so that what is
    given up does not pile up.
    """

    def __init__(self, name: str, most: int, seconds: float) -> None:
        self.most, self.seconds, self.taken = most, seconds, 0
        self._pool = ThreadPoolExecutor(most, f"iir-{name}")

    def take(self) -> Slot:
        """A slot. Raises `Refusal` 429 where all are taken. (The event loop's thread only.)"""
        if self.taken >= self.most:
            raise Refusal(429, "busy", f"{self.most} requests are under way; try again in a moment", retry_after="1")
        self.taken += 1
        return Slot(self)

    async def run(self, function: Callable[..., R], *arguments: Any) -> R:
        """Call in a thread. Raises `Refusal` 429, or 504 after `seconds`."""
        with self.take() as slot:
            return await slot.run(function, *arguments)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()


class Slot:
    """One of `Slots`, for the length of a block; longer where a thread is still at it."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._at_work = slots, False

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._at_work:
            self._free()

    def _free(self, *_: object) -> None:
        self._slots.taken -= 1

    async def run(self, function: Callable[..., R], *arguments: Any) -> R:
        """Call in a thread, once."""
        self._at_work = True
        future = asyncio.get_running_loop().run_in_executor(self._slots._pool, function, *arguments)
        future.add_done_callback(self._free)
        future.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be left to ask
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._slots.seconds)
        except TimeoutError:
            raise Refusal(504, "timeout", f"no answer within {self._slots.seconds:g} s", retry_after="5") from None


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body, read as it comes and not beyond `most` bytes or `seconds`.

    Raises:
        Refusal: 413, 408, or 400 where the client is gone.
    """
    from starlette.requests import ClientDisconnect

    too_large = Refusal(413, "too_large", f"the body has more than {most} bytes", connection="close")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except ClientDisconnect:  # nobody is left to read it, but it is counted as what it is
        raise Refusal(400, "disconnected", "the client left before the body had come") from None
    except TimeoutError:
        raise Refusal(408, "slow", f"the body did not come within {seconds:g} s", connection="close") from None
    return bytes(body)


class Guard:
    """The outermost layer: who may ask, and what every answer carries.

    Args:
        token: that requests have to bring as `Authorization: Bearer …`, or as the cookie that `/v1/session` sets; None for
            this machine only.
        public: paths that need none: the page itself, which holds no data.
    """

    def __init__(self, app: ASGIApp, token: str | None, public: frozenset[str], metrics: Metrics) -> None:
        self._app, self._token, self._public, self._metrics = app, token, public, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, begun = time.perf_counter(), 500, False

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                there = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(h for h in HEADERS if h[0] not in there)]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            if scope["path"] not in self._public and scope["path"] not in OPEN and not self.knows(headers):
                raise Refusal(
                    401, "unauthorized", "a token is needed: Authorization: Bearer TOKEN", www_authenticate="Bearer"
                )
            await self._app(scope, receive, sending)
        except Exception as error:
            refusal = refusal_of(error)
            if begun:
                return  # the connection is cut, and the client sees an answer that is too short
            self._metrics.errors.labels(refusal.kind).inc()
            await problem(refusal)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", None) or ("page" if scope["path"] in self._public else "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request brings the token."""
        if self._token is None:
            return True
        from starlette.requests import cookie_parser

        # Not `SimpleCookie`, which gives up where another program of this host has set a cookie that is none.
        cookies = cookie_parser(headers.get(b"cookie", b"").decode("latin-1"))
        given = [
            headers.get(b"authorization", b"").decode("latin-1").removeprefix("Bearer ").strip(), cookies.get(COOKIE, "")
        ]  # fmt: skip
        return any(secrets.compare_digest(value.encode(), self._token.encode()) for value in given)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if self._token is not None:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        if name.lower() not in LOCAL:
            raise Refusal(421, "host", "only this machine is answered; start with --token for others")


def problem(refusal: Refusal) -> Response:
    """The answer of a refusal."""
    from starlette.responses import JSONResponse

    body = {"error": {"type": refusal.kind, "message": refusal.message}}
    return JSONResponse(body, refusal.status, refusal.headers)
