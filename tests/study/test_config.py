"""What a study is, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from iir_dist.errors import ConfigError
from iir_dist.study import StudyConfig, checked, read_config


def study(values: dict[str, Any]) -> StudyConfig:
    return checked(values)


def refused(values: dict[str, Any], *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        study(values)
    for part in parts:
        assert part in str(error.value)


def test_arms_that_differ_in_a_controlled_variable_are_refused(tiny: dict[str, Any]) -> None:
    tiny["whitening_photos"] = "train"
    tiny["arms"]["FT"]["settings"] = {"whitening": {"method": "pca", "dim": 8}}
    refused(tiny, "arms OTS and FT differ in whitening", "'pca'", "[study.settings]", "axes")
    # Declared, it may be compared, but not together with something else.
    tiny["axes"] = ["finetuning", "whitening"]
    refused(tiny, "H2 compares FT with OTS by finetuning, but they also differ in whitening")
    tiny["hypotheses"] = []
    study(tiny)
    tiny["arms"]["WHITE"] = {"start": "scratch", "settings": {"whitening": {"method": "pca", "dim": 8}}}
    tiny["hypotheses"] = [{"name": "W", "a": "WHITE", "b": "OTS", "axis": "whitening"}]
    study(tiny)


def test_another_backbone_is_a_controlled_variable_too(tiny: dict[str, Any]) -> None:
    tiny["starts"]["other"] = {"backbone": "resnet34", "weights": "random"}
    tiny["arms"]["OTHER"] = {"start": "other"}
    refused(tiny, "OTS and OTHER differ in backbone ('resnet18' and 'resnet34')")


def test_a_question_must_ask_something(tiny: dict[str, Any]) -> None:
    tiny["hypotheses"][0]["axis"] = "pretraining"
    refused(tiny, "they also differ in finetuning")
    tiny["hypotheses"] = [{"name": "H", "a": "OTS", "b": "OTS", "axis": "pretraining"}]
    refused(tiny, "H: OTS and OTS do not differ in pretraining")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda v: v["arms"]["FT"].update(finetuning="pa"), ["arms.FT.finetuning", "'pa'", "known: ap, classifier"]),
        (lambda v: v["arms"]["FT"].update(start="none"), ["'none'", "known: scratch"]),
        (lambda v: v.update(tests=["train"]), ["photos.train has no groundtruth"]),
        (lambda v: v.update(tests=[]), ["needs arms and tests"]),
        (lambda v: v["trainings"]["ap"]["settings"].update(seed=3), ["study.seeds"]),
        (lambda v: v["trainings"]["ap"].update(photos=["x"]), ["trainings.ap", "'x'", "known: benchmark, train"]),
        (lambda v: v.update(ablations=[{"axis": "colour", "values": [1], "arms": ["FT"]}]), ["'colour'", "pooling"]),
        (
            lambda v: v.update(ablations=[{"axis": "finetuning.settings.optim.lr", "values": [1], "arms": ["FT"]}]),
            ["trainings.ap does not set settings.optim.lr"],
        ),
        (
            lambda v: v.update(ablations=[{"axis": "finetuning.labels", "values": [0.5], "arms": ["OTS"]}]),
            ["an arm that has no finetuning"],
        ),
        (lambda v: v["settings"].update(whitening={"method": "pca"}), ["needs whitening_photos"]),
        (lambda v: v["settings"].update(sise=3), ["study.settings.sise is not a known key", "size"]),
        (lambda v: v.update(leaderboard=[{"name": "FT", "arm": "FT"}]), ["has the name of another one"]),
        (
            lambda v: v.update(leaderboard=[{"name": "x", "arm": "FT", "rerank": {"name": "embed"}}]),
            ["entry 'x' re-ranks by 'embed'", "known: qe, dba"],
        ),
        (lambda v: v.update(whitening_photos="benchmark"), ["whitening_photos = 'benchmark' is a test"]),
        (
            lambda v: v.update(ablations=[{"axis": "finetuning.photos", "values": [["x"]], "arms": ["FT"]}]),
            ["ablation of finetuning.photos", "known below finetuning: labels, settings"],
        ),
    ],
)
def test_what_else_is_refused(tiny: dict[str, Any], change: Any, parts: list[str]) -> None:
    change(tiny)
    refused(tiny, *parts)


def test_fast_is_a_table_on_top(tiny: dict[str, Any], write_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"no table \[study.fast\]"):
        read_config(write_config(tiny), fast=True)
    tiny["seeds"], tiny["fast"] = [0, 1], {"seeds": [0], "trainings": {"ap": {"settings": {"steps": 1}}}}
    path = write_config(tiny)
    assert read_config(path).seeds == (0, 1)
    fast = read_config(path, fast=True)
    assert fast.seeds == (0,)
    assert fast.trainings["ap"].settings == {**tiny["trainings"]["ap"]["settings"], "steps": 1}
    assert read_config(path, ["settings.size=96"], fast=True).settings.size == 96


def test_a_file_without_a_study(tmp_path: Any) -> None:
    (tmp_path / "c.toml").write_text("[embed]\n")
    with pytest.raises(ConfigError, match=r"no table \[study\]"):
        read_config(tmp_path / "c.toml")
