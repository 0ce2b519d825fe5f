"""The API as it is seen from outside: what is asked in any way gets a typed answer, and costs what it may."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from typing import Any

import pytest
import served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from iir_dist.client import Client
from iir_dist.errors import BusyError, CorruptError, IirError, InputError, NotFoundError, UnreachableError
from iir_dist.serve.limits import HEADERS

HEIC = (
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAA"
    "AAAERAAAEAAQAAAAABoQABAAAAAAAAABoAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAA"
    "AADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkA"
    "AAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAA"
    "AAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAC"
    "JtZGF0AAAAFigBrxmA70mlv//bMx/uoL/hCtaY+bg="
)
"""64 x 48 px of one red."""
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def first(collection: served.Collection) -> bytes:
    """A photo."""
    return next(iter(collection.photos.values()))


def test_search_with_a_photo(collection: served.Collection, http: served.Http) -> None:
    name, data = list(collection.photos.items())[9]
    for kind in ("image/jpeg", "application/octet-stream"):
        answer = http.search(data, "?k=3&exact=true", content_type=kind)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json["hits"][0]["name"] == name
        width, height = Image.open(io.BytesIO(data)).size
        expected = {"kind": "photo", "id": None, "name": None, "width": width, "height": height, "box": None}
        assert answer.json["query"] == expected
    boxed = http.search(data, "?k=3&box=10,10,100,80&splits=db&splits=distractor&rerank=qe")
    assert boxed.status == 200
    assert boxed.json["query"]["box"] == [10, 10, 100, 80]
    assert boxed.json["used"]["rerank"] == "qe"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_formats(collection: served.Collection, http: served.Http, kind: str) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(first(collection))).convert("RGB").save(out, kind)
    assert http.search(out.getvalue(), "?k=1").status == 200


def test_photos_of_iphones(http: served.Http) -> None:
    pytest.importorskip("pi_heif", reason="pi-heif is not installed (pip install 'iir-dist[heic]')")
    answer = http.search(base64.b64decode(HEIC), "?k=1")
    assert answer.status == 200
    assert (answer.json["query"]["width"], answer.json["query"]["height"]) == (64, 48)
    red, green, blue = Image.open(io.BytesIO(http("POST", "/v1/preview", base64.b64decode(HEIC)).body)).getpixel(
        (30, 20)
    )
    assert abs(red - 200) + abs(green - 40) + abs(blue - 60) < 20


@pytest.mark.parametrize(
    ("body", "query", "status", "kind"),
    [
        (b"", "", 422, "image_empty"),
        (b"hello", "", 422, "image_not_an_image"),
        (b"%PDF-1.7", "", 422, "image_unsupported"),
        (b"\xff\xd8\xff\xe0 no jpeg", "", 422, "image_corrupt"),
        (b"x", "?k=0", 400, "bad_request"),
        (b"x", "?k=1001", 400, "bad_request"),
        (b"x", "?box=1,2,3", 400, "bad_request"),
        (b"x", "?box=a,b,c,d", 400, "bad_request"),
        (b"x", "?box=nan,0,1,1", 400, "bad_request"),
        (b"x", "?nprobe=99", 400, "bad_request"),
        (b"x", "?recall=0.9&exact=true", 400, "bad_request"),
        (b"x", "?unknown=1", 400, "bad_request"),
        (b"x", "?rerank=magic", 400, "bad_request"),
        ({}, "", 400, "bad_request"),
        ({"id": 1, "name": "x"}, "", 400, "bad_request"),
        ({"id": -1}, "", 400, "bad_request"),
        ({"id": 2**63}, "", 400, "bad_request"),
        ({"id": 10**30}, "", 400, "bad_request"),
        ({"id": 999}, "", 404, "not_found"),
        ({"id": 1}, "?k=3", 400, "bad_request"),
        ({"vector": [1.0]}, "", 400, "bad_request"),
        ({"vector": [1.0], "box": [0, 0, 1, 1]}, "", 400, "bad_request"),
        ({"id": 1, "box": [900, 900, 950, 950]}, "", 422, "image_corrupt"),
    ],
)
def test_errors_have_a_type_and_a_sentence(http: served.Http, body: Any, query: str, status: int, kind: str) -> None:
    answer = http.search(body, query)
    assert (answer.status, answer.error) == (status, kind)
    assert len(answer.json["error"]["message"]) > 3
    assert set(answer.json) == {"error"}


def test_other_bodies_and_addresses(http: served.Http) -> None:
    for kind in ("multipart/form-data; boundary=x", "text/html", "application/x-www-form-urlencoded"):
        answer = http.search(b"x", content_type=kind)
        assert (answer.status, answer.error) == (415, "media_type")
        assert "--data-binary" in answer.json["error"]["message"]
    assert http.search(b"{", content_type="application/json").error == "bad_request"
    assert http.search(b'{"id": 1, "vector": [NaN]}', content_type="application/json").error == "bad_request"
    assert http.search(b"[" * 100_000, content_type="application/json").error == "bad_request"
    assert http("GET", "/v1/search").error == "method"
    for path in (
        "/nothing",
        "/page/",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/main.js/..",
        "//etc/passwd",
        "/v1/images/1/x",
    ):
        assert http("GET", path).status == 404, path
    for path in (
        "/v1/images/x",
        "/v1/images/-1",
        "/v1/images/1e3",
        "/v1/images/99999999999999999999",
        "/v1/images/1/thumbnail?side=7",
    ):
        assert http("GET", path).status == 400, path
    assert http("GET", "/v1/images/..%2f..%2fmanifest.json").status in (400, 404)


def test_every_answer_tells_browsers_to_be_careful(http: served.Http) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", "/page/main.js"),
        ("GET", "/v1/index"),
        ("GET", "/x"),
        ("POST", "/v1/search"),
    ):
        headers = http(method, path).headers
        for name, _ in HEADERS:
            assert name.decode() in headers, path
        assert "unsafe" not in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_stored_photos(collection: served.Collection, http: served.Http) -> None:
    for number, data in list(enumerate(collection.photos.values()))[::7]:
        answer = http("GET", f"/v1/images/{number}")
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, data, "image/jpeg")
        assert "sandbox" in answer.headers["content-security-policy"]
        again = http("GET", f"/v1/images/{number}", if_none_match=answer.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        small = http("GET", f"/v1/images/{number}/thumbnail?side=160")
        assert small.headers["content-type"] == "image/jpeg"
        assert http("GET", f"/v1/images/{number}/about").json["name"] == list(collection.photos)[number]
    assert http("GET", "/v1/images/24").error == "not_found"
    assert [hit["id"] for hit in http("GET", "/v1/images?count=5&seed=2").json] != [
        hit["id"] for hit in http("GET", "/v1/images?count=5&seed=3").json
    ]


def test_a_preview_is_what_the_search_sees(collection: served.Collection, http: served.Http) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(first(collection))).save(out, "TIFF")
    answer = http("POST", "/v1/preview", out.getvalue())
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.body)).size == Image.open(io.BytesIO(first(collection))).size
    assert http("POST", "/v1/preview", b"x").error == "image_not_an_image"


def test_the_api_is_documented(http: served.Http) -> None:
    described = http("GET", "/openapi.json").json
    assert set(described["paths"]) == {
        "/v1/search", "/v1/preview", "/v1/images", "/v1/images/{id}", "/v1/images/{id}/about", "/v1/images/{id}/thumbnail",
        "/v1/index", "/v1/session",
    }  # fmt: skip
    search = described["paths"]["/v1/search"]["post"]
    assert {"application/octet-stream", "application/json", "image/*"} == set(search["requestBody"]["content"])
    assert {"k", "box", "recall", "rerank", "splits"} <= {p["name"] for p in search["parameters"]}
    assert {"400", "413", "422", "429"} <= set(search["responses"])


def test_metrics(collection: served.Collection, http: served.Http) -> None:
    http.search(first(collection), "?rerank=qe")
    http.search(b"x")
    text = http("GET", "/metrics").body.decode()
    for step in ("queue", "decode", "embed", "coarse", "scan", "refine", "rerank"):
        assert f'iir_serve_step_seconds_count{{step="{step}"}}' in text
    assert 'iir_serve_requests_total{route="/v1/search",status="200"}' in text
    assert 'iir_serve_errors_total{type="image_not_an_image"}' in text
    assert "iir_serve_index_rows 24.0" in text
    assert "iir_serve_under_way 0.0" in text


# ------------------------------------------------------------------------------------------------ limits


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB that says how large it is, truthfully."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(http: served.Http) -> None:
    start = time.perf_counter()
    answer = http.search(bomb(20_000, 20_000))
    assert (answer.status, answer.error) == (413, "image_too_large")
    assert time.perf_counter() - start < 5
    assert http.search(bomb(1_000, 1_000)).status == 200


def raw(http: served.Http, *parts: bytes, pause: float = 0) -> bytes:
    """Send bytes, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", http.port), timeout=30) as sock:
        received = b""
        try:
            for part in parts:
                sock.sendall(part)
                time.sleep(pause)
            while data := sock.recv(65536):
                received += data
        except ConnectionError:  # it does not listen to what it has refused
            pass
        return received


