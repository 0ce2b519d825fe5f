"""Schedules are what they say; LARS, clipping and averaging against their formulas; groups and freezing by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from iir_dist.errors import ConfigError
from iir_dist.train.optim import LARS, Average, Optimization, build_optimizer, clip, gradient_norm, set_rate


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def test_rates() -> None:
    linear = Optimization(lr=1.0, schedule="linear")
    assert [linear.rate(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = Optimization(lr=1.0, schedule="cosine", warmup_steps=2)
    assert [round(cosine.rate(s, 6), 4) for s in range(6)] == [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]
    assert Optimization(lr=2.0, schedule="constant").rate(7, 8) == 2.0
    assert Optimization(lr=1.0, schedule="linear", final=0.5).rate(2, 4) == 0.75


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "lars"])
def test_biases_and_norms_are_not_decayed(kind: str) -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    optimizer = build_optimizer(model, Optimization.model_validate({"optimizer": kind, "weight_decay": 0.1}))
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert [tuple(p.shape) for p in plain["params"]] == [(2,), (2,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_rates_and_freezing_by_name() -> None:
    model = net()
    optimizer = build_optimizer(model, Optimization(lr=1.0, rates={"0.bias": 10.0, "1.*": 0.0}))
    set_rate(optimizer, 0.5, peak=1.0)
    assert {tuple(p.shape): g["lr"] for g in optimizer.param_groups for p in g["params"]} == {(2, 3): 0.5, (2,): 5.0}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]
    with pytest.raises(ConfigError, match=r"'3\.\*' fits no parameter; there are, for example, 0\.weight"):
        build_optimizer(net(), Optimization(rates={"3.*": 1.0}))
    with pytest.raises(ConfigError, match="freezes every parameter"):
        build_optimizer(net(), Optimization(rates={"*": 0.0}))


def test_vectors_have_a_multiplier_and_some_names_no_schedule() -> None:
    model = net()
    optimizer = build_optimizer(model, Optimization(lr=1.0, vectors=0.1, unscheduled=("0.*",)))
    set_rate(optimizer, 0.5, peak=1.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 1.0, "0.bias": 0.1, "1.weight": 0.05, "1.bias": 0.05
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"optim\.unscheduled: 'predictor\.\*' fits no parameter"):
        build_optimizer(net(), Optimization(unscheduled=("predictor.*",)))


def test_lars_is_its_formula() -> None:
    model = net()
    start = copy.deepcopy(model)
    optimizer = LARS([{"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[0].bias]}], lr=0.0)
    w, b = start[0].weight.detach().clone(), start[0].bias.detach().clone()
    v, u = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(3):
        gw, gb = torch.full_like(w, 0.3 + step), torch.full_like(b, -0.2)
        model[0].weight.grad, model[0].bias.grad = gw.clone(), gb.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.7
        optimizer.step()
        g = gw + 0.1 * w
        v = 0.9 * v + 1e-3 * w.norm() / g.norm() * g
        u = 0.9 * u + gb
        w, b = w - 0.7 * v, b - 0.7 * u
    assert torch.allclose(model[0].weight, w, atol=1e-14)
    assert torch.allclose(model[0].bias, b, atol=1e-14)
    model[0].weight.data.zero_()
    model[0].weight.grad = torch.ones_like(w)
    optimizer.step()  # a weight of zeros must be able to leave them
    assert model[0].weight.abs().min() > 0


def test_clipping_acts_on_the_whole_gradient() -> None:
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = gradient_norm(model.parameters())
    assert norm == pytest.approx(12**0.5)
    clip(model.parameters(), norm, 2.0)
    assert gradient_norm(model.parameters()) == pytest.approx(2.0)
    clip(model.parameters(), 2.0, 5.0)
    assert gradient_norm(model.parameters()) == pytest.approx(2.0)


def test_the_average_is_exponential_and_copies_counters() -> None:
    model = net()
    average = Average(model, 0.75)
    expected = model[0].weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            model[0].weight.add_(step)
            model[1].num_batches_tracked.add_(1)
        average.update(model)
        expected = 0.75 * expected + 0.25 * model[0].weight.detach()
    assert torch.allclose(average.state["0.weight"], expected, atol=1e-14)
    assert average.state["1.num_batches_tracked"] == 4
