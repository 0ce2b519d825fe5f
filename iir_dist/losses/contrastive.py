"""Losses of instance discrimination: two views of one photo are positives, all other photos are negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NTXent:
    """Normalized temperature-scaled cross entropy, the loss of SimCLR.

    Chen, Kornblith, Norouzi and Hinton, ICML 2020, arXiv:2002.05709, equation 1: for row i with the other view j,

        l_i = -s_ij / t + log sum_{k != i} exp(s_ik / t)

    averaged over all 2N rows. 2N identical vectors give log(2N - 1). With more than one positive (labels shared by
    more than two rows) the first term is the mean over them.

    Args:
        temperature: t; 0.1 for large batches (the authors' ImageNet setting), 0.5 for CIFAR.
    """

    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`."""
        logits = scores / self.temperature
        partition = torch.logsumexp(logits.masked_fill(excluded, -torch.inf), dim=1)
        num_positive = positive.sum(dim=1)
        pull = (logits * positive).sum(dim=1) / num_positive.clamp(min=1)
        return partition - pull, num_positive > 0
