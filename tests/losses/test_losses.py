"""Losses in float64 against slow transcriptions of their papers, value and gradient, and against closed forms.

The transcriptions go query by query and item by item on the similarities of all vectors to the queries; columns behind
the batch are the memory. Their gradient is autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iir_dist.losses.average_precision import FastAP, QuantizedAP, TieAwareAP
from iir_dist.losses.classification import ArcFace
from iir_dist.losses.contrastive import NTXent
from iir_dist.losses.margin import Contrastive, EuclideanContrastive, MultiSimilarity, Triplet
from iir_dist.losses.pairwise import (
    Objective,
    Pairwise,
    RowLoss,
    Similarities,
    WeightedSum,
    batch_average_precision,
    loss_and_gradient,
    num_queries,
)
from iir_dist.losses.ranking import RecallAtK, SmoothAP, SupAP

Row = tuple[Tensor, list[int], list[int]]
"""Similarities of a query to all columns, its positives, its negatives."""


def batch(size: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(size, dim, dtype=torch.float64, generator=generator), dim=1)
    return z, torch.randint(classes, (size,), generator=generator)


def queries(z: Tensor, labels: Tensor, columns: Tensor, column_labels: Tensor) -> list[Row]:
    """Rows of z that have a positive among the columns, of which the first are z itself."""
    rows = []
    for q in range(len(z)):
        others = [i for i in range(len(columns)) if i != q]
        positives = [i for i in others if labels[q] >= 0 and column_labels[i] == labels[q]]
        if positives:
            rows.append((columns @ z[q], positives, [i for i in others if i not in positives]))
    return rows


def soft_counts(distances: Tensor, items: list[int], centres: list[float], clip: bool) -> list[Tensor]:
    """Triangular kernels around rising centres; with `clip` what is beyond the ends counts fully."""
    step, d = centres[1] - centres[0], distances[items]
    counts = []
    for m, b in enumerate(centres):
        weight = torch.clamp(1 - torch.abs(d - b) / step, min=0)
        if clip and m == 0:
            weight = torch.where(d < b, 1.0, weight)
        if clip and m == len(centres) - 1:
            weight = torch.where(d > b, 1.0, weight)
        counts.append(weight.sum())
    return counts


def slow_quantized_ap(num_bins: int, low: float, high: float) -> Callable[[Row], Tensor]:
    """arXiv:1906.07589, equations 7-13, on -s, which rises along the ranking."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        centres = [-high + m * (high - low) / (num_bins - 1) for m in range(num_bins)]
        c = soft_counts(-s, positives + negatives, centres, clip=True)
        p = soft_counts(-s, positives, centres, clip=True)
        ap, total, total_positive = s.new_zeros(()), s.new_zeros(()), s.new_zeros(())
        for c_m, p_m in zip(c, p, strict=True):
            total, total_positive = total + c_m, total_positive + p_m
            if p_m > 0:
                ap = ap + total_positive / total * p_m / len(positives)
        return 1 - ap

    return one


def slow_tie_aware_ap(num_bins: int, low: float, high: float, simplified: bool) -> Callable[[Row], Tensor]:
    """TAPLoss of the released code, bin by bin."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        centres = [-high + m * (high - low) / (num_bins - 1) for m in range(num_bins)]
        c = soft_counts(-s, positives + negatives, centres, clip=True)
        p = soft_counts(-s, positives, centres, clip=True)
        ap, before, positive_before = s.new_zeros(()), s.new_zeros(()), s.new_zeros(())
        for c_m, p_m in zip(c, p, strict=True):
            after, positive_after = before + c_m, positive_before + p_m
            if simplified:
                ap = ap + p_m * (positive_before + positive_after + 1) / (before + after + 1) / len(positives)
            else:
                ratio = torch.clamp(p_m - 1, min=0) / (torch.clamp(c_m - 1, min=0) + 1e-8)
                log = torch.log((after + 1) / (before + 1))
                ties = c_m * ratio + (positive_before + 1 - ratio * (before + 1)) * log
                ap = ap + p_m * ties / (c_m + 1e-8) / len(positives)
            before, positive_before = after, positive_after
        return 1 - ap

    return one


def slow_fast_ap(num_bins: int) -> Callable[[Row], Tensor]:
    """CVPR 2019, on squared distances with num_bins + 1 centres."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        centres = [4 * j / num_bins for j in range(num_bins + 1)]
        h_positive = soft_counts(2 - 2 * s, positives, centres, clip=False)
        h_negative = soft_counts(2 - 2 * s, negatives, centres, clip=False)
        ap, total, total_positive = s.new_zeros(()), s.new_zeros(()), s.new_zeros(())
        for p, n in zip(h_positive, h_negative, strict=True):
            total, total_positive = total + p + n, total_positive + p
            if total > 0:
                ap = ap + p * total_positive / total / len(positives)
        return 1 - ap

    return one


