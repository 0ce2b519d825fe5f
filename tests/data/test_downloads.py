"""Downloads from a server on loopback that drops, stalls, lies and changes its mind."""

from __future__ import annotations

import email.utils
import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import Fault, Server, serve
from hypothesis import given
from hypothesis import strategies as st

from iir_dist.data import downloads
from iir_dist.data.downloads import Item, fetch, fetch_all, transfer, watch
from iir_dist.errors import CorruptError, InputError, NotFoundError, StorageError, UnreachableError

DATA = random.Random(1).randbytes(300_000)
SHA256 = "sha256:" + hashlib.sha256(DATA).hexdigest()
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(downloads, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


def ranges(server: Server, path: str) -> list[str | None]:
    """The Range header of each request for a path."""
    return [seen.headers.get("Range") for seen in server.of(path)]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ the plain case


@pytest.mark.parametrize("checksum", [None, SHA256, MD5, SHA256.upper().replace("SHA", "sha")])
def test_a_file_is_downloaded_once(server: Server, tmp_path: Path, checksum: str | None) -> None:
    url = server.put("/set/photos.tar", DATA, modified="Wed, 21 Oct 2015 07:28:00 GMT")
    path = fetch(url, tmp_path / "new" / "folder", checksum)
    assert path == tmp_path / "new" / "folder" / "photos.tar"
    assert path.read_bytes() == DATA
    assert left(path.parent) == ["photos.tar", "photos.tar.json"]
    record = json.loads((path.parent / "photos.tar.json").read_text())
    assert record["url"] == url
    assert record["size"] == len(DATA)
    assert "sha256:" + record["sha256"] == SHA256
    assert record["etag"] == '"v1"'
    assert record["last_modified"] == "Wed, 21 Oct 2015 07:28:00 GMT"
    assert fetch(url, path.parent, checksum) == path
    assert len(server.requests) == 1


def test_an_empty_file_and_one_without_a_length(server: Server, tmp_path: Path) -> None:
    assert fetch(server.put("/empty.txt"), tmp_path).read_bytes() == b""
    assert fetch(server.put("/open.bin", DATA, length=False), tmp_path, SHA256).read_bytes() == DATA


def test_a_recorded_file_is_not_read_again(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA)
    path = fetch(url, tmp_path)
    stat = path.stat()
    path.write_bytes(bytes(len(DATA)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fetch(url, tmp_path).read_bytes() == bytes(len(DATA))  # size and time as recorded: nobody looked inside


def test_a_touched_file_is_read_again_and_accepted(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA)
    path = fetch(url, tmp_path)
    os.utime(path, (1, 1))
    assert fetch(url, tmp_path) == path
    assert json.loads((tmp_path / "a.bin.json").read_text())["mtime_ns"] == 10**9
    assert len(server.requests) == 1


@pytest.mark.parametrize("checksum", [None, SHA256])
def test_a_changed_file_is_refused_and_kept(server: Server, tmp_path: Path, checksum: str | None) -> None:
    url = server.put("/a.bin", DATA)
    path = fetch(url, tmp_path, checksum)
    path.write_bytes(b"other")
    other = hashlib.sha256(b"other").hexdigest()
    otherwise = "replace it with the right file" if checksum else "delete a.bin.json beside it to take it as it lies"
    with pytest.raises(CorruptError, match=f"{other}, expected {SHA256[7:]}; delete it and run .* or {otherwise}"):
        fetch(url, tmp_path, checksum)
    assert path.read_bytes() == b"other"
    if not checksum:
        (tmp_path / "a.bin.json").unlink()
        assert fetch(url, tmp_path).read_bytes() == b"other"


def test_a_checksum_that_becomes_known_later_is_checked(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA)
    fetch(url, tmp_path)
    assert fetch(url, tmp_path, MD5).read_bytes() == DATA
    with pytest.raises(CorruptError, match="expected " + "0" * 64):
        fetch(url, tmp_path, "sha256:" + "0" * 64)


def test_another_address_with_the_same_name_is_refused(server: Server, tmp_path: Path) -> None:
    first, second = server.put("/one/photos.tar", DATA), server.put("/two/photos.tar", b"other")
    fetch(first, tmp_path)
    with pytest.raises(InputError, match=r"photos\.tar was downloaded from .*/one/photos\.tar, and .*/two/photos\.tar"):
        fetch(second, tmp_path)
    server.put("/one/photos.tar?v=2", b"other")
    with pytest.raises(InputError, match="ends with the same name"):
        fetch(server.url("/one/photos.tar?v=2"), tmp_path)
    assert fetch(second, tmp_path, SHA256).read_bytes() == DATA  # a mirror: the checksum says that it is the same


# ------------------------------------------------------------------------------------------------ continuing


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_dropped_connection_is_continued(server: Server, tmp_path: Path, how: str) -> None:
    faults = [Fault(after=100_000, how=how), Fault(after=20_000, how=how)]
    url = server.put("/a.bin", DATA, faults=faults)
    assert fetch(url, tmp_path).read_bytes() == DATA
    asked = ranges(server, "/a.bin")
    assert asked[0] is None
    assert len(asked) == 3
    starts = [int(value.removeprefix("bytes=").removesuffix("-")) for value in asked[1:] if value]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1]
    assert [seen.headers.get("If-Range") for seen in server.of("/a.bin")] == [None, '"v1"', '"v1"']
    assert left(tmp_path) == ["a.bin", "a.bin.json"]


def test_the_date_is_the_condition_where_the_tag_is_weak(server: Server, tmp_path: Path) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    url = server.put("/a.bin", DATA, etag='W/"v1"', modified=date, faults=[Fault(after=100_000)])
    assert fetch(url, tmp_path, SHA256).read_bytes() == DATA
    assert [seen.headers.get("If-Range") for seen in server.of("/a.bin")] == [None, date]
    assert [seen.status for seen in server.of("/a.bin")] == [200, 206]


def test_without_any_version_only_a_known_checksum_allows_to_continue(server: Server, tmp_path: Path) -> None:
    for name, checksum, second in (("a.bin", None, None), ("b.bin", SHA256, "bytes=100000-")):
        url = server.put("/" + name, DATA, etag=None, faults=[Fault(after=100_000)])
        assert fetch(url, tmp_path, checksum).read_bytes() == DATA
        assert ranges(server, "/" + name) == [None, second]


def test_a_server_that_ignores_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA, ranges=False, faults=[Fault(after=100_000)])
    assert fetch(url, tmp_path, SHA256).read_bytes() == DATA
    assert ranges(server, "/a.bin") == [None, "bytes=100000-"]


def test_a_server_that_never_gets_further_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA, ranges=False, every=Fault(after=100_000))
    with pytest.raises(StorageError, match=r"started from zero 6 times .* place it at .*a\.bin"):
        fetch(url, tmp_path)
    assert len(server.requests) == 1 + transfer.MAX_RESTARTS + 1


