"""Losses by name: what a config accepts, and what is built of it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

from iir_dist import config
from iir_dist.config import StageConfig
from iir_dist.errors import ConfigError
from iir_dist.losses.classification import ArcFace
from iir_dist.losses.margin import Contrastive
from iir_dist.losses.pairwise import Pairwise
from iir_dist.losses.ranking import SupAP
from iir_dist.train.objectives import LossConfig, QuantizedAPConfig, SmoothAPConfig, build

CLASSES = get_args(get_args(LossConfig)[0])


class Training(StageConfig):
    """Stands for the stage that holds a loss."""

    loss: LossConfig = QuantizedAPConfig()
    steps: int = Field(1, ge=1)


def loaded(*settings: str) -> Training:
    return config.load(Training, "finetune", None, settings)


def test_chosen_by_name() -> None:
    assert loaded("loss.name=smooth_ap", "loss.temperature=0.02").loss == SmoothAPConfig(temperature=0.02)
    assert loaded("loss.name=recall_at_k", "loss.ks=[1, 4]").loss.ks == (1, 4)  # type: ignore[union-attr]
    assert loaded().loss == QuantizedAPConfig()


def test_without_a_name_it_is_the_papers() -> None:
    assert loaded("loss.num_bins=25", "loss.low=0").loss == QuantizedAPConfig(num_bins=25, low=0.0)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_loss_survives_json_and_gives_a_gradient(kind: type[QuantizedAPConfig]) -> None:
    name = kind.model_fields["name"].default
    chosen = loaded(f"loss.name={name}")
    assert type(chosen.loss) is kind
    assert Training.model_validate_json(chosen.model_dump_json()) == chosen
    assert set(chosen.resolved()["loss"]) == set(kind.model_fields)
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    value, gradient = build(chosen.loss, 4, 5, seed=0)(z, torch.arange(12) % 4, z[:3], torch.arange(3))
    assert value > 0
    assert gradient.shape == (12, 5)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [["loss.name=best_ap"], ["loss.name=smooth_ap", "loss.num_bins=20"], ["loss.temperature=0.1"],
     ["loss.name=sup_ap", "loss.calibration=2"], ["loss.low=1"], ["loss=smooth_ap"]],
)  # fmt: skip
def test_wrong_settings(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="loss"):
        loaded(*settings)


def test_calibration_is_a_weighted_sum() -> None:
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(12) % 4
    settings = ("loss.name=sup_ap", "loss.calibration=0.1", "loss.negative_margin=0.2", "loss.rho=50")
    value, gradient = build(loaded(*settings).loss, 4, 5, 0)(z, labels)
    ap, margins = Pairwise(SupAP(rho=50))(z, labels), Contrastive(negative_margin=0.2)(z, labels)
    assert value == pytest.approx(0.9 * ap[0] + 0.1 * margins[0])
    assert torch.allclose(gradient, 0.9 * ap[1] + 0.1 * margins[1])


def test_what_arcface_learns_comes_from_the_seed() -> None:
    chosen = loaded("loss.name=arcface", "loss.margin=0.5").loss
    heads = [build(chosen, 7, 5, seed) for seed in (0, 0, 1)]
    assert all(isinstance(head, ArcFace) and head.margin == 0.5 for head in heads)
    first, again, other = (head.weight for head in heads)  # type: ignore[attr-defined]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
