"""Losses in float64 against slow transcriptions of their papers, value and gradient, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iir_dist.losses.average_precision import QuantizedAP
from iir_dist.losses.contrastive import NTXent
from iir_dist.losses.pairwise import RowLoss, batch_average_precision, loss_and_gradient


def batch(size: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(size, dim, dtype=torch.float64, generator=generator), dim=1)
    return z, torch.randint(classes, (size,), generator=generator)


def slow_quantized_ap(z: Tensor, labels: Tensor, num_bins: int, low: float, high: float) -> Tensor:
    """arXiv:1906.07589, equations 7-13, a query, a bin and an item at a time; ends of the range count fully."""
    step = (high - low) / (num_bins - 1)
    centres = [high - step * m for m in range(num_bins)]
    losses = []
    for q in range(len(z)):
        others = [i for i in range(len(z)) if i != q]
        positives = [i for i in others if labels[i] == labels[q]]
        if not positives:
            continue
        count = [z.new_zeros(()) for _ in range(num_bins)]
        positive_count = [z.new_zeros(()) for _ in range(num_bins)]
        for i in others:
            s = z[q] @ z[i]
            for m, b in enumerate(centres):
                if (m == 0 and s > b) or (m == num_bins - 1 and s < b):
                    weight = z.new_ones(())
                else:
                    weight = torch.clamp(1 - torch.abs(s - b) / step, min=0)
                count[m] = count[m] + weight
                if i in positives:
                    positive_count[m] = positive_count[m] + weight
        ap = z.new_zeros(())
        for m in range(num_bins):
            total = sum(count[: m + 1])
            if total > 0:
                ap = ap + sum(positive_count[: m + 1]) / total * positive_count[m] / len(positives)
        losses.append(1 - ap)
    return torch.stack(losses).mean()


def slow_ntxent(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """arXiv:2002.05709, equation 1, a row at a time."""
    losses = []
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        if positives:
            partition = sum(torch.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i)
            losses.append(sum(torch.log(partition) - z[i] @ z[j] / temperature for j in positives) / len(positives))
    return torch.stack(losses).mean()


def compare(loss: RowLoss, slow: Tensor, z: Tensor, leaf: Tensor, labels: Tensor, chunk: int) -> None:
    value, gradient = loss_and_gradient(loss, z, labels, chunk)
    (expected,) = torch.autograd.grad(slow, leaf)
    assert value == pytest.approx(float(slow.detach()), abs=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12, rtol=1e-9)


@settings(max_examples=12)
@given(
    size=st.integers(3, 14), classes=st.integers(1, 6), bins=st.sampled_from([(20, -1.0, 1.0), (25, 0.0, 1.0), (2, -0.3, 0.3)]),
    chunk=st.integers(1, 20), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_quantized_ap(size: int, classes: int, bins: tuple[int, float, float], chunk: int, seed: int) -> None:
    z, labels = batch(size, 5, classes, seed)
    leaf = z.clone().requires_grad_()
    if all((labels == label).sum() < 2 for label in labels):
        assert loss_and_gradient(QuantizedAP(*bins), z, labels, chunk)[0] == 0.0
        return
    compare(QuantizedAP(*bins), slow_quantized_ap(leaf, labels, *bins), z, leaf, labels, chunk)


@settings(max_examples=12)
@given(
    size=st.integers(2, 7),
    temperature=st.sampled_from([0.1, 0.5]),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_ntxent(size: int, temperature: float, chunk: int, seed: int) -> None:
    z, _ = batch(2 * size, 5, 1, seed)
    labels = torch.arange(size).repeat(2)
    leaf = z.clone().requires_grad_()
    compare(NTXent(temperature), slow_ntxent(leaf, labels, temperature), z, leaf, labels, chunk)


def test_ntxent_with_several_positives_and_a_lonely_row() -> None:
    z, _ = batch(6, 5, 1, 0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    leaf = z.clone().requires_grad_()
    compare(NTXent(0.2), slow_ntxent(leaf, labels, 0.2), z, leaf, labels, 4)


@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_ntxent_of_identical_vectors(n: int) -> None:
    z = F.normalize(torch.ones(2 * n, 3, dtype=torch.float64), dim=1)
    value, gradient = loss_and_gradient(NTXent(0.1), z, torch.arange(n).repeat(2))
    assert value == pytest.approx(math.log(2 * n - 1), abs=1e-12)
    assert torch.isfinite(gradient).all()


def test_quantized_ap_is_below_the_exact_ap_the_less_the_more_bins() -> None:
    z, labels = batch(60, 6, 6, 3)
    exact = batch_average_precision(z, labels)
    gaps = [exact - (1 - loss_and_gradient(QuantizedAP(m), z, labels)[0]) for m in (10, 100, 20_000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.01


def test_quantized_ap_of_a_perfect_batch_is_zero() -> None:
    z = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    assert loss_and_gradient(QuantizedAP(21), z, torch.arange(3).repeat(2))[0] == pytest.approx(0, abs=1e-12)


def test_order_of_the_batch_does_not_matter() -> None:
    z, labels = batch(20, 4, 5, 1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    value, gradient = loss_and_gradient(QuantizedAP(), z, labels)
    permuted, permuted_gradient = loss_and_gradient(QuantizedAP(), z[order], labels[order])
    assert permuted == pytest.approx(value, abs=1e-14)
    assert torch.allclose(permuted_gradient, gradient[order], atol=1e-14)


def test_descending_the_gradient_raises_the_exact_ap() -> None:
    z, labels = batch(40, 8, 4, 2)
    before = batch_average_precision(z, labels)
    for _ in range(50):
        z = F.normalize(z - 5.0 * loss_and_gradient(QuantizedAP(), z, labels)[1], dim=1)
    assert batch_average_precision(z, labels) > before + 0.2


def test_a_batch_without_positives_gives_zero_and_no_nan() -> None:
    z, _ = batch(4, 3, 1, 0)
    for loss in (QuantizedAP(), NTXent()):
        value, gradient = loss_and_gradient(loss, z, torch.arange(4))
        assert value == 0.0
        assert torch.equal(gradient, torch.zeros_like(z))


def test_loss_is_not_computed_in_half_precision() -> None:
    z, labels = batch(30, 6, 3, 5)
    plain = loss_and_gradient(QuantizedAP(), z.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_and_gradient(QuantizedAP(), z.float(), labels)
    assert inside[0] == plain[0]
    assert torch.equal(inside[1], plain[1])


def test_exact_ap_of_a_batch() -> None:
    """Agrees with the metric on the ranked lists of each row."""
    from iir_dist.metrics import exact_average_precision

    z, labels = batch(25, 4, 6, 9)
    values = []
    for q in range(len(z)):
        order = [i for i in torch.argsort(z @ z[q], descending=True, stable=True).tolist() if i != q]
        ranks = np.array([r for r, i in enumerate(order) if labels[i] == labels[q]], dtype=np.int64)
        if len(ranks):
            values.append(exact_average_precision(ranks, len(ranks)))
    assert batch_average_precision(z, labels, chunk=7) == pytest.approx(float(np.mean(values)), abs=1e-12)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="num_bins"):
        QuantizedAP(1)
    with pytest.raises(ValueError, match="low < high"):
        QuantizedAP(20, 1.0, -1.0)
    with pytest.raises(ValueError, match="temperature"):
        NTXent(0.0)