def test_416_starts_again(server: Server, tmp_path: Path) -> None:
    def shrink() -> None:
        server.resources["/a.bin"].data = DATA[:50_000]  # under the same tag: the server contradicts itself

    url = server.put("/a.bin", DATA, faults=[Fault(after=100_000, then=shrink)])
    assert fetch(url, tmp_path).read_bytes() == DATA[:50_000]
    assert [seen.status for seen in server.of("/a.bin")] == [200, 416, 200]


@pytest.mark.parametrize("conditions", [True, False])
def test_content_that_changes_in_between_is_taken_whole(server: Server, tmp_path: Path, conditions: bool) -> None:
    new = bytes(reversed(DATA))

    def change() -> None:
        server.resources["/a.bin"].data, server.resources["/a.bin"].etag = new, '"v2"'

    url = server.put("/a.bin", DATA, conditions=conditions, faults=[Fault(after=100_000, then=change)])
    assert fetch(url, tmp_path).read_bytes() == new
    assert [s.status for s in server.of("/a.bin")] == ([200, 200] if conditions else [200, 206, 200])
    assert json.loads((tmp_path / "a.bin.json").read_text())["etag"] == '"v2"'


@pytest.mark.parametrize(
    "value",
    [
        "bytes 0-299999/300000", "bytes 100001-299999/300000", "bytes 100000-99999/300000", "bytes 100000-300000/300000",
        "bytes 100000-299999/300001", "items 1-2/3", "",
    ],
)  # fmt: skip
def test_a_partial_answer_that_is_not_the_rest_is_not_used(server: Server, tmp_path: Path, value: str) -> None:
    url = server.put("/a.bin", DATA, content_range=value or " ", faults=[Fault(after=100_000)])
    assert fetch(url, tmp_path).read_bytes() == DATA
    assert [seen.status for seen in server.of("/a.bin")] == [200, 206, 200]


