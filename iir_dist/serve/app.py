"""The routes. Photos come as the plain body of a request and not as a form: nothing has to be parsed to know what one costs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from iir_dist import __version__
from iir_dist.errors import IirError
from iir_dist.serve import metrics as prometheus
from iir_dist.serve.limits import COOKIE, Guard, Refusal, Slots, problem, read_body, refusal_of
from iir_dist.serve.metrics import Metrics
from iir_dist.serve.photos import OTHER, media_type, shrunk
from iir_dist.serve.schema import Answer, Failure, Hit, Id, IndexInfo, Reference, Settings, Side
from iir_dist.serve.service import Service

JSON_BYTES = 2 * 2**20
"""Of a request in JSON: a vector of 65,536 numbers fits."""
PHOTOS_UNDER_WAY = 128
"""Stored photos that are read at a time, those that wait included."""
PREVIEWS = 4
"""Pictures that `/v1/preview` makes at a time; each holds an upload, and decodes it in full."""
PAGE_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json",
}  # fmt: skip
ALONE = "default-src 'none'; sandbox"
"""Policy of what is sent as a stored photo: it may do nothing, whatever it is."""
PREVIEW = 1280
"""px of the picture that `/v1/preview` makes of a photo that a browser cannot show."""
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": text}
    for status, text in {
        400: "The request is not understood, or does not fit the index.", 401: "A token is needed.",
        404: "There is no such image.", 408: "The body came too slowly.", 413: "Too many bytes or pixels.",
        415: "The body is neither a photo nor JSON.", 422: "The photo cannot be used.", 429: "Too many requests are under way.",
        503: "A file cannot be read.", 504: "The answer took too long.",
    }.items()
}  # fmt: skip
SEARCH_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": Reference.model_json_schema(ref_template="#/components/schemas/{model}")},
    },
}


class Page:
    """The files of the page, held in memory: what is not among them cannot be asked for."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str, str]] = {}
        for file in (resources.files("iir_dist.serve") / "page").iterdir():
            kind = PAGE_TYPES.get("." + file.name.rpartition(".")[2])
            if kind:
                data = file.read_bytes()
                path = "/" if file.name == "index.html" else f"/page/{file.name}"
                self.files[path] = data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"'

    def answer(self, request: Request) -> Response:
        """The file of a path, or 304."""
        found = self.files.get(request.url.path)
        if found is None:
            raise Refusal(404, "not_found", "there is nothing at this address")
        data, kind, tag = found
        return _cached(request, data, kind, tag, "no-cache")


