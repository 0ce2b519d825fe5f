"""Losses of online clustering: the cluster of one view is predicted from another."""

from __future__ import annotations

import torch
from torch import Tensor

from iir_dist.losses.distillation import cross_entropy_between_views
from iir_dist.losses.precision import precise


@precise
@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign samples to prototypes so that all prototypes get about the same share.

    Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv:1306.0895, as in Caron et al., arXiv:2006.09882, equation 3: the
    matrix exp(scores / epsilon) is scaled to columns of equal sum, then to rows of sum 1, `iterations` times. Here on
    logarithms, so that no score is too large and no column vanishes.

    Args:
        scores: (N, K) of samples and prototypes.
        epsilon: the smaller, the harder the assignments; 0.05 in the paper.
        iterations: 1 or more; 3 in the paper.

    Returns:
        (N, K) without gradient: rows sum to 1, columns the closer to N / K the more iterations.
    """
    if iterations < 1:
        raise ValueError(f"expected one iteration or more, got {iterations}")
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q -= log_q.logsumexp(dim=0, keepdim=True)
        log_q -= log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp_()


@precise
def swapped_prediction(
    scores: Tensor, queued: Tensor | None, temperature: float, epsilon: float, iterations: int, assigned: int = 2
) -> Tensor:
    """Cross entropy between the assignments of a view and the predictions from every other view, the loss of SwAV.

    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020,
    arXiv:2006.09882, equation 2, with multi-crop as in the released code: with q_a the assignments of view a,

        mean over a < assigned, v != a and rows of -sum_k q_ak log softmax(scores_v / temperature)_k

    Args:
        scores: (V, B, K) cosines of V views and the prototypes.
        queued: (assigned, M, K) cosines of earlier samples of each assigned view and the same prototypes, which share
            in the assignment only, or None.
        temperature: 0.1 in the paper.
        epsilon: see `sinkhorn`, as is `iterations`.
        assigned: the first so many views (the large crops) are assigned to prototypes.

    Raises:
        ValueError: there is one view, or another number of assigned views in the queue.
    """
    large, batch = scores[:assigned], scores.shape[1]
    if queued is not None:
        if len(queued) != assigned:
            raise ValueError(f"expected a queue for each of {assigned} assigned views, got {len(queued)}")
        large = torch.cat([large, queued], dim=1)
    codes = torch.stack([sinkhorn(view, epsilon, iterations)[:batch] for view in large])
    return cross_entropy_between_views(codes, scores / temperature)
