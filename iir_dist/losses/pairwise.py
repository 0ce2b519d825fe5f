"""What all losses here share: they look at similarities of one batch with itself, row by row.

Legend: B images in the global batch, D dimension, Q rows of a chunk. A loss is a function

    loss(scores_QB, positive_QB, excluded_QB) -> (value_Q, counted_Q)

of cosine similarities, of which columns are the row's positives, and of which take no part (the row itself). Rows
without a positive are not counted. `loss_and_gradient` runs it chunk by chunk over the rows, so that memory grows
with Q x B and not with B x B, and gives the gradient with respect to the embeddings.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RowLoss(Protocol):
    """See the module's docstring."""

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, B) similarities and two boolean masks -> value (Q,), counted (Q,) boolean."""
        ...


def masks(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(positive, excluded) of rows [start, stop): same label and not itself; itself. Each (Q, B) boolean."""
    rows = torch.arange(start, stop, device=labels.device)
    excluded = rows[:, None] == torch.arange(len(labels), device=labels.device)
    return (labels[start:stop, None] == labels) & ~excluded, excluded


def loss_and_gradient(loss: RowLoss, z: Tensor, labels: Tensor, chunk: int = 256) -> tuple[float, Tensor]:
    """Mean loss over the counted rows, and its gradient with respect to z.

    Args:
        z: (B, D) unit vectors of the global batch; float32 or float64, no gradient is attached.
        labels: (B,) int64; equal labels are positives of each other.
        chunk: rows at once; changes memory, not the result (up to rounding).

    Returns:
        The value (0 where no row has a positive, NaN where z is not finite) and the gradient (B, D).
    """
    z = z.detach()
    if not torch.isfinite(z).all():  # a histogram cannot count NaN; the loop stops on a loss that is not finite
        return float("nan"), torch.full_like(z, float("nan"))
    num_rows = torch.zeros((), dtype=torch.int64, device=z.device)
    for start in range(0, len(z), chunk):
        num_rows += masks(labels, start, min(start + chunk, len(z)))[0].any(dim=1).sum()
    count = int(num_rows)
    gradient = torch.zeros_like(z)
    if count == 0:
        return 0.0, gradient
    total = 0.0
    with torch.autocast(z.device.type, enabled=False):
        for start in range(0, len(z), chunk):
            stop = min(start + chunk, len(z))
            positive, excluded = masks(labels, start, stop)
            scores = (z[start:stop] @ z.T).requires_grad_()
            values, counted = loss(scores, positive, excluded)
            part = (values * counted).sum() / count
            (d_scores,) = torch.autograd.grad(part, scores)
            # scores = z_q z^T, so each similarity pulls on the row's vector and on the column's.
            gradient[start:stop] += d_scores @ z
            gradient += d_scores.T @ z[start:stop]
            total += float(part.detach())
    return total, gradient


@torch.no_grad()
def batch_average_precision(z: Tensor, labels: Tensor, chunk: int = 256) -> float:
    """Mean exact average precision (no interpolation) of the batch searched with itself; logged beside every loss."""
    total, count = 0.0, 0
    for start in range(0, len(z), chunk):
        stop = min(start + chunk, len(z))
        positive, excluded = masks(labels, start, stop)
        scores = (z[start:stop] @ z.T).masked_fill(excluded, -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        hits = positive.gather(1, order).double()
        precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=z.device)
        num_positive = hits.sum(1)
        ap = (precision * hits).sum(1) / num_positive.clamp(min=1)
        total += float(ap[num_positive > 0].sum())
        count += int((num_positive > 0).sum())
    return total / count if count else 0.0
