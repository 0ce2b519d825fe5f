"""One process on one machine: the app under uvicorn, no Ray."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from iir_dist.errors import InputError

CONNECTIONS = 1000
"""That are open at a time; more are closed at once."""
BACKLOG = 512
KEEP_ALIVE_SEC = 30
LAST_SEC = 20
"""That answers under way are given when the server is to end."""


def patient(seconds: float) -> type[HttpToolsProtocol]:
    """A protocol that gives a client so long for the head of a request; uvicorn itself waits forever."""

    class Patient(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > CONNECTIONS:
                transport.abort()
            self._expect()

        def on_message_begin(self) -> None:
            self._expect()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._relax()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._relax()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._relax()
            self._deadline = self.loop.call_later(seconds, self.transport.abort)

        def _relax(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Patient


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `InputError` where the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)  # who comes before it serves waits
    except (OSError, UnicodeError) as error:  # the latter of a host that can be no name
        sock.close()
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be listened on ({why}); give another --port") from error
    return sock


def server(app: FastAPI, seconds: float) -> uvicorn.Server:
    """A server of the app that is not started: `run(sockets=[…])` serves until it is told to end.

    Args:
        seconds: that a client has for the head of a request.
    """
    config = uvicorn.Config(
        app, http=patient(seconds), ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SEC, timeout_graceful_shutdown=LAST_SEC, backlog=BACKLOG,
    )  # fmt: skip
    return uvicorn.Server(config)
