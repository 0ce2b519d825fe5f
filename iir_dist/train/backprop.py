"""Backpropagation of a loss that sees the whole global batch, however small the memory and however many the workers.

Three stages (Revaud et al., ICCV 2019, arXiv:1906.07589, section 4.2): embed every image without a graph, chunk by
chunk; compute the loss of the gathered embeddings and its gradient with respect to them; embed chunk by chunk once
more with a graph and push the gradient's rows through. Peak memory is that of one chunk. The result is the direct
gradient as long as both passes see the same network and pixels: no dropout, batch norm in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from iir_dist.losses.pairwise import batch_average_precision
from iir_dist.train import collectives

Loss = Callable[[Tensor, Tensor], tuple[float, Tensor]]
"""(z (B, D), labels (B,)) of the global batch -> value, gradient (B, D); the same on every worker."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss and exact AP of the global batch; `broken` are the positions in it whose embedding is not finite."""

    loss: float
    ap: float
    broken: tuple[int, ...] = ()


def three_stage(
    embed: Callable[[Tensor], Tensor],
    chunks: Callable[[], Iterable[Tensor]],
    labels: Tensor,
    loss: Loss,
    dim: int,
    scale: float = 1.0,
) -> Outcome:
    """Add the gradient of the global loss to the parameters behind `embed`; sum it over workers afterwards.

    Args:
        embed: chunk (n, ...) -> unit vectors (n, D), the same on both calls: precision (autocast) included.
        chunks: gives this worker's share of the batch, chunk by chunk; called twice, with the same result.
        labels: (B_local,) int64, in the order of the chunks.
        loss: of the gathered batch.
        dim: D; a share may be empty.
        scale: of the gradient, against underflow in float16 (`torch.amp.GradScaler`); loss and outcome are not scaled.
    """
    with torch.no_grad():
        parts = [_full(embed(chunk)) for chunk in chunks()]
        local = torch.cat(parts) if parts else torch.zeros(0, dim, device=labels.device)
    outcome, gradient = _gathered(local, labels, loss)
    if outcome.broken:
        return outcome
    start = 0
    for chunk in chunks():
        z = embed(chunk)
        z.backward(scale * gradient[start : start + len(z)].to(z.dtype))
        start += len(z)
    return outcome


def _gathered(local: Tensor, labels: Tensor, loss: Loss) -> tuple[Outcome, Tensor]:
    z, start = collectives.gather(local)
    all_labels, _ = collectives.gather(labels)
    finite = torch.isfinite(z).all(dim=1)
    if not finite.all():
        broken = tuple((~finite).nonzero().flatten().tolist())
        return Outcome(float("nan"), float("nan"), broken), torch.full_like(local, float("nan"))
    value, gradient = loss(z, all_labels)
    return Outcome(value, batch_average_precision(z, all_labels)), gradient[start : start + len(local)]


def _full(z: Tensor) -> Tensor:
    """At least float32: losses are never computed in half precision."""
    return z if z.dtype == torch.float64 else z.float()
