"""An HTTP proxy that breaks a tenth of all answers, or is gone for a while; it stands between us and an S3 store."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

KINDS = ("drop", "error", "slow_down", "truncate", "stall")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


class FaultyProxy:
    """Serves on loopback and forwards to `target` (http://host:port). Use as a context manager.

    Of the requests that it gets, number n is broken if n % every == every - 1, in turn by each of `KINDS`.
    """

    def __init__(self, target: str, every: int = 10) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname, parts.port)
        self.every = every
        self.gone_until = 0.0
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self) -> str:
        """What to do to the next request; empty for nothing."""
        with self._lock:
            number = self.seen.total()
            kind = ""
            if time.monotonic() < self.gone_until:
                kind = "drop"
            elif self.every and number % self.every == self.every - 1:
                kind = KINDS[number // self.every % len(KINDS)]
            self.seen[kind] += 1
            return kind


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away; nothing to say."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.proxy.fault()
        if kind == "drop":
            self._cut()
            return
        if kind in ("error", "slow_down"):
            content = SLOW_DOWN if kind == "slow_down" else b""
            self._answer(503 if content else 500, [("Content-Type", "application/xml")], content, len(content))
            return
        upstream = http.client.HTTPConnection(*self.proxy.target, timeout=60)
        # The signature covers the host that the client asked for.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        length = int(answer.headers.get("Content-Length") or len(content))
        headers = [
            (n, v)
            for n, v in answer.headers.items()
            if n.lower() not in ("content-length", "connection", "transfer-encoding")
        ]
        if kind == "stall":
            time.sleep(0.5)
        if kind == "truncate" and len(content) > 1:
            self._answer(answer.status, headers, content[: len(content) // 2], length)
            self._cut()
            return
        self._answer(answer.status, headers, content, length)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