def test_a_body_beyond_the_limit_is_not_read(http: served.Http) -> None:
    head = b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    said = raw(http, head + b"content-length: 1048577\r\n\r\n")
    assert b" 413 " in said.partition(b"\r\n")[0]
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] == "too_large"
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    unsaid = raw(http, head + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 17)
    assert b" 413 " in unsaid.partition(b"\r\n")[0]
    for length in (b"-1", b"x", b"1e3", b"99999999999999999999"):
        refused = raw(http, head + b"content-length: " + length + b"\r\n\r\n").partition(b"\r\n")[0]
        assert b" 400 " in refused or b" 413 " in refused, length


def test_slow_clients_are_left(collection: served.Collection) -> None:
    with served.serving(collection, upload_sec=0.5) as (http, _):
        head = b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\n"
        start = time.perf_counter()
        assert raw(http, head) == b""  # a head that does not end
        said = raw(http, head + b"content-length: 1000\r\n\r\n", b"abc")
        assert b" 408 " in said.partition(b"\r\n")[0]
        assert raw(http, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET / HT").count(b"200 OK") == 1
        assert time.perf_counter() - start < 20
        assert http.search(first(collection)).status == 200


def test_who_leaves_is_no_error_of_the_server(http: served.Http) -> None:
    with socket.create_connection(("127.0.0.1", http.port), timeout=30) as sock:
        sock.sendall(b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nabc")
    deadline = time.monotonic() + 30
    while b'iir_serve_errors_total{type="disconnected"}' not in (text := http("GET", "/metrics").body):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert b'type="internal"' not in text


def test_pictures_of_uploads_are_few_at_a_time(http: served.Http, monkeypatch: pytest.MonkeyPatch) -> None:
    from iir_dist.serve import app

    gate, answers = threading.Event(), []
    entered = threading.Semaphore(0)

    def slow(*_: Any) -> bytes:
        entered.release()
        gate.wait()
        return b""

    monkeypatch.setattr(app, "shrunk", slow)
    threads = [
        threading.Thread(target=lambda: answers.append(http("POST", "/v1/preview", b"x").status))
        for _ in range(app.PREVIEWS)
    ]
    for thread in threads:
        thread.start()
        assert entered.acquire(timeout=30)
    assert http("POST", "/v1/preview", b"x").error == "busy"
    gate.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * app.PREVIEWS


def test_more_than_it_can_do_is_429(collection: served.Collection) -> None:
    with served.serving(collection, concurrent=2) as (http, service):
        gate, answers = threading.Event(), []
        vectors = service.embedding._network.vectors

        def slow(*arguments: Any) -> Any:
            gate.wait()
            return vectors(*arguments)

        service.embedding._network.vectors = slow
        threads = [
            threading.Thread(target=lambda: answers.append(http.search(first(collection)).status)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while b"iir_serve_under_way 2.0" not in http("GET", "/metrics").body:
            time.sleep(0.01)
        refused = http.search(first(collection))
        assert (refused.status, refused.error, refused.headers["retry-after"]) == (429, "busy", "1")
        assert http("GET", "/v1/images/1").status == 200  # the page goes on
        with pytest.raises(BusyError):
            Client(http.url).search(first(collection))
        gate.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert http.search(first(collection)).status == 200


def test_an_answer_that_takes_too_long(collection: served.Collection) -> None:
    with served.serving(collection, timeout_sec=0.3, concurrent=1) as (http, service):
        gate = threading.Event()
        vectors = service.embedding._network.vectors
        service.embedding._network.vectors = lambda *a: (gate.wait(), vectors(*a))[1]
        assert http.search(first(collection)).error == "timeout"
        assert http.search(first(collection)).error == "busy"  # what was given up is still at it, and counts
        gate.set()
        deadline = time.monotonic() + 30
        while http.search({"id": 1}).status != 200:
            assert time.monotonic() < deadline


# ------------------------------------------------------------------------------------------------ who may ask


def test_only_this_machine_is_answered_without_a_token(http: served.Http) -> None:
    """A page elsewhere whose name is made to point here must not read the photos."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"):
        assert http("GET", "/v1/index", host=host).error == "host"
    for host in ("localhost", "localhost:80", "127.0.0.1:1", "[::1]:8000", "[::1]", "LOCALHOST"):
        assert http("GET", "/v1/index", host=host).status == 200


def test_a_token(collection: served.Collection) -> None:
    token = "a-token-of-some-length"
    with served.serving(collection, token=token) as (http, _):
        for path in ("/v1/index", "/v1/images/1", "/v1/images/1/thumbnail", "/metrics", "/openapi.json", "/nothing"):
            assert http("GET", path).error == "unauthorized", path
            assert http("GET", path, authorization="Bearer wrong").status == 401
            assert http("GET", path, authorization="Bearer " + "\u00e9").status == 401
        assert http.search(first(collection)).status == 401
        assert http("POST", "/v1/session").status == 401
        for path in ("/", "/page/main.js", "/healthz", "/readyz"):
            assert http("GET", path).status == 200, path
        assert http("GET", "/v1/index", authorization=f"Bearer {token}", host="elsewhere.example").status == 200
        entered = http("POST", "/v1/session", authorization=f"Bearer {token}")
        assert entered.status == 204
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert http("GET", "/v1/images/1", cookie=cookie.partition(";")[0]).status == 200
        other = '_x={"a": "b"}; '  # what another program of this host has set
        assert http("GET", "/v1/images/1", cookie=other + cookie.partition(";")[0]).status == 200
        assert http("GET", "/v1/images/1", cookie="iir_token=wrong").status == 401
        assert http("GET", "/v1/images/1", cookie="iir_token=").status == 401
        assert http("GET", "/v1/images/1", cookie='iir_token="; \x01').status in (400, 401)
        assert Client(http.url, token).index()["rows"] == 24
        assert Client(f"{http.url}/#token={token}").index()["rows"] == 24
        assert Client(f"{http.url}/#token={token.replace('-', '%2D')}").index()["rows"] == 24
        with pytest.raises(InputError, match="a token is needed"):
            Client(http.url).index()


# ------------------------------------------------------------------------------------------------ anything at all


def sound(answer: served.Reply) -> None:
    """Whatever was asked: no 5xx, no traceback, an error of the one form."""
    assert answer.status < 500, answer.body
    assert b"Traceback" not in answer.body
    assert b".py" not in answer.body
    if answer.status >= 400:
        assert set(answer.json["error"]) == {"type", "message"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = (
    "id",
    "name",
    "vector",
    "k",
    "box",
    "recall",
    "nprobe",
    "refine",
    "exact",
    "rerank",
    "depth",
    "splits",
    "prefix",
)


@FUZZ
@given(
    body=st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(0, 60) | st.sampled_from(["qe", "db"]), max_size=5)
)
def test_fuzz_json(http: served.Http, body: dict[str, Any]) -> None:
    sound(http.search(body))


@FUZZ
@given(body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "image/png", "", "text/x; \t"]))
def test_fuzz_bytes(http: served.Http, body: bytes, kind: str) -> None:
    sound(http.search(body, content_type=kind))


@FUZZ
@given(data=st.data())
def test_fuzz_photos(collection: served.Collection, http: served.Http, data: st.DataObject) -> None:
    photo = bytearray(list(collection.photos.values())[data.draw(st.integers(0, 23))])
    for place in data.draw(st.lists(st.integers(0, len(photo) - 1), min_size=1, max_size=8)):
        photo[place] = data.draw(st.integers(0, 255))
    sound(http.search(bytes(photo[: data.draw(st.integers(0, len(photo)))]), "?k=1"))


@FUZZ
@given(
    values=st.lists(
        st.tuples(st.sampled_from((*KEYS, "x")), st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)),
        max_size=4,
    )
)
def test_fuzz_settings(collection: served.Collection, http: served.Http, values: list[tuple[str, str]]) -> None:
    from urllib.parse import urlencode

    sound(http.search(first(collection), "?" + urlencode(values, errors="replace")))


@FUZZ
@given(
    path=st.text(st.characters(codec="latin-1"), max_size=30),
    prefix=st.sampled_from(["/", "/v1/images/", "/page/", "/v1/"]),
)
def test_fuzz_paths(http: served.Http, path: str, prefix: str) -> None:
    from urllib.parse import quote

    sound(http("GET", prefix + quote(path, safe="/%?=&")))


def test_what_goes_wrong_inside_stays_inside(collection: served.Collection, caplog: pytest.LogCaptureFixture) -> None:
    with served.serving(collection) as (http, service):

        def broken(*_: Any) -> Any:
            raise RuntimeError("a secret of /some/path.py")

        service.by_reference = broken
        answer = http.search({"id": 1})
        assert (answer.status, answer.error) == (500, "internal")
        assert b"secret" not in answer.body
        assert "a secret" in caplog.text  # the log has it
        assert http.search(first(collection)).status == 200

        def damaged(*_: Any) -> Any:
            raise CorruptError("/some/path.py is not as it was written")

        service.by_photo = damaged
        answer = http.search(first(collection))
        assert (answer.status, answer.error) == (503, "corrupt")
        assert b"path" not in answer.body


# ------------------------------------------------------------------------------------------------ client


def test_the_client(collection: served.Collection, http: served.Http, tmp_path: Any) -> None:
    name, data = list(collection.photos.items())[3]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    client = Client(http.url + "/")
    assert client.search(path, k=2, exact=True)[0]["name"] == name
    assert client.search(str(path), k=2, box=[10, 10, 90, 90], splits=["db"], rerank="qe", exact=False)
    assert client.search(3, k=2, exact=True)[0]["id"] == 3
    assert len(client.search([1.0] * 96, k=4)) == 4
    client.save(3, tmp_path / "saved.jpg")
    assert (tmp_path / "saved.jpg").read_bytes() == data
    with pytest.raises(NotFoundError, match="no id 99"):
        client.image(99)
    with pytest.raises(InputError, match="k: "):
        client.search(path, k=0)
    with pytest.raises(InputError, match=r"nothing\.jpg cannot be read"):
        client.search(tmp_path / "nothing.jpg")
    for url in ("photo.jpg", "ftp://x", "http://"):
        with pytest.raises(InputError, match="not the address"):
            Client(url)
    with pytest.raises(IirError, match=r"more than 1048576 bytes|while 30\.0 MB were sent to it: more than it takes"):
        client.search(bytes(30 * 2**20))
    for url in ("http://127.0.0.1:9", "http://localhost:x"):
        with pytest.raises(UnreachableError, match="iir serve"):
            Client(url).index()


def test_iir_query(collection: served.Collection, http: served.Http, tmp_path: Any) -> None:
    from click.testing import CliRunner

    from iir_dist.cli import main

    name, data = list(collection.photos.items())[3]
    (tmp_path / "photo.jpg").write_bytes(data)
    run = CliRunner().invoke(
        main, ["query", str(tmp_path / "photo.jpg"), "--url", http.url, "-k", "4", "--recall", "1"]
    )
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 4
    assert run.stdout.splitlines()[0].split()[-1] == name
    run = CliRunner().invoke(main, ["query", "id:3", "--url", http.url, "--json", "--box", "1,2,99,90"])
    assert json.loads(run.stdout)["query"]["name"] == name
    for arguments in (["id:3", "--box", "x"], ["nothing.jpg"], ["id:3", "--url", "http://127.0.0.1:9"]):
        run = CliRunner().invoke(main, ["query", "--url", http.url, *arguments])
        assert run.exit_code == 1
        assert run.output.startswith("Error: ")
    assert issubclass(BusyError, IirError)
