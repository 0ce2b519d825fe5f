"""Losses of instance discrimination: two views of one photo are positives, all other photos are negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iir_dist.losses.precision import precise


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


@precise
def info_nce(q: Tensor, k: Tensor, negatives: Tensor | None, temperature: float) -> Tensor:
    """Mean over the rows of the cross entropy of each query's own key among other keys, the loss of MoCo.

    He, Fan, Wu, Xie and Girshick, CVPR 2020, arXiv:1911.05722, equation 1, with t the temperature:

        l_i = -log(exp(q_i.k_i / t) / (exp(q_i.k_i / t) + sum_m exp(q_i.n_m / t)))

    Without `negatives` the keys of all other rows take their place, as in MoCo v3 (Chen, Xie and He, ICCV 2021,
    arXiv:2104.02057, algorithm 1), and the loss is multiplied by 2 t, as there. A symmetric loss is the sum over both
    views as queries.

    Args:
        q: (B, D) unit vectors.
        k: (B, D) unit vectors, without gradient; row i is another view of the photo of q's row i.
        negatives: (M, D) unit vectors of other photos (the queue), without gradient, or None.
        temperature: t; 0.2 in MoCo v2 and 1.0 in MoCo v3 with ResNet-50.

    Returns:
        Scalar. Identical vectors give log(1 + M), or 2 t log(B) without `negatives`.
    """
    k = k.detach()
    if negatives is None:
        own = torch.arange(len(q), device=q.device)
        return 2 * temperature * F.cross_entropy(q @ k.T / temperature, own)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.detach().T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
