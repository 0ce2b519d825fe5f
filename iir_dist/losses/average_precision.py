"""Losses that count similarities in soft histograms to approximate the average precision of a batch."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from iir_dist.losses.parameters import Parameters


class _Histogram(Parameters):
    """1 - AP of soft histograms; `ap_of` makes the AP of the counts of all columns and of positives, (Q, M) each.

    With bin centres b_1 > b_2 > ... > b_M evenly over [low, high], step apart, and the triangular kernel
    delta(s, m) = max(1 - |s - b_m| / step, 0):

        c_m = sum_i delta(s_i, m)      c+_m = sum_i delta(s_i, m) y_i

    A similarity outside [low, high] counts fully in the end bin, without gradient.
    """

    num_bins: int = Field(20, ge=2)
    """M; 20 over [-1, 1] in the paper, 25 over [0, 1] in the released code, which is less biased."""
    low: float = -1.0
    high: float = 1.0

    @model_validator(mode="after")
    def _range(self) -> _Histogram:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got low={self.low} and high={self.high}")
        return self

    def ap_of(self, counts: Tensor, positive_counts: Tensor, num_positive: Tensor) -> Tensor:
        """(Q, M), (Q, M), (Q,) -> (Q,)."""
        raise NotImplementedError

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`; scores are cosines, float32 or float64."""
        last = self.num_bins - 1
        position = ((self.high - scores) * (last / (self.high - self.low))).clamp(0, last)
        lower = position.detach().to(torch.int64).clamp_(max=last - 1)
        share = position - lower  # of the next bin; the rest belongs to bin `lower`
        counts = _counts(lower, share.masked_fill(excluded, 0), (~excluded).to(scores.dtype), last)
        # Positives are few: one list of all rows' rather than a mask as wide as the scores.
        row, column = positive.nonzero(as_tuple=True)
        bins, own = (lower[row, column] + last * row)[None], share[row, column][None]
        positive_counts = _counts(bins, own, torch.ones_like(own), last * len(scores), rows=len(scores))
        num_positive = positive.sum(dim=1)
        ap = self.ap_of(counts, positive_counts, num_positive.clamp(min=1))
        return 1.0 - ap, num_positive > 0


class QuantizedAP(_Histogram):
    """1 - AP on soft histograms of the similarities.

    Revaud, Almazan, Rezende and de Souza, "Learning with Average Precision: Training Image Retrieval with a Listwise
    Loss", ICCV 2019, arXiv:1906.07589, equations 7-13: with the counts c_m, c+_m of all columns and of the N+ positives

        P_m = sum_{k<=m} c+_k / sum_{k<=m} c_k      dr_m = c+_m / N+      AP = sum_m P_m dr_m

    The value is lower than the exact AP, the more the fewer bins, and a little even with very many, because an item
    enters the count by halves; log the exact one too.

    Departure: a similarity touches only its two neighbouring bins, so each row is scattered into M bins instead of
    building the (Q, M, N) kernel; values and gradients are the same, memory is M times less.
    """

    def ap_of(self, counts: Tensor, positive_counts: Tensor, num_positive: Tensor) -> Tensor:
        """Equations 11-13."""
        precision = positive_counts.cumsum(1) / counts.cumsum(1).clamp(min=1e-16)
        return (precision * positive_counts).sum(dim=1) / num_positive


class TieAwareAP(_Histogram):
    """1 - tie-aware AP on the same histograms: the mean over all orders of the items of a bin.

    The second loss of the code released with arXiv:1906.07589, after McSherry and Najork, "Computing Information
    Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008. With C_m, C+_m the cumulated
    counts and C_0 = C+_0 = 0:

        AP = sum_m c+_m / c_m (c_m r_m + (C+_{m-1} + 1 - r_m (C_{m-1} + 1)) log((C_m + 1) / (C_{m-1} + 1))) / N+
        r_m = max(c+_m - 1, 0) / max(c_m - 1, 0)

    and, simplified,

        AP = sum_m c+_m (C+_{m-1} + C+_m + 1) / (C_{m-1} + C_m + 1) / N+

    The logarithm stands for a harmonic sum; alone in its bin, a first positive counts log 2 and not 1, so that only the
    simplified form reaches a loss of 0.
    """

    simplified: bool = False
    """The second formula."""

    _TINY: ClassVar[float] = 1e-8  # of the released code; fractions of empty bins become 0

    def ap_of(self, counts: Tensor, positive_counts: Tensor, num_positive: Tensor) -> Tensor:
        """See the class."""
        c, p = counts, positive_counts
        upto, positive_upto = c.cumsum(1), p.cumsum(1)
        before, positive_before = upto - c, positive_upto - p
        if self.simplified:
            ap = p * (positive_before + positive_upto + 1) / (before + upto + 1)
        else:
            ratio = (p - 1).clamp(min=0) / ((c - 1).clamp(min=0) + self._TINY)
            log = torch.log((upto + 1) / (before + 1))
            ap = p * (c * ratio + (positive_before + 1 - ratio * (before + 1)) * log) / (c + self._TINY)
        return ap.sum(dim=1) / num_positive


class FastAP(Parameters):
    """1 - FastAP: the AP of a histogram of squared distances.

    Cakir, He, Xia, Kulis and Sclaroff, "Deep Metric Learning to Rank", CVPR 2019,
    doi:10.1109/CVPR.2019.00196. With L bins there are L + 1 centres, 0 to 4 in steps of 4 / L, on d = 2 - 2s:

        FastAP = sum_j h+_j H+_j / H_j / N+

    where H are cumulated counts. d falls linearly with s, hence this is `QuantizedAP` of L + 1 bins over [-1, 1].
    """

    num_bins: int = Field(10, ge=1)
    """L."""

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`."""
        return QuantizedAP(num_bins=self.num_bins + 1)(scores, positive, excluded)


def _counts(lower: Tensor, share: Tensor, weight: Tensor, size: int, rows: int | None = None) -> Tensor:
    """(R, n) items, `share` of each in bin `lower + 1` and the rest of `weight` in bin `lower` -> counts, one bin more.

    `size` is the number of values of `lower`, which `rows` rows share where they are written one behind the other.
    """
    whole = share.new_zeros(len(lower), size).scatter_add_(1, lower, weight)
    upper = share.new_zeros(len(lower), size).scatter_add(1, lower, share)
    if rows is not None:
        whole, upper = whole.view(rows, -1), upper.view(rows, -1)
    return F.pad(whole - upper, (0, 1)) + F.pad(upper, (1, 0))