def test_a_server_may_send_the_rest_in_pieces(server: Server, tmp_path: Path, caplog: Any) -> None:
    url = server.put("/a.bin", DATA, most=60_000, faults=[Fault(after=100_000)])
    assert fetch(url, tmp_path).read_bytes() == DATA
    starts = (100_000, 160_000, 220_000, 280_000)
    assert ranges(server, "/a.bin") == [None, *(f"bytes={start}-" for start in starts)]
    assert caplog.text.count("trying again") == 1  # the end of a piece is no failure


def test_patience_begins_anew_with_every_byte(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.5)
    faults = [Fault(after=33_000) for _ in range(8)]
    started = time.monotonic()
    assert fetch(server.put("/a.bin", DATA, pace=0.1, faults=faults), tmp_path).read_bytes() == DATA
    assert time.monotonic() - started > 0.8  # longer than patience, in nine attempts
    assert len(server.requests) == 9


def test_a_part_of_another_address_is_not_continued(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UnreachableError):
        fetch(server.put("/one/a.bin", DATA, every=Fault(after=100_000)), tmp_path)
    assert (tmp_path / "a.bin.part").stat().st_size == 100_000
    new = bytes(reversed(DATA))
    assert fetch(server.put("/two/a.bin", new), tmp_path).read_bytes() == new
    assert ranges(server, "/two/a.bin") == [None]


def test_a_part_that_is_complete_needs_no_server(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    """A process that was killed between the last byte and the rename."""
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.0)
    url = server.put("/a.bin", DATA, every=Fault(after=100_000))
    with pytest.raises(UnreachableError):
        fetch(url, tmp_path)
    (tmp_path / "a.bin.part").write_bytes(DATA)
    assert fetch(url, tmp_path, SHA256).read_bytes() == DATA
    assert len(server.requests) == 1


def test_killed_and_run_again(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA, faults=[Fault(after=200_000, how="stall")])
    process = start(url, tmp_path)
    try:
        part = tmp_path / "a.bin.part"
        wait_for(lambda: part.exists() and part.stat().st_size > 0)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    size = part.stat().st_size
    assert not (tmp_path / "a.bin").exists()
    assert fetch(url, tmp_path).read_bytes() == DATA
    assert ranges(server, "/a.bin") == [None, f"bytes={size}-"]
    assert left(tmp_path) == ["a.bin", "a.bin.json"]


def test_of_two_processes_one_downloads(server: Server, tmp_path: Path) -> None:
    gate = threading.Event()
    url = server.put("/a.bin", DATA, faults=[Fault(after=100_000, how="gate", gate=gate)])
    first = start(url, tmp_path)
    wait_for(lambda: bool(server.requests))
    second = start(url, tmp_path)
    assert second.stderr is not None
    line = second.stderr.readline()
    assert "waiting for another process" in line, line
    gate.set()
    for process in (first, second):
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert output.strip() == str(tmp_path / "a.bin")
    assert len(server.requests) == 1
    assert (tmp_path / "a.bin").read_bytes() == DATA


def start(url: str, folder: Path) -> subprocess.Popen[str]:
    code = (
        "import logging, pathlib, sys; from iir_dist.data.downloads import fetch; logging.basicConfig(level='INFO');"
        "print(fetch(sys.argv[1], pathlib.Path(sys.argv[2])))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------ trouble that passes


def test_busy_servers_are_asked_again_when_they_say(server: Server, tmp_path: Path, caplog: Any) -> None:
    date = email.utils.formatdate(time.time() - 60, usegmt=True)  # in the past: at once
    faults = [Fault(503, {"Retry-After": "1"}), Fault(429), Fault(502, {"Retry-After": date}), Fault(500)]
    url = server.put("/a.bin", DATA, faults=faults)
    started = time.monotonic()
    assert fetch(url, tmp_path).read_bytes() == DATA
    assert 1.0 <= time.monotonic() - started < 10
    assert [seen.status for seen in server.requests] == [503, 429, 502, 500, 200]
    assert "503 Service Unavailable; trying again in 1.0 s" in caplog.text


def test_a_server_that_wants_more_patience_than_there_is(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA, every=Fault(503, {"Retry-After": "9999"}))
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"503 Service Unavailable, and the server asks to come back in 9999 s"):
        fetch(url, tmp_path)
    assert time.monotonic() - started < 10
    assert len(server.requests) == 1


def test_waits_grow_and_end(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.5)
    url = server.put("/a.bin", DATA, every=Fault(503))
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"run the same command again later, it goes on at 0 bytes, or get the"):
        fetch(url, tmp_path)
    assert time.monotonic() - started < 5
    assert 3 <= len(server.requests) <= 8  # 10, 20, 40, … ms, each times 0.5 to 1


