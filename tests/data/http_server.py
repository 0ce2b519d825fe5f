"""A real HTTP server on loopback that misbehaves on request: each fault is used for one request, in order."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECE = 16 * 1024


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    `status` answers with that status and `headers` (once `gate` is set, if there is one). Else the body is sent up to
    `after` bytes and then the connection is closed (`close`), reset (`reset`), left silent until the server stops
    (`stall`), or silent until `gate` is set, and then goes on (`gate`). `then` runs when the fault is over, for what
    changes between two requests.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    how: str = "close"
    gate: threading.Event | None = None
    then: Callable[[], object] | None = None


@dataclass
class Resource:
    """What lies at one path. `pace` seconds pass between two pieces of the body."""

    data: bytes = b""
    etag: str | None = '"v1"'
    modified: str | None = None
    kind: str = "application/octet-stream"
    ranges: bool = True
    conditions: bool = True
    """Whether If-Range is honoured."""
    content_range: str | None = None
    """In place of the right one."""
    most: int | None = None
    """How many bytes a partial answer has at most."""
    length: bool = True
    """Whether Content-Length is sent; the end of the connection is the end of the body otherwise."""
    redirect: str | None = None
    pace: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    every: Fault | None = None
    """The fault of every request that has none of its own."""


@dataclass(frozen=True)
class Seen:
    """One request, as the server saw it, and the status that it answered."""

    path: str
    headers: dict[str, str]
    status: int


class Server:
    """Resources by path, and every request that was made."""

    def __init__(self) -> None:
        self.resources: dict[str, Resource] = {}
        self.requests: list[Seen] = []
        self.most_at_once = 0
        self.stopping = threading.Event()
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()
        self.active = 0
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1", login: str = "") -> str:
        """The address of a path on this server."""
        return f"http://{login}{host}:{self.port}{path}"

    def put(self, path: str, data: bytes = b"", **settings: Any) -> str:
        """Lay a resource at a path; its address."""
        self.resources[path] = Resource(data, **settings)
        return self.url(path)

    def of(self, path: str) -> list[Seen]:
        """The requests for one path."""
        return [seen for seen in self.requests if seen.path == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Threads

    def log_message(self, *_: object) -> None:
        """Tests read `Server.requests`."""

    def do_GET(self) -> None:
        """Answer as the resource and its next fault say."""
        state = self.server.state
        with state.lock:
            state.active += 1
            state.most_at_once = max(state.most_at_once, state.active)
        try:
            self._answer(state)
        finally:
            with state.lock:
                state.active -= 1

    def _answer(self, state: Server) -> None:
        resource = state.resources.get(self.path)
        if resource is None:
            self._say(state, 404, {}, b"")
            return
        with state.lock:
            fault = resource.faults.pop(0) if resource.faults else resource.every
        if fault is not None and fault.status:
            if fault.gate is not None:
                fault.gate.wait(30)
            self._say(state, fault.status, fault.headers, b"busy")
        elif resource.redirect is not None:
            self._say(state, 302, {"Location": resource.redirect}, b"")
        else:
            self._send(state, resource, fault)
        if fault is not None and fault.then is not None:
            fault.then()

    def _send(self, state: Server, resource: Resource, fault: Fault | None) -> None:
        data, versions = resource.data, {}
        if resource.etag:
            versions["ETag"] = resource.etag
        if resource.modified:
            versions["Last-Modified"] = resource.modified
        start = self._start(resource)
        if start >= len(data) and start:
            self._say(state, 416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        status, headers, stop = 200, {"Content-Type": resource.kind, **versions}, len(data)
        if start:
            status, stop = 206, min(len(data), start + (resource.most or len(data)))
            headers["Content-Range"] = resource.content_range or f"bytes {start}-{stop - 1}/{len(data)}"
        if resource.length:
            headers["Content-Length"] = str(stop - start)
        self._head(state, status, headers)
        self._body(state, data[start:stop], resource.pace, fault)

    def _start(self, resource: Resource) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if match is None or not resource.ranges:
            return 0
        if condition and resource.conditions and condition not in (resource.etag, resource.modified):
            return 0
        return int(match[1])

    def _body(self, state: Server, data: bytes, pace: float, fault: Fault | None) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            if fault is not None and start <= fault.after < start + len(piece):
                self.wfile.write(piece[: fault.after - start])
                piece = piece[fault.after - start :]
                if not self._break(state, fault):
                    return
            self.wfile.write(piece)
            if pace and state.stopping.wait(pace):
                return

    def _break(self, state: Server, fault: Fault) -> bool:
        """Whether the body goes on after the fault."""
        if fault.how == "stall":
            state.stopping.wait()
        elif fault.how == "gate":
            assert fault.gate is not None
            return fault.gate.wait(30)
        elif fault.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _say(self, state: Server, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(state, status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def _head(self, state: Server, status: int, headers: dict[str, str]) -> None:
        state.requests.append(Seen(self.path, dict(self.headers.items()), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True


class _Threads(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    state: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # a client that hung up is part of the tests
            self.state.errors.append(error)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server for the length of the block; what goes wrong in it fails the test."""
    state = Server()
    with _Threads(("127.0.0.1", 0), _Handler) as server:
        server.state, state.port = state, server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="test-http")
        thread.start()
        try:
            yield state
        finally:
            state.stopping.set()
            server.shutdown()
            thread.join()
    assert not state.errors, state.errors
