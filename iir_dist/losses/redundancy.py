"""Losses of second moments: two views agree, and the components of their vectors do not repeat each other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iir_dist.losses.precision import precise


@precise
def barlow_twins(a: Tensor, b: Tensor, weight: float = 0.0051) -> Tensor:
    """Distance of the cross-correlation of two views from the identity.

    Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
    arXiv:2103.03230, equations 1 and 2. With a and b standardized over the batch and C = a^T b / B,

        sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2

    Standardized as by batch norm without affine parameters: biased variance, 1e-5 added to it.

    Args:
        a: (B, D) projections of one view, B of 2 or more. Four D x D matrices live at a time with the gradient's.
        b: (B, D) of the other.
        weight: lambda.
    """
    a, b = (F.batch_norm(x, None, None, training=True, eps=1e-5) for x in (a, b))
    correlation = a.T @ b / len(a)
    return (1 - correlation.diagonal()).square().sum() + weight * _off_diagonal(correlation)


@precise
def vicreg(a: Tensor, b: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    """Views agree (invariance), each component varies (variance), no two vary together (covariance).

    Bardes, Ponce and LeCun, "VICReg", ICLR 2022, arXiv:2105.04906, equations 1 to 6, with the released code's means.
    With C(x) the unbiased covariance of x over the batch,

        invariance s(a, b) + variance (v(a) + v(b)) / 2 + covariance (c(a) + c(b))

        s(a, b) = mean over rows and components of (a - b)^2
        v(x) = mean_j max(0, 1 - sqrt(C(x)_jj + 1e-4))
        c(x) = sum_{i != j} C(x)_ij^2 / D

    Departures of the released code from the paper's text, kept here: s is divided by D as well, v is halved.

    Args:
        a: (B, D) expanded vectors of one view, B of 2 or more. Five D x D matrices live at a time with the gradient's.
        b: (B, D) of the other.
        invariance: lambda.
        variance: mu.
        covariance: nu.
    """
    total = invariance * F.mse_loss(a, b)
    for x in (a, b):
        centred = x - x.mean(dim=0)
        total = total + variance * (1 - (x.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
        total = total + covariance * _off_diagonal(centred.T @ centred / (len(x) - 1)) / x.shape[1]
    return total


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Sum of squares of all but the diagonal, which is overwritten: a copy of the matrix would cost 256 MiB at D = 8192."""
    return matrix.fill_diagonal_(0).square().sum()
