"""`iir serve`: who may connect, what it prints, how it ends; and replicas on Ray Serve."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import served
from click.testing import CliRunner

from iir_dist.cli import main
from iir_dist.client import Client
from iir_dist.errors import ConfigError, InputError


def arguments(collection: served.Collection, *more: str) -> list[str]:
    """Of a server of the collection."""
    folders = ["--images", str(collection.images), "--encoder", str(collection.encoder)]
    return ["serve", str(collection.index), *folders, *more]


def test_other_addresses_need_a_token(collection: served.Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    from iir_dist.serve import local

    listen, tokens = local.listen, []

    class Nothing:
        def run(self, sockets: Any) -> None:
            """Serve nobody."""

    monkeypatch.setattr(local, "listen", lambda _host, _port: listen("127.0.0.1", 0))
    monkeypatch.setattr(local, "server", lambda *_: Nothing())
    for host, wanted in (
        ("127.0.0.1", 0),
        ("localhost", 0),
        ("::1", 0),
        ("127.0.0.2", 1),
        ("0.0.0.0", 1),
        ("192.0.2.1", 1),
        ("a.example", 1),
    ):
        run = CliRunner().invoke(main, arguments(collection, "--local", "--host", host))
        assert run.exit_code == 0, run.output
        found = re.findall(r"#token=(\S+)", run.stdout)
        assert len(found) == wanted, host
        tokens += found
    assert len(set(tokens)) == len(tokens) == 4
    assert all(len(token) >= 32 for token in tokens)
    for token in ("short", "long enough, but a space ", "long-enough-but-\u00fc"):
        run = CliRunner().invoke(main, arguments(collection, "--local", "--token", token))
        assert run.exit_code == 1
        assert "expected at least 16" in run.output
    run = CliRunner().invoke(main, arguments(collection, "--local", "--token", "sixteen+letters/=&"))
    assert "#token=sixteen%2Bletters%2F%3D%26\n" in run.stdout


def test_it_serves_until_it_is_told_to_end(collection: served.Collection) -> None:
    command = [sys.executable, "-m", "iir_dist", *arguments(collection, "--local", "--port", "0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert re.fullmatch(r"index [0-9a-f]{12}: 24 rows\n", process.stdout.readline())
        found = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+/)\n", process.stdout.readline())
        assert found
        assert Client(found[1]).search(3, k=1, exact=True)[0]["id"] == 3
        process.send_signal(signal.SIGINT)
        _, trouble = process.communicate(timeout=60)
    assert process.returncode == 0
    assert trouble == ""


def test_what_cannot_be_served_is_one_sentence(collection: served.Collection, tmp_path: Any) -> None:
    from iir_dist.serve import local

    with local.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        run = CliRunner().invoke(main, arguments(collection, "--local", "--port", port))
    assert "cannot be listened on" in run.output
    run = CliRunner().invoke(main, ["serve", str(tmp_path), "--local", "--port", "0"])
    assert "has no manifest.json" in run.output
    run = CliRunner().invoke(main, arguments(collection, "--local", "--set", "replicas=[3,1]"))
    assert "expected a number from 1" in run.output
    for host in ("256.1.1.1", "a..b"):
        with pytest.raises(InputError, match="cannot be listened on"):
            local.listen(host, 0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced(collection: served.Collection) -> None:
    """On Ray Serve: it answers as one process does, and after `kill -9` of its only replica it answers again."""
    command = [sys.executable, "-m", "iir_dist", *arguments(collection, "--port", "8127", "--set", "replicas=1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready: http://127.0.0.1:8127/\n"
            client = Client("http://127.0.0.1:8127")
            name, data = list(collection.photos.items())[5]
            before = client.search(data, k=3, exact=True)
            assert before[0]["name"] == name
            ours = psutil.Process(process.pid).children(recursive=True)
            replicas = [p for p in ours if "ServeReplica" in " ".join(p.cmdline())]
            assert len(replicas) == 1
            replicas[0].kill()
            deadline = time.monotonic() + 120
            while True:
                try:
                    assert client.search(data, k=3, exact=True) == before
                    break
                except Exception:  # whatever the proxy says meanwhile
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def test_the_application_of_a_serve_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """What KubeRay imports: keys of [serve] beside the folders, and nothing else."""
    from iir_dist.serve import deploy

    seen: list[Any] = []
    monkeypatch.setattr(deploy, "_bound", lambda *given: seen.append(given))
    monkeypatch.setenv("IIR_SERVE_TOKEN", "sixteen letters.")
    deploy.application({"index": "i", "encoder": "e", "images": ["a", "b"], "replicas": [1, 3]})
    ((index, config, images, encoder, token),) = seen
    assert (index, images, encoder, token, config.replicas) == ("i", ["a", "b"], "e", "sixteen letters.", (1, 3))
    with pytest.raises(ConfigError, match=r"serve\.replica is not a known key"):
        deploy.application({"index": "i", "replica": 2})
    with pytest.raises(ConfigError, match="have no index"):
        deploy.application({"encoder": "e"})
    for token in ("", "short"):  # an empty one would let everybody in
        monkeypatch.setenv("IIR_SERVE_TOKEN", token)
        with pytest.raises(ConfigError, match="expected at least 16"):
            deploy.application({"index": "i"})