def slow_smooth_ap(temperature: float) -> Callable[[Row], Tensor]:
    """arXiv:2007.12163."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        ap = s.new_zeros(())
        for p in positives:
            among = 1 + sum(torch.sigmoid((s[j] - s[p]) / temperature) for j in positives if j != p)
            below = sum((torch.sigmoid((s[j] - s[p]) / temperature) for j in negatives), s.new_zeros(()))
            ap = ap + among / (among + below) / len(positives)
        return 1 - ap

    return one


def slow_sup_ap(temperature: float, rho: float, delta: float, offset: float) -> Callable[[Row], Tensor]:
    """arXiv:2110.01445 with the step of the released code."""

    def step(x: Tensor) -> Tensor:
        if x > delta:
            return rho * (x - delta) + offset
        return torch.sigmoid(x / temperature) + (0.5 if x > 0 else 0.0)

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        ap = s.new_zeros(())
        for p in positives:
            among = 1 + sum(float(s[j] >= s[p]) for j in positives if j != p)
            ap = ap + among / (among + sum(step(s[j] - s[p]) for j in negatives)) / len(positives)
        return 1 - ap

    return one


def slow_recall(ks: tuple[int, ...], temperature: float, k_temperature: float) -> Callable[[Row], Tensor]:
    """arXiv:2108.11179."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        ranks = [
            1 + sum(torch.sigmoid((s[j] - s[p]) / temperature) for j in positives + negatives if j != p)
            for p in positives
        ]
        total = s.new_zeros(())
        for k in ks:
            found = sum(torch.sigmoid((k - rank) / k_temperature) for rank in ranks)
            total = total + torch.clamp(torch.as_tensor(found), max=k) / min(k, len(positives))
        return 1 - total / len(ks)

    return one


def slow_ntxent(temperature: float) -> Callable[[Row], Tensor]:
    """arXiv:2002.05709, equation 1."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        partition = sum(torch.exp(s[k] / temperature) for k in positives + negatives)
        return sum(torch.log(torch.as_tensor(partition)) - s[j] / temperature for j in positives) / len(positives)

    return one


def slow_triplet(margin: float, mining: str) -> Callable[[Row], Tensor]:
    """arXiv:1703.07737 and arXiv:1503.03832, on cosines."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        chosen = [min(positives, key=lambda i: s[i].item())] if mining == "hard" else positives
        total = s.new_zeros(())
        for p in chosen:
            able = [n for n in negatives if mining == "hard" or s[n] < s[p]]
            if able:
                n = max(able, key=lambda i: s[i].item())
                total = total + torch.clamp(margin - s[p] + s[n], min=0)
        return total / len(chosen)

    return one


def slow_multi_similarity(alpha: float, beta: float, base: float, epsilon: float) -> Callable[[Row], Tensor]:
    """arXiv:1904.06627, mining and loss."""

    def one(row: Row) -> Tensor:
        s, positives, negatives = row
        least = min(s[p].item() for p in positives)
        most = max((s[n].item() for n in negatives), default=-math.inf)
        pull = sum(torch.exp(-alpha * (s[p] - base)) for p in positives if s[p] < most + epsilon)
        push = sum(torch.exp(beta * (s[n] - base)) for n in negatives if s[n] > least - epsilon)
        return torch.log(1 + torch.as_tensor(pull)) / alpha + torch.log(1 + torch.as_tensor(push)) / beta

    return one


def mean_of(one: Callable[[Row], Tensor]) -> Callable[[list[Row]], Tensor]:
    return lambda rows: torch.stack([one(row) for row in rows]).mean()