def test_a_short_body_is_never_accepted(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.2)
    url = server.put("/a.bin", DATA, faults=[Fault(after=100_000)], every=Fault(after=0))
    with pytest.raises(UnreachableError, match=r"the connection ended after 100000 of 300000 bytes.*at 100000 bytes"):
        fetch(url, tmp_path)
    assert left(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    server.resources["/a.bin"].every = None
    assert fetch(url, tmp_path).read_bytes() == DATA


def test_a_silent_server_is_left(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    url = server.put("/a.bin", DATA, faults=[Fault(after=100_000, how="stall")])
    assert fetch(url, tmp_path).read_bytes() == DATA
    assert ranges(server, "/a.bin") == [None, "bytes=100000-"]


def test_nobody_listens(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="Connection refused"):
            fetch(f"http://127.0.0.1:{free.getsockname()[1]}/a.bin", tmp_path)


# ------------------------------------------------------------------------------------------------ trouble that stays


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("checksum", [None, MD5])
def test_what_is_gone_can_be_placed_by_hand(
    server: Server, tmp_path: Path, status: int, checksum: str | None, caplog: Any
) -> None:
    url = server.put("/a.bin", every=Fault(status))
    place = tmp_path / "a.bin"
    with pytest.raises(NotFoundError, match=rf"a\.bin is gone \({status} .*place it at {place}, then run the same"):
        fetch(url, tmp_path, checksum)
    place.write_bytes(DATA)
    with caplog.at_level(logging.INFO):
        assert fetch(url, tmp_path, checksum) == place
    assert ("no checksum is known" in caplog.text) == (checksum is None)
    assert fetch(url, tmp_path, checksum) == place
    assert len(server.requests) == 1


def test_a_file_placed_by_hand_ends_an_unfinished_download(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.0)
    url = server.put("/a.bin", DATA, every=Fault(after=100_000))
    with pytest.raises(UnreachableError):
        fetch(url, tmp_path, SHA256)
    (tmp_path / "a.bin").write_bytes(DATA)
    assert fetch(url, tmp_path, SHA256).read_bytes() == DATA
    assert left(tmp_path) == ["a.bin", "a.bin.json"]


def test_a_wrong_file_placed_by_hand_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"a page that says 'not found'")
    with pytest.raises(CorruptError, match=f"a.bin is not http://h/a.bin: .*, expected {SHA256[7:]}; delete it"):
        fetch("http://h/a.bin", tmp_path, SHA256)
    (tmp_path / "b.bin").touch()
    with pytest.raises(InputError, match=r"b\.bin is empty"):
        fetch("http://h/b.bin", tmp_path)
    (tmp_path / "c.bin").mkdir()
    with pytest.raises(StorageError, match=r"cannot use .*c\.bin"):
        fetch("http://h/c.bin", tmp_path)


@pytest.mark.parametrize("checksum", [SHA256, MD5])
def test_wrong_content_is_deleted(server: Server, tmp_path: Path, checksum: str) -> None:
    url = server.put("/a.bin", b"wrong")
    found = hashlib.new(checksum.partition(":")[0], b"wrong").hexdigest()
    with pytest.raises(
        CorruptError, match=f"{found}, expected {checksum.partition(':')[2]}; what was downloaded is del"
    ):
        fetch(url, tmp_path, checksum)
    assert left(tmp_path) == []


def test_a_web_page_is_not_the_file(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.tgz", b"<html>302 Found</html>", kind="text/html; charset=utf-8")
    with pytest.raises(StorageError, match="answers with a web page, not the file; get the file elsewhere"):
        fetch(url, tmp_path)
    assert left(tmp_path) == []
    assert fetch(server.put("/a.html", b"<html/>", kind="text/html"), tmp_path).read_bytes() == b"<html/>"


def test_refused_by_the_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is refused \(403 Forbidden\); get the file elsewhere and place it at"):
        fetch(server.put("/a.bin", every=Fault(403)), tmp_path)
    assert len(server.requests) == 1


def test_a_host_that_has_no_address(tmp_path: Path, monkeypatch: Any) -> None:
    def none(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", none)
    place = tmp_path / "a.bin"
    with pytest.raises(
        StorageError, match=f"the host of http://gone.example/a.bin is not found .*place it at {place},"
    ):
        fetch("http://gone.example/a.bin", tmp_path)


def test_a_full_disk(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", DATA)
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"no space left on the disk that holds .*a\.bin; free some"):
        fetch(url, tmp_path)


def test_a_file_that_cannot_fit_is_not_begun(server: Server, tmp_path: Path) -> None:
    url = server.put("/a.bin", b"x", every=Fault(200, {"Content-Length": str(10**18)}))
    with pytest.raises(StorageError, match=f"has {10**18} bytes and the disk that holds .* has room for"):
        fetch(url, tmp_path)
    assert left(tmp_path) == []


# ------------------------------------------------------------------------------------------------ addresses


def test_redirects_are_followed_to_http_alone(server: Server, tmp_path: Path) -> None:
    server.put("/real/x", DATA, faults=[Fault(after=100_000)])
    assert fetch(server.put("/a.bin", redirect="/real/x"), tmp_path).read_bytes() == DATA
    assert ranges(server, "/real/x") == [None, "bytes=100000-"]
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for number, target in enumerate((secret.as_uri(), "ftp://127.0.0.1/x", "data:,x")):
        with pytest.raises(StorageError, match="redirects to what is not http"):
            fetch(server.put(f"/{number}.bin", redirect=target), tmp_path)
    with pytest.raises(StorageError, match="or in a circle"):
        fetch(server.put("/circle.bin", redirect="/circle.bin"), tmp_path)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/a", "s3://b/a", "/etc/passwd", "h/a.bin", "data:,x", ""]
)
def test_other_schemes_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="cannot be downloaded; expected http:// or https://"):
        fetch(url, tmp_path)


@pytest.mark.parametrize(
    "url", ["http:///a.bin", "http://h:port/a.bin", "http://h:99999/a.bin", "http://[::1/a.bin", "http://a..b/c.bin"]
)
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="expected http"):
        fetch(url, tmp_path)


