"""Configs: merged from file and --set, checked, fingerprinted."""

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from iir_dist import config
from iir_dist.config import StageConfig
from iir_dist.errors import ConfigError


class Inner(BaseModel):
    model_config = {"extra": "forbid"}
    lr: float = 0.1


class Example(StageConfig):
    size: int = Field(224, ge=16)
    name: str = "a"
    workers: int = 1
    optim: Inner = Inner()
    execution: ClassVar[frozenset[str]] = frozenset({"workers"})


def load(*settings: str, file: Path | None = None) -> Example:
    return config.load(Example, "embed", file, settings)


def test_file_then_settings(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[embed]\nsize = 320\nname = 'b'\n[embed.optim]\nlr = 0.5\n[index]\nshards = 3\n")
    loaded = load("size=64", "optim.lr=1e-3", file=file)
    assert (loaded.size, loaded.name, loaded.optim.lr) == (64, "b", 1e-3)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["sise=3"], ["embed.sise", "size", "workers"]),
        (["optim.rate=3"], ["embed.optim.rate", "known: lr"]),
        (["size=3"], ["embed.size", "3", "16"]),
        (["size=large"], ["embed.size", "'large'"]),
        (["size"], ["key=value", "'size'"]),
        (["name.x=1", "name=2"], ["embed.name"]),
    ],
)
def test_wrong_settings_name_key_value_and_what_is_known(settings: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(*settings)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [("[embedd]\n", "embedd"), ("size = 3\n", "'size'"), ("[embed\n", "not valid TOML")],
)
def test_wrong_files(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load(file=file)
    with pytest.raises(ConfigError, match="No such file"):
        load(file=tmp_path / "none.toml")


def test_execution_keys_do_not_decide_the_output() -> None:
    assert load("workers=7").resolved() == load().resolved()
    assert load("size=64").resolved() != load().resolved()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())))
def test_fingerprint_ignores_order_and_nothing_else(value: dict[str, object]) -> None:
    turned = dict(reversed(list(value.items())))
    assert config.fingerprint(turned) == config.fingerprint(value)
    assert config.fingerprint({**value, "one more key": 1}) != config.fingerprint(value)


def test_every_stage_has_a_table() -> None:
    """The CLI's stage commands and the tables of a config file are the same set."""
    from iir_dist.cli.skin import Stage, main
    from iir_dist.cli.stages import bench, rerank

    commands = {**main.commands, **bench.commands, **rerank.commands}
    assert {name for name, command in commands.items() if isinstance(command, Stage)} == set(config.STAGES)


def test_a_table_of_several_kinds_is_explained_by_its_own_keys() -> None:
    from iir_dist.train.finetune_config import FinetuneConfig

    with pytest.raises(ConfigError, match=r"finetune\.loss\.num_bins is not a known key; known: name, temperature"):
        config.load(FinetuneConfig, "finetune", settings=["loss.name=smooth_ap", "loss.num_bins=3"])
    with pytest.raises(
        ConfigError, match=r"finetune\.batches\.size is not a known key; known: classes, name, per_class"
    ):
        config.load(FinetuneConfig, "finetune", settings=["batches.size=8"])
    with pytest.raises(ConfigError, match=r"finetune\.loss = .*'smooth'.*'smooth_ap'"):
        config.load(FinetuneConfig, "finetune", settings=["loss.name=smooth"])
    chosen = config.load(
        FinetuneConfig, "finetune", settings=["loss.name=smooth_ap", "loss.temperature=0.02", "batches.classes=8"]
    )
    assert (chosen.loss.name, chosen.loss.temperature, chosen.batches.classes) == ("smooth_ap", 0.02, 8)  # type: ignore[union-attr]
