"""A job server that runs nothing: Ray's REST interface as far as `iir submit` uses it, with answers that a test chooses."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JobServer:
    """Serves on loopback. Use as a context manager.

    Args:
        token: that requests must bring; None for a server without authentication.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.refused = False
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"server_of_jobs": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> JobServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def end(self, name: str, status: str, code: int | None) -> None:
        """A job has ended."""
        self.jobs[name] |= {"status": status, "driver_exit_code": code, "end_time": 2000}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_jobs: JobServer

    def do_GET(self) -> None:
        server, path = self.server_of_jobs, self.path
        if self._refused():
            return
        if path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        elif path.startswith("/api/packages/"):
            known = path.rpartition("/")[2] in server.packages
            self._answer(200 if known else 404, {})
        elif path == "/api/jobs/":
            self._answer(200, list(server.jobs.values()))
        elif path.endswith("/logs"):
            self._answer(200, {"logs": f"log of {path.split('/')[3]}\n"})
        else:
            self._answer(404, {})

    def do_PUT(self) -> None:
        body = self._body()
        if not self._refused():
            self.server_of_jobs.packages[self.path.rpartition("/")[2]] = body
            self._answer(200, {})

    def do_POST(self) -> None:
        server, body = self.server_of_jobs, self._body()
        if self._refused():
            return
        if self.path == "/api/jobs/":
            asked = json.loads(body)
            name = asked["submission_id"]
            if name in server.jobs:
                self._answer(
                    500, f"Job with submission_id {name} already exists. Please use a different submission_id."
                )
                return
            server.jobs[name] = {
                "type": "SUBMISSION", "status": "RUNNING", "submission_id": name, "entrypoint": asked["entrypoint"],
                "runtime_env": asked["runtime_env"], "start_time": 1000 + len(server.jobs),
            }  # fmt: skip
            self._answer(200, {"job_id": name, "submission_id": name})
        else:
            name = self.path.split("/")[3]
            running = server.jobs[name]["status"] == "RUNNING"
            server.end(name, "STOPPED", None)
            self._answer(200, {"stopped": running})

    def log_message(self, *_: object) -> None:
        """Nothing to say."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _refused(self) -> bool:
        """As Ray answers a request without the right token."""
        server = self.server_of_jobs
        sent = self.headers.get("Authorization") or ""
        server.requests.append(f"{self.command} {self.path}")
        if server.token is None or sent == f"Bearer {server.token}":
            return False
        if sent:
            self._answer(403, "Forbidden: Invalid authentication token")
        else:
            self._answer(401, "Unauthorized: Missing authentication token")
        return True

    def _answer(self, status: int, content: Any) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)
