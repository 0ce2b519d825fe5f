"""Losses of ranks: how many columns stand above each positive, counted by a smooth step in place of the true one.

For row q, positive p and a step H, with s the similarities of q, P its positives and N its negatives,

    above+(p) = sum_{j in P, j != p} H+(s_j - s_p)      above-(p) = sum_{j in N} H-(s_j - s_p)

and the rank of p is 1 + above+ + above- among all, 1 + above+ among positives. Only (row, positive) pairs are looked
at, in blocks of pairs x columns of a few MB that are computed again for the gradient: memory does not grow with the
number of positives, classes may be of any size and in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from iir_dist.losses.parameters import Parameters

_BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**27}
"""Of one block of pairs x columns: within the cache of a core, or enough to fill a GPU."""


class Step(Protocol):
    """A stand-in for the unit step. Both functions may overwrite their argument, which may hold -inf (far below)."""

    def value(self, x: Tensor) -> Tensor:
        """H(x), elementwise; 0 at -inf."""
        ...

    def slope(self, x: Tensor) -> Tensor:
        """dH/dx, elementwise; 0 at -inf."""
        ...


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """1 / (1 + exp(-x / temperature))."""

    temperature: float

    def value(self, x: Tensor) -> Tensor:
        """See `Step`."""
        return x.mul_(1 / self.temperature).sigmoid_()

    def slope(self, x: Tensor) -> Tensor:
        """See `Step`."""
        y = self.value(x)
        return y.addcmul_(y, y, value=-1).mul_(1 / self.temperature)


@dataclass(frozen=True, slots=True)
class Heaviside:
    """1 from 0 on, ties included; no gradient."""

    def value(self, x: Tensor) -> Tensor:
        """See `Step`."""
        return (x >= 0).to(x.dtype)

    def slope(self, x: Tensor) -> Tensor:
        """See `Step`."""
        return x.zero_()


@dataclass(frozen=True, slots=True)
class Ramp:
    """Sigmoid up to 0, half a step higher up to `delta`, then a line of slope `rho` from `offset` on."""

    temperature: float
    rho: float
    delta: float
    offset: float

    def value(self, x: Tensor) -> Tensor:
        """See `Step`."""
        near = torch.sigmoid(x / self.temperature).add_(x > 0, alpha=0.5)
        return torch.where(x > self.delta, self.rho * (x - self.delta) + self.offset, near)

    def slope(self, x: Tensor) -> Tensor:
        """See `Step`."""
        beyond = x > self.delta
        return Sigmoid(self.temperature).slope(x).masked_fill_(beyond, self.rho)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Of the n (row, positive) pairs of Q rows: above+ and above- (n,), and the row of each pair (n,) int64."""

    plus: Tensor
    minus: Tensor
    row: Tensor
    num_positive: Tensor
    """(Q,) int64."""

    def row_sum(self, of_pair: Tensor) -> Tensor:
        """(n,) -> (Q,)."""
        return of_pair.new_zeros(len(self.num_positive)).index_add(0, self.row, of_pair)

    def row_mean(self, of_pair: Tensor) -> Tensor:
        """(n,) -> (Q,), 0 where a row has no pair."""
        return self.row_sum(of_pair) / self.num_positive.clamp(min=1)


def ranks(scores: Tensor, positive: Tensor, excluded: Tensor, plus: Step, minus: Step) -> Ranks:
    """Ranks of the positives of each row, args as in `iir_dist.losses.pairwise`, with a step for each kind of column."""
    row, column = positive.nonzero(as_tuple=True)
    num_positive = positive.sum(dim=1)
    own = scores[row, column]
    # The positives of a row side by side, so that they are compared with each other alone and not with all columns.
    first = num_positive.cumsum(0) - num_positive
    slot = torch.arange(len(row), device=row.device) - first[row]
    width = int(num_positive.max()) if len(num_positive) else 0
    positives = scores.new_full((len(scores), width), -torch.inf).index_put((row, slot), own)
    itself = plus.value(own.new_zeros(()))  # the sum has j = p as well, whose gradient is none
    negatives = scores.masked_fill(positive | excluded, -torch.inf)
    above_plus: Tensor = _Above.apply(positives, own, row, plus) - itself
    above_minus: Tensor = _Above.apply(negatives, own, row, minus)
    return Ranks(above_plus, above_minus, row, num_positive)


