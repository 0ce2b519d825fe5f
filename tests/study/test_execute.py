"""The order of stages, and what a failed one keeps back; stages are made up."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.study import checked, execute
from iir_dist.study.execute import Place
from iir_dist.study.plan import Node, plan


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the nodes that ran, in order; nothing else happens."""
    keys: list[str] = []
    monkeypatch.setattr(execute, "run_node", lambda node, place: keys.append(node.key))
    return keys


def test_everything_once_and_in_order(tiny: dict[str, Any], ran: list[str]) -> None:
    planned = plan(checked(tiny))
    outcome = execute.execute(planned, Place("out"))
    assert ran == [n.key for n in planned.nodes] == list(outcome.seconds)
    assert (outcome.failed, outcome.skipped) == ({}, ())


@pytest.mark.parametrize("error", [InputError("no photos"), RuntimeError("out of memory")])
def test_what_does_not_need_it_goes_on(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ran: list[str], error: Exception
) -> None:
    def run_node(node: Node, place: Place) -> None:
        if node.stage == "finetune":
            raise error
        ran.append(node.key)

    monkeypatch.setattr(execute, "run_node", run_node)
    planned = plan(checked(tiny))
    outcome = execute.execute(planned, Place("out"))
    (failed,) = outcome.failed
    assert failed.startswith("encoders/scratch-ap")
    assert str(error) in outcome.failed[failed]
    assert {key.split("/")[0] for key in outcome.skipped} == {"embeddings", "rankings", "metrics"}
    assert len(outcome.skipped) == 3
    assert len(ran) + len(outcome.failed) + len(outcome.skipped) == len(planned.nodes)
    assert set(ran) == set(outcome.seconds)
    assert any(key.startswith("metrics/") for key in ran)


def test_an_interruption_is_not_a_failed_stage(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(node: Node, place: Place) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "run_node", stop)
    with pytest.raises(KeyboardInterrupt):
        execute.execute(plan(checked(tiny)), Place("out"))


def test_several_at_a_time_need_a_cluster(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(checked(tiny))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        execute.execute(planned, Place("out"), jobs=2)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    running: list[str] = []
    most = 0

    def fake(context: Any, node: Node, place: Place) -> tuple[str | None, float]:
        nonlocal most
        import time

        running.append(node.key)
        most = max(most, len(running))
        time.sleep(0.02)
        running.remove(node.key)
        return ("broken" if node.stage == "finetune" else None), 0.02

    monkeypatch.setattr(execute, "_in_a_process", fake)
    outcome = execute.execute(planned, Place("out"), jobs=3)
    assert 1 < most <= 3
    assert len(outcome.failed) == 1
    assert len(outcome.skipped) == 3
    assert set(outcome.seconds) == {n.key for n in planned.nodes} - set(outcome.failed) - set(outcome.skipped)


@pytest.mark.slow
def test_a_node_in_a_process_of_its_own(tiny: dict[str, Any], tmp_path: Path) -> None:
    """It does what it does here; what kills its process is that node's failure."""
    context = multiprocessing.get_context("spawn")
    place = Place(str(tmp_path))
    (node,) = (n for n in plan(checked(tiny)).nodes if n.stage == "encoder")
    assert execute._in_a_process(context, node, place)[0] is None
    assert (tmp_path / node.key / "manifest.json").exists()
    other = Node("images/x", "ingest", sources={"source": "none.tar"}, config={"split": "db"})
    assert "none.tar" in str(execute._in_a_process(context, other, place)[0])


def test_the_same_weights_elsewhere_are_the_same_encoder(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Of another --data; other weights are refused."""
    from iir_dist.models.encoder import EncoderConfig, create

    tiny["starts"]["scratch"]["weights"] = "w.safetensors"
    (node,) = (n for n in plan(checked(tiny)).nodes if n.stage == "encoder")
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        network = create(EncoderConfig(backbone="resnet18", weights="random", seed=seed))
        save_file(network.trunk.net.state_dict(), tmp_path / folder / "w.safetensors")
    out = str(tmp_path / "out")
    execute.run_node(node, Place(out, str(tmp_path / "a")))
    written = (tmp_path / "out" / node.key / "manifest.json").read_bytes()
    execute.run_node(node, Place(out, str(tmp_path / "b")))
    assert (tmp_path / "out" / node.key / "manifest.json").read_bytes() == written
    with pytest.raises(MismatchError, match="weights"):
        execute.run_node(node, Place(out, str(tmp_path / "c")))


def test_where_things_are() -> None:
    place = Place("s3://b/study/", "/data")
    assert place.of("images/x-1") == "s3://b/study/images/x-1"
    assert place.source("a.tar") == "/data/a.tar"
    assert place.source("/b/a.tar") == "/b/a.tar"
    assert place.source("s3://b/a.tar") == "s3://b/a.tar"
    assert place.source("oxford5k", known=True) == "oxford5k"