def active_mean(pull: Callable[[Tensor], Tensor], push: Callable[[Tensor], Tensor]) -> Callable[[list[Row]], Tensor]:
    """Pairs of all queries; those at 0 are left out of the mean."""

    def all_rows(rows: list[Row]) -> Tensor:
        pulls = [pull(s[p]) for s, positives, _ in rows for p in positives]
        pushes = [push(s[n]) for s, _, negatives in rows for n in negatives]
        means = [sum(costs) / max(1, sum(bool(c > 0) for c in costs)) for costs in (pulls, pushes) if costs]
        return torch.as_tensor(sum(means))

    return all_rows


def relu(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0)


BINS = {"num_bins": 25, "low": 0.0, "high": 1.0}
LOSSES: dict[str, tuple[RowLoss | Objective, Callable[[list[Row]], Tensor]]] = {
    "quantized ap": (QuantizedAP(), mean_of(slow_quantized_ap(20, -1, 1))),
    "quantized ap, 25 on [0, 1]": (QuantizedAP(**BINS), mean_of(slow_quantized_ap(25, 0, 1))),
    "quantized ap, ends": (QuantizedAP(num_bins=2, low=-0.3, high=0.3), mean_of(slow_quantized_ap(2, -0.3, 0.3))),
    "tie-aware ap": (TieAwareAP(**BINS), mean_of(slow_tie_aware_ap(25, 0, 1, False))),
    "tie-aware ap, few bins": (TieAwareAP(num_bins=4), mean_of(slow_tie_aware_ap(4, -1, 1, False))),
    "tie-aware ap, simplified": (TieAwareAP(simplified=True), mean_of(slow_tie_aware_ap(20, -1, 1, True))),
    "fast ap": (FastAP(), mean_of(slow_fast_ap(10))),
    "smooth ap": (SmoothAP(), mean_of(slow_smooth_ap(0.01))),
    "smooth ap, warm": (SmoothAP(temperature=0.2), mean_of(slow_smooth_ap(0.2))),
    "sup ap": (SupAP(), mean_of(slow_sup_ap(0.01, 100, 0.05, 1.44))),
    "sup ap, warm": (
        SupAP(temperature=0.3, rho=3, delta=0.2, offset=1.1), mean_of(slow_sup_ap(0.3, 3, 0.2, 1.1)),
    ),
    "recall": (RecallAtK(ks=(1, 2, 4)), mean_of(slow_recall((1, 2, 4), 0.01, 1.0))),
    "recall, warm": (
        RecallAtK(ks=(1, 3), temperature=0.2, k_temperature=0.3), mean_of(slow_recall((1, 3), 0.2, 0.3)),
    ),
    "nt-xent": (NTXent(0.2), mean_of(slow_ntxent(0.2))),
    "contrastive": (Contrastive(), active_mean(lambda s: relu(0.9 - s), lambda s: relu(s - 0.6))),
    "contrastive, low": (
        Contrastive(positive_margin=0.5, negative_margin=0.0), active_mean(lambda s: relu(0.5 - s), lambda s: relu(s)),
    ),
    "euclidean contrastive": (
        EuclideanContrastive(),
        active_mean(lambda s: (2 - 2 * s) / 2, lambda s: relu(0.85 - torch.sqrt(2 - 2 * s)) ** 2 / 2),
    ),
    "triplet": (Triplet(), mean_of(slow_triplet(0.1, "hard"))),
    "triplet, semihard": (Triplet(margin=0.3, mining="semihard"), mean_of(slow_triplet(0.3, "semihard"))),
    "multi-similarity": (MultiSimilarity(), mean_of(slow_multi_similarity(2, 50, 0.5, 0.1))),
    "multi-similarity, cold": (
        MultiSimilarity(alpha=1, beta=5, base=0.1, epsilon=0.0), mean_of(slow_multi_similarity(1, 5, 0.1, 0.0)),
    ),
}  # fmt: skip
PAIRS = (Contrastive, EuclideanContrastive)


def objective(loss: RowLoss | Objective, chunk: int | None = None) -> Objective:
    return loss if isinstance(loss, PAIRS) else Pairwise(loss, chunk)  # type: ignore[arg-type, return-value]