@pytest.mark.parametrize("url", ["http://h", "http://h/", "http://h/a/..", "http://h/%2e%2e", "http://h/?a.bin"])
def test_addresses_without_a_name(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="names no file"):
        fetch(url, tmp_path)


@pytest.mark.parametrize("checksum", ["sha256", "sha256:xyz", SHA256[:-1], "sha1:" + "0" * 40, "md5:" + "0" * 64, ""])
def test_checksums_that_are_none(tmp_path: Path, checksum: str) -> None:
    with pytest.raises(InputError, match="expected sha256: with 64, or md5: with 32"):
        fetch("http://h/a.bin", tmp_path, checksum)


@given(st.text(max_size=300))
def test_names_stay_in_the_folder(end: str) -> None:
    from urllib.parse import quote

    for text in (quote(end, safe=""), quote(end, safe="/%"), end):
        try:
            name = downloads.file_name("http://host/folder/" + text)
        except (InputError, ValueError):
            continue
        assert Path("/folder", name).parent == Path("/folder")
        assert not name.startswith((".", "-"))
        assert "\0" not in name
        assert 0 < len(name.encode()) <= 200


def test_long_names_keep_their_ending() -> None:
    name = downloads.file_name("http://host/" + "ü" * 300 + ".tar.gz")
    assert name.endswith("üüü.tar.gz")
    assert len(name.encode()) in (199, 200)


def test_no_secret_is_written_or_said(server: Server, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.1)
    login, query = "me:hush%40word@", "?token=classified"
    server.put("/a.bin" + query, DATA, faults=[Fault(503), Fault(after=100_000)], every=Fault(503))
    url = server.url("/a.bin" + query, login=login)
    said = []
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(UnreachableError) as caught:
            fetch(url, tmp_path)
        said += [str(caught.value), (tmp_path / "a.bin.part.json").read_text()]
        server.resources["/a.bin" + query].every = Fault(403)
        with pytest.raises(StorageError) as refused:
            fetch(url, tmp_path)
        server.resources["/a.bin" + query].every = None
        fetch(url, tmp_path)
        said += [str(refused.value), (tmp_path / "a.bin.json").read_text(), caplog.text]
    for bad in ("ftp://me:hushword@h/a", "http://me:hush/word@h/a", "http://me:hush#word@h/a", "http://me:hush?word@h"):
        with pytest.raises(InputError) as wrong:
            fetch(bad, tmp_path)
        said.append(str(wrong.value))
    assert {seen.headers["Authorization"] for seen in server.requests} == {"Basic bWU6aHVzaEB3b3Jk"}
    assert len(said) == 9
    for text in said:
        assert "hush" not in text
        assert "classified" not in text
        assert "bWU6" not in text


