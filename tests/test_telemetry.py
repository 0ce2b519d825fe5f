"""What a run tells: metrics that a real Ray exports, log lines that machines read, one id in all of them."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from iir_dist import artifact, telemetry
from iir_dist.progress import Progress
from iir_dist.storage import open_folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str, dict[str, str]]]:
    """What is counted, in place of Ray."""
    calls: list[tuple[str, float, str, dict[str, str]]] = []

    def count(name: str, value: float, stage: str, **tags: str) -> None:
        assert set(tags) == set(telemetry.METRICS[name][2])
        calls.append((name, value, stage, tags))

    monkeypatch.setattr(telemetry, "count", count)
    monkeypatch.setattr(artifact, "count", count)
    return calls


def sums(counted: list[tuple[str, float, str, dict[str, str]]], name: str) -> float:
    return sum(value for metric, value, _, _ in counted if metric == name)


def test_progress_counts_rows_seconds_and_what_is_under_way(counted: list[Any]) -> None:
    with Progress("embed", 10, "images", done=4) as progress:
        assert ("iir_in_flight", 1, "embed", {}) in counted
        progress.advance(3)
        progress.in_flight(5)
        progress.advance(2)
        assert progress.done == 9
    assert sums(counted, "iir_rows_total") == 5
    assert 0 < sums(counted, "iir_seconds_total") < 60
    assert [value for name, value, _, _ in counted if name == "iir_in_flight"] == [1, 5, 0]
    assert sums(counted, "iir_errors_total") == 0


def test_a_stage_that_fails_is_counted_by_its_error(counted: list[Any]) -> None:
    with pytest.raises(KeyError), Progress("index", None, "vectors"):
        raise KeyError
    assert ("iir_errors_total", 1, "index", {"kind": "KeyError"}) in counted
    assert counted[-2][:2] == ("iir_in_flight", 0)


def test_a_finished_stage_tells_its_bytes_and_what_it_refused(tmp_path: Path, counted: list[Any]) -> None:
    from iir_dist.models.encoder import EncoderConfig

    with artifact.begin(str(tmp_path / "a"), "embed", EncoderConfig(), {}) as work:
        with work.folder.publish(artifact.shard_name(0)) as file:
            file.path.write_bytes(b"x" * 123)
        artifact.commit(work.folder, 0, {artifact.shard_name(0): artifact.entry_of(file)})
        manifest = work.publish({"rows": 1, "rejected": 2}, shards=1)
    assert sums(counted, "iir_bytes_total") == 123
    assert ("iir_errors_total", 2, "embed", {"kind": "rejected"}) in counted
    counted.clear()
    work = artifact.Work(open_folder(str(tmp_path / "a")), "embed", EncoderConfig(), {})
    with work.folder.publish(artifact.shard_name(1)) as file:
        file.path.write_bytes(b"x" * 7)
    artifact.commit(work.folder, 1, {artifact.shard_name(1): artifact.entry_of(file)})
    work.amend(manifest, {"rows": 2, "rejected": 5}, {}, {})
    assert sums(counted, "iir_bytes_total") == 7, "the first file was counted before"
    assert ("iir_errors_total", 3, "embed", {"kind": "rejected"}) in counted


def test_the_run_has_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(telemetry.RUN, "")
    first = telemetry.run_id()
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", first)
    assert telemetry.run_id() == first
    monkeypatch.setenv(telemetry.RUN, "of-the-submission")
    assert telemetry.run_id() == "of-the-submission"


def test_log_lines_are_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(telemetry.RUN, "r1")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    telemetry.log_to_stderr("json", logging.INFO)
    assert telemetry.is_json()
    with Progress("embed", 10, "images", every_sec=0) as progress:
        progress.advance(3, "größe 1\n2")
    try:
        raise ValueError("no such thing")
    except ValueError:
        logging.getLogger("iir_dist.embed").exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    first, last, error = lines
    assert {line["run"] for line in lines} == {"r1"}
    assert first["message"].endswith("größe 1\n2")
    assert {key: first[key] for key in ("level", "logger", "stage", "done", "total", "unit")} == {
        "level": "info", "logger": "iir_dist.progress", "stage": "embed", "done": 3, "total": 10, "unit": "images",
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert last["message"].endswith("done")
    assert "ValueError: no such thing" in error["error"]
    telemetry.log_to_stderr("text", logging.INFO)
    assert not telemetry.is_json()
    logging.getLogger("iir_dist.embed").warning("as it is")
    assert capsys.readouterr().err == "as it is\n"


@pytest.mark.ray
def test_a_real_ray_exports_the_metrics(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv(telemetry.RUN, "run-of-this-test")
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {
        "ray_iir_rows_total": (7.0, 'unit="images"'),
        "ray_iir_in_flight": (3.0, ""),
        "ray_iir_bytes_total": (11.0, ""),
        "ray_iir_errors_total": (2.0, 'kind="rejected"'),
        "ray_iir_seconds_total": (None, ""),
    }
    assert set(wanted) == {f"ray_{name}" for name in telemetry.METRICS}
    with Progress("telemetry-test", 10, "images") as progress:
        progress.advance(7)
        progress.in_flight(3)
        telemetry.count("iir_bytes_total", 11, "telemetry-test")
        telemetry.count("iir_errors_total", 2, "telemetry-test", kind="rejected")
        deadline = time.monotonic() + 60
        found: dict[str, tuple[float, str]] = {}
        while set(found) < set(wanted) and time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://{ray.nodes()[0]['NodeManagerAddress']}:{port}/metrics") as page:
                text = page.read().decode()
            for name, labels, value in re.findall(r"^(ray_iir_\w+)\{(.*)\} (\S+)$", text, re.M):
                if 'run="run-of-this-test"' in labels and 'stage="telemetry-test"' in labels:
                    found[name] = float(value), labels
            time.sleep(0.5)
    assert set(found) == set(wanted)
    for name, (value, label) in wanted.items():
        assert label in found[name][1]
        assert found[name][0] == value if value is not None else found[name][0] > 0, name


def test_the_docs_list_every_metric() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    listed = dict(re.findall(r"^\| `ray_(iir_\w+)` \| (\w+) \|", text, re.M))
    assert listed == {name: kind.lower() for name, (kind, _, _) in telemetry.METRICS.items()}
    for name, (_, _, tags) in telemetry.METRICS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `ray_{name}` ")]
        for tag in tags:
            assert f"`{tag}`" in line