def check(name: str, z: Tensor, labels: Tensor, chunk: int | None, memory: int = 0) -> None:
    """The last `memory` vectors are the memory."""
    loss, slow = LOSSES[name]
    size = len(z) - memory
    leaf = z[:size].clone().requires_grad_()
    rows = queries(leaf, labels[:size], torch.cat([leaf, z[size:]]), labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iir_dist.losses.pairwise._CHUNK_BYTES", 1 if chunk is None else 8 * len(z) * chunk)
        patch.setattr("iir_dist.losses.ranking._BLOCK_BYTES", {"cpu": 8 * len(z) * 2})
        arguments = (z[size:], labels[size:]) if memory else ()
        value, gradient = objective(loss)(z[:size], labels[:size], *arguments)
    if not rows:
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(leaf))
        return
    expected = slow(rows)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, allow_unused=True) if expected.requires_grad else (None,)
    assert value == pytest.approx(float(expected.detach()), abs=1e-12)
    expected_gradient = torch.zeros_like(leaf) if expected_gradient is None else expected_gradient
    assert torch.allclose(gradient, expected_gradient, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=3)
@given(
    size=st.integers(3, 7), classes=st.integers(1, 3), chunk=st.integers(1, 10), memory=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_value_and_gradient(name: str, size: int, classes: int, chunk: int, memory: int, seed: int) -> None:
    z, labels = batch(size + memory, 4, classes, seed)
    z[seed % len(z)] = F.normalize(z[seed % len(z)] + z[0], dim=0)  # near each other, not only orthogonal
    labels[seed % len(z)] = -1 if seed % 3 == 0 else labels[seed % len(z)]
    check(name, z, labels, chunk, memory)


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_classes(name: str) -> None:
    """Sizes 5, 3, 2, 1, 1, not sorted, one image unlabelled; close neighbours, so that every branch is taken."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.tensor([0, 1, 0, 2, 3, 0, 1, -1, 0, 2, 1, 4, 0])
    z = torch.randn(6, 4, dtype=torch.float64, generator=generator)[labels.clamp(min=0)]
    z = F.normalize(z + 0.5 * torch.randn(13, 4, dtype=torch.float64, generator=generator), dim=1)
    check(name, z, labels, 4, memory=4)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_by_finite_differences(name: str) -> None:
    z, labels = batch(8, 3, 2, 11)
    kind = objective(LOSSES[name][0], 3)
    _, gradient = kind(z, labels)
    direction = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    step = 1e-7 * direction
    slope = (kind(z + step, labels)[0] - kind(z - step, labels)[0]) / 2e-7
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_what_holds_for_every_loss(name: str) -> None:
    loss = LOSSES[name][0]
    kind = objective(loss)
    z, labels = batch(24, 5, 6, 1)
    value, gradient = kind(z, labels)
    assert value > 0
    assert gradient.abs().sum() > 0

    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    permuted, permuted_gradient = kind(z[order], labels[order])
    assert permuted == pytest.approx(value, abs=1e-13)
    assert torch.allclose(permuted_gradient, gradient[order], atol=1e-12)

    # The memory: more columns for the same rows, without gradient.
    with_memory, memory_gradient = kind(z[:16], labels[:16], z[16:], labels[16:])
    assert with_memory != value
    assert memory_gradient.shape == (16, 5)
    none = kind(z, labels, z[:0], labels[:0])
    assert none[0] == pytest.approx(value, abs=1e-14)
    assert torch.allclose(none[1], gradient, atol=1e-14)

    # No positives, no vectors that differ, one class: finite, and nothing to learn where nothing can be told.
    nothing, zero = kind(z, torch.arange(24))
    assert nothing == 0
    assert torch.equal(zero, torch.zeros_like(z))
    assert kind(z, torch.full((24,), -1))[0] == 0
    same = F.normalize(torch.ones(8, 3, dtype=torch.float64), dim=1)
    for of in (torch.arange(8) % 2, torch.zeros(8, dtype=torch.int64)):
        value_of_same, gradient_of_same = kind(same, of)
        assert math.isfinite(value_of_same)
        assert torch.isfinite(gradient_of_same).all()

    broken = z.clone()
    broken[3, 2] = torch.nan
    value_of_nan, gradient_of_nan = kind(broken, labels)
    assert math.isnan(value_of_nan)
    assert gradient_of_nan.isnan().all()
    assert math.isnan(kind(z, labels, broken, labels)[0])

    # float32 stays float32 inside autocast, and half precision is computed in float32.
    plain, plain_gradient = kind(z.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_gradient = kind(z.float(), labels)
    assert inside == plain
    assert torch.equal(inside_gradient, plain_gradient)
    assert inside_gradient.dtype == torch.float32
    assert kind(z.bfloat16(), labels)[1].dtype == torch.float32


def test_queries_are_counted_by_labels_alone() -> None:
    z, labels = batch(20, 3, 9, 5)
    labels[:3] = -1
    memory_labels = torch.tensor([-1, 3, 8, 8])
    both = torch.cat([labels, memory_labels])
    expected = sum(int(x) >= 0 and int((both == x).sum()) > 1 for x in labels)
    assert num_queries(Similarities.of(z, labels, z[:4], memory_labels)) == expected


def test_smooth_ap_tends_to_the_exact_ap() -> None:
    z, labels = batch(60, 6, 6, 3)
    exact = batch_average_precision(z, labels)
    gaps = [abs(exact - (1 - loss_and_gradient(SmoothAP(temperature=t), z, labels)[0])) for t in (0.1, 0.01, 1e-7)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-9


def test_sup_ap_bounds_the_exact_one() -> None:
    for seed in range(5):
        z, labels = batch(60, 6, 6, seed)
        assert loss_and_gradient(SupAP(), z, labels)[0] >= 1 - batch_average_precision(z, labels) - 1e-9


def test_quantized_ap_is_below_the_exact_ap_the_less_the_more_bins() -> None:
    z, labels = batch(60, 6, 6, 3)
    exact = batch_average_precision(z, labels)
    gaps = [exact - (1 - loss_and_gradient(QuantizedAP(num_bins=m), z, labels)[0]) for m in (10, 100, 20_000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.01


def test_tie_aware_ap_of_ties_is_the_mean_over_their_orders() -> None:
    """One bin holds everything: 3 items of which 1 is positive have AP (1 + 1/2 + 1/3) / 3 in the mean."""
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    value, _ = loss_and_gradient(TieAwareAP(num_bins=3), z, torch.tensor([0, 0, 1, 2]))
    # The log stands for the harmonic sum: log(4) / 3 for 11/18.
    assert 1 - value == pytest.approx(math.log(4) / 3, abs=1e-6)
    value, _ = loss_and_gradient(TieAwareAP(num_bins=3, simplified=True), z, torch.tensor([0, 0, 1, 2]))
    assert 1 - value == pytest.approx(1 * (0 + 1 + 1) / (0 + 3 + 1))


def test_smooth_ap_of_ties_counts_them_by_half() -> None:
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(5, 1)
    value, _ = loss_and_gradient(SmoothAP(), z, torch.tensor([0, 0, 0, 1, 2]))
    assert 1 - value == pytest.approx(1.5 / 2.5, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_ntxent_of_identical_vectors(n: int) -> None:
    z = F.normalize(torch.ones(2 * n, 3, dtype=torch.float64), dim=1)
    value, gradient = loss_and_gradient(NTXent(0.1), z, torch.arange(n).repeat(2))
    assert value == pytest.approx(math.log(2 * n - 1), abs=1e-12)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "loss", [QuantizedAP(num_bins=21), TieAwareAP(num_bins=21, simplified=True), FastAP(), SmoothAP(), SupAP(), Triplet(),
             Contrastive(), EuclideanContrastive()], ids=lambda loss: type(loss).__name__,
)  # fmt: skip
def test_a_perfect_batch_costs_nothing(loss: RowLoss | Objective) -> None:
    z = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    assert objective(loss)(z, torch.arange(3).repeat(2))[0] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "name", ["quantized ap", "tie-aware ap", "fast ap", "smooth ap", "sup ap", "recall", "contrastive", "triplet"]
)
def test_descending_the_gradient_raises_the_exact_ap(name: str) -> None:
    z, labels = batch(40, 8, 4, 2)
    before = batch_average_precision(z, labels)
    kind = objective(LOSSES[name][0])
    for _ in range(25):
        gradient = kind(z, labels)[1]
        z = F.normalize(z - gradient / gradient.norm().clamp(min=1e-12), dim=1)  # some reach 0
    assert batch_average_precision(z, labels) > before + 0.2


def test_a_sum_of_objectives() -> None:
    z, labels = batch(20, 4, 5, 1)
    first, second = Pairwise(SupAP()), Contrastive()
    value, gradient = WeightedSum(((0.9, first), (0.1, second)))(z, labels, z[:3], labels[:3])
    a, b = first(z, labels, z[:3], labels[:3]), second(z, labels, z[:3], labels[:3])
    assert value == pytest.approx(0.9 * a[0] + 0.1 * b[0], abs=1e-15)
    assert torch.allclose(gradient, 0.9 * a[1] + 0.1 * b[1], atol=1e-15)


def slow_arcface(z: Tensor, labels: Tensor, weight: Tensor, margin: float, scale: float) -> Tensor:
    """arXiv:1801.07698, equation 3, an image at a time, by the angle itself."""
    losses = []
    for x, y in zip(z, labels, strict=True):
        if y >= 0:
            cosines = [x @ w / torch.sqrt(w @ w) for w in weight]
            angle = torch.acos(cosines[y])
            own = torch.cos(angle + margin) if angle + margin < math.pi else cosines[y] - margin * math.sin(margin)
            exponents = [torch.exp(scale * (own if c == y else cosine)) for c, cosine in enumerate(cosines)]
            losses.append(-torch.log(exponents[y] / sum(exponents)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.2])
def test_arcface(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iir_dist.losses.classification._CHUNK_BYTES", 3 * 8 * 5)  # three rows at once
    z, labels = batch(14, 4, 5, 6)
    labels[2] = -1
    head = ArcFace(5, 4, margin, scale=3.0, seed=1).double()
    head.weight.data *= 1.7  # only its direction counts
    z[0] = -F.normalize(head.weight.data[labels[0]], dim=0) + 0.01 * z[1]  # beyond pi
    z = F.normalize(z, dim=1)
    leaf, weight = z.clone().requires_grad_(), head.weight.detach().clone().requires_grad_()
    expected = slow_arcface(leaf, labels, weight, margin, 3.0)
    d_z, d_weight = torch.autograd.grad(expected, [leaf, weight])
    value, gradient = head(z, labels, z[:2], labels[:2])
    assert value == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(gradient, d_z, atol=1e-10)
    assert head.weight.grad is not None
    assert torch.allclose(head.weight.grad, d_weight, atol=1e-10)
    head(z, labels)  # gradients add up
    assert torch.allclose(head.weight.grad, 2 * d_weight, atol=1e-10)
    head.contributes = False
    head(z, labels)
    assert torch.allclose(head.weight.grad, 2 * d_weight, atol=1e-10)


def test_arcface_edges() -> None:
    head = ArcFace(3, 4, seed=2)
    assert torch.equal(head.weight, ArcFace(3, 4, seed=2).weight)
    assert not torch.equal(head.weight, ArcFace(3, 4, seed=3).weight)
    z = torch.cat([head.weight.detach(), -head.weight.detach()])  # on the class vector, and opposite to it
    value, gradient = head(z, torch.arange(3).repeat(2))
    assert math.isfinite(value)
    assert torch.isfinite(gradient).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(z, torch.arange(3).repeat(2))[0] == value
    value, gradient = head(z, torch.full((6,), -1))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(z))
    assert math.isnan(head(z * torch.nan, torch.zeros(6, dtype=torch.int64))[0])
    with pytest.raises(ValueError, match="margin"):
        ArcFace(3, 4, margin=2.0)


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
        QuantizedAP(num_bins=1)
    with pytest.raises(ValueError, match="low < high"):
        QuantizedAP(low=1.0, high=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        NTXent(0.0)
    with pytest.raises(ValueError, match="temperature"):
        SmoothAP(temperature=0)
    with pytest.raises(ValueError, match="bins"):
        QuantizedAP(bins=20)  # type: ignore[call-arg]