class SmoothAP(Parameters):
    """1 - AP of smooth ranks.

    Brown, Xie, Kalogeiton and Zisserman, "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV
    2020, arXiv:2007.12163: for each row the mean over its positives of

        (1 + above+) / (1 + above+ + above-)

    with the sigmoid of `temperature` for both steps. It tends to the exact AP where the temperature tends to 0.

    Departures: the query itself is no positive; the ranks among positives come from the same similarities, so that
    batches need not be sorted by class; computed as above- / (1 + above+ + above-), which keeps small losses exact.
    """

    temperature: float = Field(0.01, gt=0)

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`."""
        step = Sigmoid(self.temperature)
        return _one_minus_ap(ranks(scores, positive, excluded, step, step))


class SupAP(Parameters):
    """1 - AP of ranks that bound the true ones from above.

    Ramzi, Thome, Rambour, Audebert and Bitot, "Robust and Decomposable Average Precision for Image Retrieval" (ROADMAP),
    NeurIPS 2021, arXiv:2110.01445. As Smooth-AP, but positives are ranked among each other by the true
    step (without gradient, ties count), and negatives by

        sigmoid(x / temperature)            for x <= 0
        0.5 + sigmoid(x / temperature)      for 0 < x <= delta
        rho (x - delta) + offset            for x > delta

    so that a negative far above a positive still pulls it up. `iir_dist.losses.margin.Contrastive` is its calibration.
    """

    temperature: float = Field(0.01, gt=0)
    rho: float = Field(100.0, gt=0)
    delta: float = Field(0.05, ge=0)
    offset: float = 1.44
    """As in the released configurations; 0.5 + sigmoid(delta / temperature), 1.493, would make the step continuous."""

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`."""
        ramp = Ramp(self.temperature, self.rho, self.delta, self.offset)
        return _one_minus_ap(ranks(scores, positive, excluded, Heaviside(), ramp))


class RecallAtK(Parameters):
    """1 - recall@k of smooth ranks, mean over several k.

    Patel, Tolias and Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022,
    arXiv:2108.11179. With r the smooth rank of a positive among all,

        recall@k = min(k, sum_{p in P} sigmoid((k - r_p) / k_temperature)) / min(k, |P|)

    where the outer minimum is that of the released code. A positive just at rank k counts by half, hence the value
    does not reach 0. Departure: the query itself takes no rank.
    """

    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4, 8, 16), min_length=1)
    temperature: float = Field(0.01, gt=0)
    """Of the ranks."""
    k_temperature: float = Field(1.0, gt=0)
    """Of the step at rank k."""

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`."""
        step = Sigmoid(self.temperature)
        found = ranks(scores, positive, excluded, step, step)
        rank = 1 + found.plus + found.minus
        recall = torch.zeros(len(scores), dtype=scores.dtype, device=scores.device)
        for k in self.ks:
            hits = found.row_sum(torch.sigmoid((k - rank) / self.k_temperature))
            recall = recall + hits.clamp(max=k) / found.num_positive.clamp(min=1, max=k)
        return 1 - recall / len(self.ks), found.num_positive > 0


def _one_minus_ap(found: Ranks) -> tuple[Tensor, Tensor]:
    return found.row_mean(found.minus / (1 + found.plus + found.minus)), found.num_positive > 0


class _Above(torch.autograd.Function):
    """(Q, N) scores, (n,) thresholds, their rows (n,) rising -> (n,): sum_j H(s_rj - threshold)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor, row: Tensor, step: Step) -> Tensor:
        ctx.save_for_backward(scores, threshold, row)
        ctx.step = step
        above = torch.empty_like(threshold)
        for pairs in _blocks(scores, threshold):
            above[pairs] = step.value(scores[row[pairs]].sub_(threshold[pairs, None])).sum(dim=1)
        return above

    @staticmethod
    def backward(ctx: Any, d_above: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scores, threshold, row = ctx.saved_tensors
        d_scores, d_threshold = torch.zeros_like(scores), torch.empty_like(threshold)
        for pairs in _blocks(scores, threshold):
            slope = ctx.step.slope(scores[row[pairs]].sub_(threshold[pairs, None])).mul_(d_above[pairs, None])
            d_threshold[pairs] = -slope.sum(dim=1)
            d_scores.index_add_(0, row[pairs], slope)
        return d_scores, d_threshold, None, None


def _blocks(scores: Tensor, threshold: Tensor) -> Iterator[slice]:
    size = _BLOCK_BYTES.get(scores.device.type, 2**27) // max(1, scores.shape[1] * scores.element_size())
    for start in range(0, len(threshold), max(1, size)):
        yield slice(start, start + max(1, size))