def test_a_password_is_for_its_host_alone(server: Server, tmp_path: Path) -> None:
    server.put("/real", DATA)
    server.put("/a.bin", redirect=server.url("/real", host="localhost"))
    assert fetch(server.url("/a.bin", login="me:hush@"), tmp_path).read_bytes() == DATA
    assert ["Authorization" in seen.headers for seen in server.requests] == [True, False]


# ------------------------------------------------------------------------------------------------ several


def test_several_in_order_and_each_once(server: Server, tmp_path: Path) -> None:
    items = [Item(server.put(f"/{n}.bin", bytes([n]) * 1000), size=1000) for n in range(9)]
    paths = fetch_all([*items, items[3]], tmp_path)
    assert [path.name for path in paths] == [f"{n}.bin" for n in range(9)] + ["3.bin"]
    assert [path.read_bytes() for path in paths[:9]] == [bytes([n]) * 1000 for n in range(9)]
    assert len(server.requests) == 9
    assert fetch_all([], tmp_path) == []


def test_not_more_than_asked_for_at_a_time(server: Server, tmp_path: Path) -> None:
    gate = threading.Event()
    for number in range(6):
        server.put(f"/{number}.bin", DATA, faults=[Fault(after=1, how="gate", gate=gate)])
    thread = threading.Thread(
        target=fetch_all, args=([Item(server.url(f"/{n}.bin")) for n in range(6)], tmp_path), kwargs={"parallel": 2}
    )
    thread.start()
    wait_for(lambda: server.active == 2)
    time.sleep(0.1)  # a third would come now
    gate.set()
    thread.join()
    assert server.most_at_once == 2
    assert all((tmp_path / f"{n}.bin").read_bytes() == DATA for n in range(6))


def test_the_first_failure_stops_the_others_and_they_go_on_later(server: Server, tmp_path: Path) -> None:
    begun, part = threading.Event(), tmp_path / "slow.bin.part"
    slow = server.put("/slow.bin", DATA, pace=0.2)  # four seconds in all
    gone = server.put("/gone.bin", every=Fault(404, gate=begun))
    items = [Item(slow), Item(gone), *(Item(server.put(f"/{n}.bin", DATA)) for n in range(50))]
    watcher = threading.Thread(target=lambda: (wait_for(lambda: part.exists() and part.stat().st_size), begun.set()))
    watcher.start()
    with pytest.raises(NotFoundError, match=r"gone\.bin is gone"):
        fetch_all(items, tmp_path, parallel=2)
    watcher.join()
    assert not (tmp_path / "slow.bin").exists()
    assert len(server.requests) < 52  # what was queued was not begun
    size = part.stat().st_size
    assert 0 < size < len(DATA)
    server.resources["/slow.bin"].pace = 0
    assert fetch(slow, tmp_path).read_bytes() == DATA
    assert ranges(server, "/slow.bin") == [None, f"bytes={size}-"]


def test_names_that_would_collide_are_refused_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    one, two = server.put("/1/a.tar", DATA), server.put("/2/a.tar", DATA)
    with pytest.raises(InputError, match=r"have the same file name 'a\.tar'; fetch them into different folders"):
        fetch_all([Item(one), Item(two)], tmp_path)
    with pytest.raises(InputError, match=r"'a\.tar\.part' is where the state of 'a\.tar' is kept"):
        fetch_all([Item(one), Item(server.url("/a.tar.part"))], tmp_path)
    assert not server.requests


def test_progress_counts_what_an_earlier_run_left(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    for module in (downloads, watch):
        monkeypatch.setattr(module, "MB", 1000)
    counted: list[tuple[Any, ...]] = []

    class Recorder(downloads.Progress):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            counted.append(arguments)

        def advance(self, units: int = 1, note: str = "") -> None:
            super().advance(units, note)
            counted.append((units,))

    monkeypatch.setattr(downloads, "Progress", Recorder)
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.0)
    url = server.put("/a.bin", DATA, faults=[Fault(after=100_000)])
    with pytest.raises(UnreachableError):
        fetch(url, tmp_path)
    counted.clear()
    fetch_all([Item(url, size=len(DATA))], tmp_path)
    assert counted[0] == ("fetch", 300, "MB", 100)
    assert sum(units for (units,) in counted[1:]) == 200


def test_the_default_folder(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("IIR_CACHE", str(tmp_path))
    assert downloads.downloads_folder() == tmp_path / "downloads"
