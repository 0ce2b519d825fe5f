"""Pseudo positives among photos without labels, and the contrastive sum over them (InsCLR).

Deng, Zhong, Guo and Huang, "InsCLR: Improving Instance Retrieval with Self-Supervision", AAAI 2022, arXiv:2112.01390, as
in the authors' code. Who is a positive of whom is decided on similarities of photos as they are (`seen`), the loss is
taken on those of augmented views.

Departure: a pair is judged by itself, whichever anchor's group brought the two into the batch, so that two anchors of
one instance are not pushed apart; and in the uncertain band one plain mean stands for the authors' four turns of taking
the best five.
"""

from __future__ import annotations

from torch import Tensor


def positives_in_batch(seen: Tensor, least: float) -> Tensor:
    """(B, B) cosines of the batch with itself -> (B, B) boolean: at least `least`, and never a photo with itself.

    >>> import torch
    >>> positives_in_batch(torch.tensor([[1.0, 0.7, 0.1], [0.7, 1.0, 0.3], [0.1, 0.3, 1.0]]), 0.6).int().tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    """
    return (seen >= least).fill_diagonal_(False)


def positives_of_others(seen: Tensor, in_batch: Tensor, sure: float, never: float, mean: float) -> Tensor:
    """Which other photos are positives of those of the batch.

    A cosine of `sure` or more is a positive, one below `never` is none. In between it is one where the other photo's
    mean cosine to the row's photo and to that one's positives in the batch is `mean` or more.

    Args:
        seen: (B, M) cosines of the batch with M other photos.
        in_batch: (B, B) boolean, of `positives_in_batch`.

    Returns:
        (B, M) boolean.
    """
    group = in_batch.to(seen).fill_diagonal_(1)
    means = (group @ seen) / group.sum(dim=1, keepdim=True)
    return (seen >= sure) | ((seen >= never) & (means >= mean))


def contrastive_sum(scores: Tensor, positive: Tensor, margin: float) -> Tensor:
    """Sum of 1 - s over positive pairs, and of s over those of the others whose s is above the margin.

    Args:
        scores: (R, N) cosines s; a pair that is to be left out is at or below the margin and not positive.
        positive: (R, N) boolean.

    >>> import torch
    >>> float(contrastive_sum(torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([[True, False, False]]), 0.4))
    0.75
    """
    pushed = ~positive & (scores > margin)
    return (1 - scores)[positive].sum() + scores[pushed].sum()
