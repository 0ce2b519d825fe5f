"""A client of `iir serve`, in nothing but the standard library.

from iir_dist.client import Client

client = Client("http://127.0.0.1:8000")
for hit in client.search("photo.jpg", k=10, rerank="superglobal"):
    print(f"{hit['score']:.3f}  {hit['name']}")
    client.save(hit["id"], f"match-{hit['rank']}.jpg")
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iir_dist.errors import BusyError, IirError, InputError, NotFoundError, UnreachableError

KINDS: Mapping[int, type[IirError]] = {404: NotFoundError, 429: BusyError, 503: UnreachableError, 504: UnreachableError}
"""Errors by status; the others of 4xx are `InputError`."""


class Client:
    """A server of `iir serve`.

    Args:
        url: its address, as it prints it.
        token: where it needs one.
        timeout: seconds without a byte, after which it counts as gone.

    Raises:
        InputError: the address is not one of HTTP.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 60) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"{url!r} is not the address of a server; expected such as http://127.0.0.1:8000")
        if parts.fragment.startswith("token="):
            token = token or urllib.parse.unquote(parts.fragment.removeprefix("token="))
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.timeout = timeout

    def search(self, query: str | Path | bytes | int | Sequence[float], **settings: Any) -> list[dict[str, Any]]:
        """The hits of `answer`: rank, id, name, split, score (larger is better), width and height in px."""
        hits: list[dict[str, Any]] = self.answer(query, **settings)["hits"]
        return hits

    def answer(self, query: str | Path | bytes | int | Sequence[float], **settings: Any) -> dict[str, Any]:
        """Search.

        Args:
            query: a photo as path or bytes, the id of a stored one, or a vector.
            settings: k, box (x1, y1, x2, y2 in px), recall, nprobe, refine, exact, rerank, depth, splits, prefix.

        Raises:
            InputError: the server does not take the photo or the settings; its message says why.
            BusyError: it has too much to do; try again.
            UnreachableError: it does not answer.
        """
        if isinstance(query, str | Path | bytes):
            data = query if isinstance(query, bytes) else _read(query)
            if settings.get("box") is not None:
                settings["box"] = ",".join(map(str, settings["box"]))
            given = {name: value for name, value in settings.items() if value is not None}
            text = {name: str(v).lower() if isinstance(v, bool) else v for name, v in given.items()}
            path = "/v1/search?" + urllib.parse.urlencode(text, doseq=True)
            return self._json(path, data, "application/octet-stream")
        body = {"id": query} if isinstance(query, int) else {"vector": [float(v) for v in query]}
        return self._json("/v1/search", json.dumps(body | settings).encode(), "application/json")

    def index(self) -> dict[str, Any]:
        """What is searched: rows, splits, operating points, limits."""
        return self._json("/v1/index")

    def image(self, image: int) -> bytes:
        """The stored file of an id. Raises `NotFoundError`."""
        return self._ask(f"/v1/images/{image}")

    def save(self, image: int, path: str | Path) -> None:
        """Write the stored file of an id."""
        Path(path).write_bytes(self.image(image))

    def _json(self, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Any]:
        try:
            return dict(json.loads(self._ask(path, body, kind)))
        except (ValueError, TypeError):
            raise UnreachableError(f"{self.url} answers, but not as `iir serve` does; is it running there?") from None

    def _ask(self, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {**self._headers, **({"Content-Type": kind} if kind else {})}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise KINDS.get(error.code, InputError if error.code < 500 else IirError)(_said(error)) from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            if body and isinstance(why, BrokenPipeError | ConnectionResetError):  # it refuses before it has read all
                raise UnreachableError(
                    f"{self.url} closed the connection while {len(body) / 2**20:.1f} MB were sent to it: more than it takes "
                    "(limits.upload_bytes of /v1/index), or it has ended"
                ) from None
            raise UnreachableError(f"{self.url} does not answer ({why}); is `iir serve` running there?") from None


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"the server answered {error.code}; is it `iir serve`?"
