"""Losses that approximate average precision of a batch searched with itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedAP:
    """1 - AP on soft histograms of the similarities.

    Revaud, Almazan, Rezende and de Souza, "Learning with Average Precision: Training Image Retrieval with a Listwise
    Loss", ICCV 2019, arXiv:1906.07589, equations 7-13. With bin centres b_1 > b_2 > ... > b_M evenly over [low, high]
    and the triangular kernel delta(s, m) = max(1 - |s - b_m| / step, 0):

        c_m = sum_i delta(s_i, m)      c+_m = sum_i delta(s_i, m) y_i
        P_m = sum_{k<=m} c+_k / sum_{k<=m} c_k      dr_m = c+_m / N+      AP = sum_m P_m dr_m

    A similarity outside [low, high] counts fully in the end bin, without gradient, as in the authors' code. The value
    is lower than the exact AP, the more the fewer bins, and a little even with very many, because an item enters the
    count by halves; log the exact one too.

    Departure: a similarity touches only its two neighbouring bins, so each row is scattered into M bins instead of
    building the (Q, M, B) kernel; values and gradients are the same, memory is M times less.

    Args:
        num_bins: M; 20 over [-1, 1] in the paper, 25 over [0, 1] in the released code (less biased).
    """

    num_bins: int = 20
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.num_bins < 2 or not self.low < self.high:
            raise ValueError(f"expected num_bins >= 2 and low < high, got {self}")

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`; scores are cosines, float32 or float64."""
        last = self.num_bins - 1
        position = ((self.high - scores) * (last / (self.high - self.low))).clamp(0, last)
        lower = position.detach().floor().clamp(max=last - 1)
        share = position - lower  # of the next bin; the rest belongs to bin `lower`
        taking_part = (~excluded).to(scores.dtype)
        index = lower.long()
        all_counts = self._histogram(index, share, taking_part)
        positive_counts = self._histogram(index, share, positive.to(scores.dtype))
        precision = positive_counts.cumsum(1) / all_counts.cumsum(1).clamp(min=1e-16)
        num_positive = positive.sum(dim=1)
        ap = (precision * positive_counts).sum(dim=1) / num_positive.clamp(min=1)
        return 1.0 - ap, num_positive > 0

    def _histogram(self, index: Tensor, share: Tensor, weight: Tensor) -> Tensor:
        counts = share.new_zeros(len(share), self.num_bins)
        counts = counts.scatter_add(1, index, (1 - share) * weight)
        return counts.scatter_add(1, index + 1, share * weight)
