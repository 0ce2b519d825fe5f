"""From a config to its stages: shared once, in order, and said exactly."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from iir_dist.errors import ConfigError
from iir_dist.study import checked, read_config
from iir_dist.study.estimate import cost, needed
from iir_dist.study.execute import MODELS
from iir_dist.study.plan import EXECUTION, Node, Plan, plan
from iir_dist.study.stage import check, preview

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def planned(values: dict[str, Any]) -> Plan:
    return plan(checked(values))


def by_stage(nodes: Plan, stage: str) -> list[Node]:
    return [node for node in nodes.nodes if node.stage == stage]


def test_what_is_shared_runs_once(tiny: dict[str, Any]) -> None:
    found = planned(tiny)
    assert Counter(n.stage for n in found.nodes) == {
        "ingest": 2, "encoder": 1, "embed": 2, "search": 2, "evaluate": 2, "overlap": 1, "finetune": 1,
    }  # fmt: skip
    done: set[str] = set()
    for node in found.nodes:
        assert done.issuperset(node.needs), f"{node.key} stands before what it needs"
        done.add(node.key)
    # A second arm with the same fine-tuning shares all but the network it starts from.
    tiny["arms"] |= {"CLS-FT": {"start": "scratch", "pretraining": "classifier", "finetuning": "ap"}}
    more = planned(tiny)
    assert {n.key for n in found.nodes} < {n.key for n in more.nodes}
    first, second = by_stage(more, "finetune")
    assert first.config == second.config  # the same batches, loss and budget
    assert first.inputs["images"] == second.inputs["images"]
    assert first.inputs["init"] != second.inputs["init"]


def test_seeds_repeat_only_what_is_random(tiny: dict[str, Any]) -> None:
    tiny["seeds"] = [0, 1, 2]
    tiny["starts"]["scratch"]["weights"] = "imagenet"
    found = planned(tiny)
    assert len(by_stage(found, "encoder")) == 1
    assert [n.config["seed"] for n in by_stage(found, "finetune")] == [0, 1, 2]
    assert len(by_stage(found, "evaluate")) == 4
    assert len(found.of("arm")) == 6  # three times the same one, of the arm that is not trained
    tiny["starts"]["scratch"]["weights"] = "random"
    assert [n.config["seed"] for n in by_stage(planned(tiny), "encoder")] == [0, 1, 2]


def test_a_change_makes_anew_only_what_depends_on_it(tiny: dict[str, Any]) -> None:
    before = {n.key for n in planned(tiny).nodes}
    tiny["title"] = "Another"
    assert {n.key for n in planned(tiny).nodes} == before
    tiny["trainings"]["ap"]["settings"]["steps"] = 3
    gone = before - {n.key for n in planned(tiny).nodes}
    assert {key.split("/")[0] for key in gone} == {"encoders", "embeddings", "rankings", "metrics"}
    assert len(gone) == 4


def test_how_a_stage_is_run_does_not_make_it_another_one(tiny: dict[str, Any]) -> None:
    before = {n.key for n in planned(tiny).nodes}
    tiny["trainings"]["ap"]["settings"] |= {"workers": 2, "checkpoint_every": 1}
    tiny["embed"] = {"workers": 2}
    assert {n.key for n in planned(tiny).nodes} == before
    assert by_stage(planned(tiny), "finetune")[0].config["workers"] == 2
    for stage, keys in EXECUTION.items():
        module, _, name = MODELS[stage].partition(":")
        assert keys == getattr(importlib.import_module(module), name).execution, stage


def test_the_training_is_shared_by_all_ways_to_read_it(tiny: dict[str, Any]) -> None:
    tiny["whitening_photos"] = "train"
    tiny["ablations"] = [
        {"axis": "size", "values": [64, 96], "arms": ["FT"]},
        {"axis": "whitening", "values": [{"method": "pca", "dim": 8}, {"method": "lw", "dim": 8}], "arms": ["FT"]},
    ]
    found = planned(tiny)
    assert len(by_stage(found, "finetune")) == 1
    (reading,) = by_stage(found, "reading")
    assert reading.config == {"size": 96}
    pca, lw = by_stage(found, "whiten")
    assert ("images" in pca.inputs, "images" in lw.inputs) == (False, True)
    assert pca.inputs["embeddings"] == lw.inputs["embeddings"]
    sizes = [(m.value, m.metrics) for m in found.of("ablation") if m.axis == "size"]
    assert [value for value, _ in sizes] == [64, 96]  # the arm's own is the arm's evaluation, and not made again
    assert sizes[0][1] in {m.metrics for m in found.of("arm")}


def test_trainings_are_changed_at_one_place(tiny: dict[str, Any]) -> None:
    tiny["ablations"] = [
        {"axis": "finetuning.settings.batches.per_class", "values": [3], "arms": ["FT"]},
        {"axis": "finetuning.labels", "values": [0.5], "arms": ["FT"]},
    ]
    own, larger, fewer = by_stage(planned(tiny), "finetune")
    assert larger.config == {**own.config, "batches": {**own.config["batches"], "per_class": 3}}
    assert fewer.config == own.config
    assert fewer.inputs["images"] != own.inputs["images"]
    assert fewer.inputs["overlap"] == own.inputs["overlap"]  # of the whole set
    (subset,) = by_stage(planned(tiny), "subset")
    assert (subset.photos, subset.config) == (15, {"fraction": 0.5})


def test_distractors_exact_and_by_an_index(tiny: dict[str, Any]) -> None:
    tiny["seeds"], tiny["distractors"] = [0, 1], ["distractors"]
    found = planned(tiny)
    assert {(m.name, m.seed, m.search) for m in found.of("distractors")} == {
        (name, 0, search) for name in ("OTS", "FT") for search in ("exact", "index")
    }
    exact = [n for n in by_stage(found, "search") if len(n.inputs["database"]) == 2]
    assert [n.inputs["embeddings"] for n in by_stage(found, "index")] == [n.inputs["database"] for n in exact]


# ------------------------------------------------------------------------------------------------ the configs that come with it


@pytest.mark.parametrize("name", ["study_cpu", "study_paper"])
def test_the_dry_run_names_every_stage_input_and_download(name: str) -> None:
    config = read_config(CONFIGS / f"{name}.toml")
    found, text = plan(config), preview(config)
    assert check(found) == []  # every setting of every stage is one
    assert "cost not known" not in text
    for node in found.nodes:
        assert f"{node.stage:<9} {node.key}\n" in text
        for key in (*node.needs, *node.sources.values()):
            assert key in text
    assert all(item.address in text for item in needed(config))
    assert all(cost(node, config.machine).seconds is not None for node in found.nodes)


def test_the_paper_needs_what_its_publishers_have() -> None:
    addresses = {item.address.split("/")[2]: item for item in needed(read_config(CONFIGS / "study_paper.toml"))}
    assert set(addresses) == {
        "www.robots.ox.ac.uk", "cmp.felk.cvut.cz", "ptak.felk.cvut.cz", "download.pytorch.org", "dl.fbaipublicfiles.com"
    }  # fmt: skip
    found = needed(read_config(CONFIGS / "study_paper.toml"))
    assert len({item.address for item in found}) == len(found) == 17


def test_the_paper_asks_its_questions_of_every_contrastive_method() -> None:
    config = read_config(CONFIGS / "study_paper.toml")
    found = plan(config)
    assert len(config.arms) == 14
    assert len(found.of("arm")) == 14 * 4 * 3  # arms, tests, seeds
    # Published networks are read once, whatever the seeds: 6 of them; 7 fine-tunings and a pretraining for each of 3.
    base = [n for n in by_stage(found, "finetune") if n.config["batches"]["size"] == 4096 and n.config["steps"] == 200]
    own = [n for n in base if n.config["loss"]["name"] == "quantized_ap" and "sfm120k-0" not in n.inputs["images"][0]]
    assert len(own) == 7 * 3
    assert len(by_stage(found, "pretrain")) == 3
    assert len(by_stage(found, "encoder")) == 6 + 2 * 3  # and three other poolings of two of them


def test_the_cpu_study_fits_its_time() -> None:
    """By the estimate, which is for an empty machine."""
    for fast, minutes in ((False, 100), (True, 12)):
        config = read_config(CONFIGS / "study_cpu.toml", fast=fast)
        assert sum(cost(n, "cpu").seconds or 0 for n in plan(config).nodes) < 60 * minutes


def test_the_dry_run_needs_no_torch_and_no_ray() -> None:
    script = f"""
import sys
for name in ("torch", "ray", "faiss"):
    sys.modules[name] = None
from iir_dist.cli import main
main(["study", "--config", {str(CONFIGS / "study_cpu.toml")!r}, "--fast", "--dry-run"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "finetune  encoders/imagenet-ap-s0-" in done.stdout
    assert "settings of encoder" in done.stdout
    assert "not checked" in done.stdout


def test_a_wrong_setting_of_a_stage_is_found_before_anything_runs(tiny: dict[str, Any]) -> None:
    tiny["trainings"]["ap"]["settings"]["chunks"] = 3
    with pytest.raises(ConfigError, match=r"encoders/scratch-ap-s0-\w+: finetune.chunks is not a known key"):
        preview(checked(tiny))
