"""The arithmetic of `iir plan`, against hand calculations and against what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from iir_dist import sizing
from iir_dist.cli import main
from iir_dist.errors import ConfigError
from iir_dist.index.plan import IndexConfig, plan
from iir_dist.sizing import Sizing, size

DOC = Path(__file__).parents[1] / "docs" / "scaling.md"


def need(answer: sizing.Answer, stage: str) -> sizing.Need:
    return next(n for n in answer.needs if n.stage == stage)


def test_a_million_on_one_gpu_by_hand() -> None:
    answer = size(Sizing(images=1_000_000, gpus=1, cores=16, gpu_hour=4.0, cpu_hour=0.8))
    # 1,000,000 x 1.75 scales / 844 images/s of one scale; 302 photos/s a core, 16 cores beside the GPU decode 2.8 times as fast.
    embed = need(answer, "embed")
    assert embed.hours == pytest.approx(1e6 * 1.75 / 844 / 3600)
    assert embed.bottleneck == "network"
    assert embed.money == pytest.approx(embed.hours * 4.0)
    ingest = need(answer, "ingest")
    assert ingest.hours == pytest.approx(1e6 / 302 / 0.87 / 16 / 3600)
    assert ingest.money == pytest.approx(ingest.hours * 0.8)
    assert answer.terabytes["images"] == pytest.approx(0.168)
    assert answer.limits == ()
    assert answer.search_machines == 1


def test_the_bar_of_twenty_one_minutes() -> None:
    """A million distractors at three scales on one H100, compiled, if decoding keeps up; it does."""
    embed = need(size(Sizing(images=1_000_000, gpus=1, compiled=True)), "embed")
    assert embed.hours * 60 == pytest.approx(21, abs=0.2)
    assert embed.bottleneck == "network"


def test_small_pictures_are_bound_by_decoding() -> None:
    assert need(size(Sizing(images=10**6, gpus=1, scales=0.1)), "embed").bottleneck == "decoding"


def test_measured_builds_are_within_a_factor_of_two() -> None:
    """Two cores: 1,000,000 x 256 in 18.6 s; 45,000 vectors/s of 512 dimensions into 1,024 lists."""
    todo = plan(1_000_000, 256, IndexConfig())
    seconds = sizing.train_sec(todo, 256, 2) + 1e6 * sizing.fill_sec(256, todo.nlist) / 2
    assert 0.5 < seconds / 18.6 < 2
    assert 0.5 < 2 / sizing.fill_sec(512, 1024) / 45_000 < 2


def test_needs_follow_from_the_machines() -> None:
    one, ten = (size(Sizing(images=10**8, gpus=g, cores=16 * g)) for g in (1, 10))
    for stage in ("ingest", "pretrain", "finetune", "embed"):
        assert need(one, stage).hours == pytest.approx(10 * need(ten, stage).hours)
    assert need(one, "index").hours > need(ten, "index").hours
    assert need(one, "embed").money is None


def test_search_is_sized_for_memory_and_for_speed() -> None:
    todo = plan(10**9, 512, IndexConfig())
    small = sizing.search_machines(Sizing(images=10**9, qps=0.001, memory_gb=64), todo)
    assert small == -(-todo.search_bytes // int(64e9 * 0.8))
    busy = sizing.search_machines(Sizing(images=10**9, qps=10_000, memory_gb=1e6), todo)
    assert busy == pytest.approx(10_000 * todo.latency_ms / 1000 / 16 / 0.7, abs=1)


def test_ten_billion_meets_every_limit_but_the_driver() -> None:
    limits = " ".join(size(Sizing(images=10**10, gpus=64, cores=1024)).limits)
    for word in ("manifest", "training the index", "ids and names", "codes"):
        assert word in limits
    assert "one driver" not in limits
    assert "one driver" in " ".join(size(Sizing(images=10**10, gpus=512)).limits)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="0, 8, 128"):
        size(Sizing(images=0))
    result = CliRunner().invoke(main, ["plan", "--images", "1.5"])
    assert result.exit_code == 2
    assert "not a whole number" in result.output


def commands() -> list[tuple[str, str]]:
    """Each command of the document with the output that stands below it."""
    return re.findall(r"```\niir (plan [^\n]*)\n```\n\n```\n(.*?)```", DOC.read_text(), re.S)


@pytest.mark.parametrize(("command", "output"), commands(), ids=[c.split()[2] for c, _ in commands()])
def test_the_document_shows_what_the_program_says(command: str, output: str) -> None:
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 0
    assert result.output == output


def test_the_document_covers_three_sizes() -> None:
    assert [command.split()[2] for command, _ in commands()] == ["1e6", "1e8", "1e10"]
