"""Losses without negatives: one view's output is predicted from another's, and the target gets no gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iir_dist.losses.precision import precise


@precise
def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the rows of -cos(p_i, z_i), the loss of SimSiam.

    Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv:2011.10566, equations 1 and 2,
    where the loss is half the sum over both views as p.

    Args:
        p: (B, D) predictions of any length.
        z: (B, D) projections of the other view, of any length; its gradient is stopped here.

    Returns:
        Scalar in [-1, 1].
    """
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def byol(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the rows of 2 - 2 cos(p_i, z_i), the squared distance of unit vectors.

    Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv:2006.07733, equation 2, where the loss is the sum
    over both views as p. Args as in `negative_cosine`; z is the target network's.

    Returns:
        Scalar in [0, 4].
    """
    return 2 + 2 * negative_cosine(p, z)


@precise
def dino(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross entropy between the softmax outputs of teacher and student, mean over all pairs of different views.

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv:2104.14294, equation 3
    and algorithm 1; H(a, b) = -sum_k a_k log b_k:

        mean over t, v != t and rows of H(softmax((teacher_t - centre) / teacher_temperature),
                                          softmax(student_v / student_temperature))

    Args:
        student: (Vs, B, K) outputs before the softmax.
        teacher: (Vt, B, K), without gradient; teacher view v and student view v < Vt are the same pixels.
        centre: (K,), see `next_centre`.
        student_temperature: 0.1 in the paper.
        teacher_temperature: lower, 0.04 to 0.07 there.

    Raises:
        ValueError: there is no pair of different views.
    """
    targets = torch.softmax((teacher.detach() - centre) / teacher_temperature, dim=-1)
    return cross_entropy_between_views(targets, student / student_temperature)


@torch.no_grad()
def next_centre(centre: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """(K,) and the teacher's outputs (..., K) of this step -> (K,): their running mean (arXiv:2104.14294, equation 4)."""
    return momentum * centre + (1 - momentum) * teacher.to(centre.dtype).flatten(end_dim=-2).mean(dim=0)


def cross_entropy_between_views(targets: Tensor, logits: Tensor) -> Tensor:
    """Mean of H(targets_t, softmax(logits_v)) over all rows and all pairs t != v.

    Args:
        targets: (T, B, K) distributions.
        logits: (V, B, K); views of equal number are the same pixels.

    Raises:
        ValueError: there is no pair of different views.
    """
    views = [[t for t in range(len(targets)) if t != v] for v in range(len(logits))]
    pairs = sum(len(others) for others in views)
    if pairs == 0:
        raise ValueError(f"expected two views or more, got {len(targets)} as targets and {len(logits)} as predictions")
    total = logits.new_zeros(())
    for view, others in zip(logits, views, strict=True):
        # A prediction meets all its targets at once: the cross entropy is linear in the target.
        total = total - (targets[others].sum(dim=0) * F.log_softmax(view, dim=-1)).sum()
    return total / (pairs * logits.shape[1])
