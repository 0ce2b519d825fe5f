"""Backpropagation of a loss that sees the whole global batch, however small the memory and however many the workers.

Three stages (Revaud et al., ICCV 2019, arXiv:1906.07589, section 4.2): embed every image without a graph, chunk by
chunk; compute the loss of the gathered embeddings and its gradient with respect to them; embed chunk by chunk once
more with a graph and push the gradient's rows through. Peak memory is that of one chunk. The result is the direct
gradient as long as both passes see the same network and pixels: no dropout, batch norm in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iir_dist.losses.pairwise import RowLoss, batch_average_precision, loss_and_gradient
from iir_dist.train import collectives


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss and exact AP of the global batch."""

    loss: float
    ap: float


def three_stage(embed: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], labels: Tensor, loss: RowLoss) -> Outcome:
    """Add the gradient of the global loss to the parameters behind `embed`; sum it over workers afterwards.

    Args:
        embed: chunk (n, ...) -> unit vectors (n, D), the same on both calls.
        chunks: this worker's share of the batch; at least one chunk.
        labels: (B_local,) int64, in the order of the chunks.
        loss: see `iir_dist.losses.pairwise`.
    """
    with torch.no_grad():
        local = torch.cat([_full(embed(chunk)) for chunk in chunks])
    outcome, gradient = _gathered(local, labels, loss)
    start = 0
    for chunk in chunks:
        z = embed(chunk)
        z.backward(gradient[start : start + len(z)].to(z.dtype))
        start += len(z)
    return outcome


def one_pass(z: Tensor, labels: Tensor, loss: RowLoss) -> Outcome:
    """The same for embeddings whose graph is kept: what batch norm in training mode asks for. z: (B_local, D)."""
    outcome, gradient = _gathered(_full(z), labels, loss)
    z.backward(gradient.to(z.dtype))
    return outcome


def _gathered(local: Tensor, labels: Tensor, loss: RowLoss) -> tuple[Outcome, Tensor]:
    z, start = collectives.gather(local)
    all_labels, _ = collectives.gather(labels)
    value, gradient = loss_and_gradient(loss, z, all_labels)
    outcome = Outcome(value, batch_average_precision(z, all_labels))
    return outcome, gradient[start : start + len(local)]


def _full(z: Tensor) -> Tensor:
    """At least float32: losses are never computed in half precision."""
    return z if z.dtype == torch.float64 else z.float()