def build(service: Service, token: str | None) -> FastAPI:
    """The app over a service; it closes the service when it ends.

    Args:
        token: as of `limits.Guard`.
    """
    config = service.config
    searches = Slots("request", config.concurrent, config.timeout_sec)
    photos = Slots("photo", PHOTOS_UNDER_WAY, config.timeout_sec)
    previews = Slots("preview", PREVIEWS, config.timeout_sec)
    metrics = Metrics(
        lambda: searches.taken, lambda: service.waiting, lambda: service.live.current.rows, lambda: service.live.reloads
    )
    page = Page()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        searches.close()
        photos.close()
        previews.close()
        service.close()

    app = FastAPI(
        title="iir_dist", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=FAILURES,
        description="Given a photo of a thing, find every image that shows that same thing.",
    )  # fmt: skip

    async def failed(_: Request, error: Exception) -> Response:
        refusal = refusal_of(_readable(error))
        metrics.errors.labels(refusal.kind).inc()
        return problem(refusal)

    for kind in (Exception, IirError, Refusal, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, failed)
    app.add_middleware(Guard, token=token, public=frozenset(page.files), metrics=metrics)

    @app.post("/v1/search", response_model=Answer, openapi_extra={"requestBody": SEARCH_BODY})
    async def search(request: Request, settings: Annotated[Settings, Query()]) -> Response:
        """Search with a photo, which is the body, with the settings in the URL; or in JSON with the id or name of a stored
        one or with a vector."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        with searches.take() as slot:
            if kind == "application/json":
                if request.query_params:
                    raise Refusal(400, "bad_request", "settings beside a body in JSON; expected them in it")
                query = _reference(await read_body(request, JSON_BYTES, config.upload_sec))
                answer = await slot.run(service.by_reference, query)
            elif kind.startswith("image/") or kind in (OTHER, ""):
                data = await read_body(request, int(config.upload_mb * 2**20), config.upload_sec)
                answer = await slot.run(service.by_photo, data, settings)
            else:
                raise _no_photo(kind)
        metrics.searched(answer.steps_ms)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/v1/preview", response_class=Response, openapi_extra={"requestBody": SEARCH_BODY})
    async def preview(request: Request) -> Response:
        """A JPEG of a photo that a browser cannot show, as the search sees it."""
        with previews.take() as slot:
            data = await read_body(request, int(config.upload_mb * 2**20), config.upload_sec)
            small = await slot.run(shrunk, data, PREVIEW, config.max_megapixels)
        return Response(
            small, media_type="image/jpeg", headers={"content-security-policy": ALONE, "cache-control": "no-store"}
        )

    @app.get("/v1/images", response_model=list[Hit])
    async def sample(
        count: Annotated[int, Query(ge=1, le=100)] = 24, seed: Annotated[int, Query(ge=0, le=2**32)] = 0
    ) -> list[Hit]:
        """Some of what is stored, to begin with."""
        return await photos.run(service.sample, count, seed)

    @app.get("/v1/images/{id}", response_class=Response)
    async def original(request: Request, id: Annotated[Id, Path()]) -> Response:
        """The stored file as it is."""
        data, version = await photos.run(service.original, id)
        kind = media_type(data)
        return _photo(request, data, kind, f'"{version[:16]}-{id}"')

    @app.get("/v1/images/{id}/about", response_model=Hit)
    async def about(id: Annotated[Id, Path()]) -> Hit:
        """Name and size of a stored photo."""
        return await photos.run(service.hit, id)

    @app.get("/v1/images/{id}/thumbnail", response_class=Response)
    async def thumbnail(
        request: Request,
        id: Annotated[Id, Path()],
        side: Annotated[Side, Query()] = "320",
    ) -> Response:
        """A small JPEG."""
        data, version = await photos.run(service.thumbnail, id, int(side))
        return _photo(request, data, "image/jpeg", f'"{version[:16]}-{id}-{side}"')

    @app.get("/v1/index", response_model=IndexInfo)
    async def index() -> IndexInfo:
        """What is searched: counts, splits, operating points, limits."""
        return await photos.run(service.info)

    @app.post("/v1/session", status_code=204, response_class=Response)
    async def session(request: Request) -> Response:
        """Keep the token of this request in a cookie that scripts cannot read, for the pictures of the page."""
        response = Response(status_code=204)
        if token is not None:
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, path="/")
        return response

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> dict[str, str]:
        return {"status": "ready", "index": service.live.current.fingerprint}

    @app.get("/metrics", include_in_schema=False)
    async def scrape() -> Response:
        return Response(metrics.text(), media_type=prometheus.MEDIA_TYPE)

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        return page.answer(request)

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        return page.answer(request)

    return app


def _reference(body: bytes) -> Reference:
    try:
        return Reference.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(400, "bad_request", _sentence(error.errors())) from None


def _no_photo(kind: str) -> Refusal:
    how = "the photo itself as the body (curl --data-binary @photo.jpg), or JSON"
    return Refusal(415, "media_type", f"a body of type {kind[:60]!r}; expected {how}")


def _readable(error: Exception) -> Exception:
    """Errors of the framework in our words."""
    if isinstance(error, RequestValidationError):
        return Refusal(400, "bad_request", _sentence(error.errors()))
    if isinstance(error, HTTPException):
        kind = {404: "not_found", 405: "method"}.get(error.status_code, "bad_request")
        said = {404: "there is nothing at this address", 405: "this address does not take that method"}
        return Refusal(error.status_code, kind, said.get(error.status_code, str(error.detail)[:200]))
    return error


def _sentence(problems: Any) -> str:
    """What does not fit, without what was sent."""
    parts = []
    for found in list(problems)[:3]:
        where = ".".join(str(p) for p in found["loc"] if p not in ("query", "path", "body"))[:100]
        parts.append(f"{where}: {found['msg']}" if where else str(found["msg"]))
    return "; ".join(parts).replace("Value error, ", "")[:500]


def _photo(request: Request, data: bytes, kind: str, tag: str) -> Response:
    response = _cached(request, data, kind, tag, "private, max-age=600")
    response.headers["content-security-policy"] = ALONE
    if kind == OTHER:
        response.headers["content-disposition"] = "attachment"
    return response


def _cached(request: Request, data: bytes, kind: str, tag: str, control: str) -> Response:
    headers = {"etag": tag, "cache-control": control}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)
