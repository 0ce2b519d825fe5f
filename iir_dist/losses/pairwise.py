"""What the losses of similarities share: a batch searched with itself, and with a memory, some rows at a time.

Legend: B images in the global batch, M vectors in the memory, N = B + M columns, D dimension, Q rows of a chunk. A
row loss is a function

    loss(scores_QN, positive_QN, excluded_QN) -> (value_Q, counted_Q)

of cosine similarities, of which columns are the row's positives, and of which take no part (the row itself). Rows
without a positive are not counted. `Pairwise` makes an `Objective` of it: the mean over all counted rows and its
gradient with respect to the vectors, chunk by chunk, so that memory grows with Q x N and not with B x N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

UNLABELLED = -1
"""A label that equals no other, itself included: such an image is a negative of all and never a query."""

_CHUNK_BYTES = 2**23
"""Of one (Q, N) matrix of similarities; about ten of them live at a time."""


class Objective(Protocol):
    """A loss of the global batch with its gradient."""

    def __call__(
        self, z: Tensor, labels: Tensor, memory_z: Tensor | None = None, memory_labels: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """Mean loss, and its gradient with respect to z.

        Args:
            z: (B, D) unit vectors of the global batch, without a graph. float64 stays so, all else is computed in float32.
            labels: (B,) int64; equal labels are positives of each other, -1 equals nothing.
            memory_z: (M, D) vectors of earlier batches: further columns, never rows, without gradient.
            memory_labels: (M,) int64.

        Returns:
            The value (0 where no row has a positive, NaN where a vector is not finite) and the gradient (B, D).
        """
        ...


class RowLoss(Protocol):
    """See the module's docstring."""

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, N) similarities and two boolean masks -> value (Q,), counted (Q,) boolean."""
        ...


Part = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores, positive, excluded of a chunk of rows -> its share of a sum, in one tensor."""


def masks(labels: Tensor, start: int, stop: int, memory_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(positive, excluded) of rows [start, stop): same label and not itself; itself. Each (Q, N) boolean."""
    columns = labels if memory_labels is None else torch.cat([labels, memory_labels])
    rows = torch.arange(start, stop, device=labels.device)
    excluded = rows[:, None] == torch.arange(len(columns), device=labels.device)
    own = labels[start:stop, None]
    return (own == columns) & (own != UNLABELLED) & ~excluded, excluded


@dataclass(frozen=True, slots=True)
class Similarities:
    """z z^T and z m^T in chunks of rows, never as a whole. Fields as in `Objective`; `chunk` is a number of rows."""

    z: Tensor
    labels: Tensor
    memory_z: Tensor | None
    memory_labels: Tensor | None
    chunk: int

    @staticmethod
    def of(
        z: Tensor, labels: Tensor, memory_z: Tensor | None, memory_labels: Tensor | None, chunk: int | None = None
    ) -> Similarities:
        """With `chunk` rows at a time, by default as many as keep one (Q, N) matrix within some MB."""
        z = z.detach()
        z = z if z.dtype == torch.float64 else z.float()
        columns = len(z)
        if memory_z is not None:
            memory_z = memory_z.detach().to(z)
            columns += len(memory_z)
        chunk = chunk or max(1, _CHUNK_BYTES // max(1, columns * z.element_size()))
        return Similarities(z, labels, memory_z, memory_labels, chunk)

    def total(self, part: Part) -> Tensor:
        """Sum of `part` over all chunks, without gradient."""
        with torch.no_grad(), torch.autocast(self.z.device.type, enabled=False):
            return torch.stack([part(*self._chunk(rows)) for rows in self._rows()]).sum(dim=0)

    def backward(self, part: Part) -> tuple[float, Tensor]:
        """Sum of the scalar `part` over all chunks, and its gradient with respect to z."""
        gradient = torch.zeros_like(self.z)
        if not self._finite():  # a histogram cannot count NaN; the loop stops on a loss that is not finite
            return float("nan"), gradient.fill_(float("nan"))
        total, batch = 0.0, len(self.z)
        with torch.autocast(self.z.device.type, enabled=False):
            for rows in self._rows():
                scores, positive, excluded = self._chunk(rows)
                value = part(scores.requires_grad_(), positive, excluded)
                (d_scores,) = torch.autograd.grad(value, scores)
                # Each similarity of the batch pulls on the row's vector and on the column's; the memory stays.
                gradient[rows] += d_scores[:, :batch] @ self.z
                gradient.addmm_(d_scores[:, :batch].T, self.z[rows])
                if self.memory_z is not None:
                    gradient[rows] += d_scores[:, batch:] @ self.memory_z
                total += float(value.detach())
        return total, gradient

    def _rows(self) -> Iterator[slice]:
        for start in range(0, len(self.z), self.chunk):
            yield slice(start, min(start + self.chunk, len(self.z)))

    def _chunk(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        positive, excluded = masks(self.labels, rows.start, rows.stop, self.memory_labels)
        scores = self.z[rows] @ self.z.T
        if self.memory_z is not None:
            scores = torch.cat([scores, self.z[rows] @ self.memory_z.T], dim=1)
        return scores, positive, excluded

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(x).all()) for x in (self.z, self.memory_z) if x is not None)


@dataclass(frozen=True, slots=True)
class Pairwise:
    """An `Objective`: the mean of a row loss over the rows that have a positive.

    Args:
        loss: see the module's docstring.
        chunk: rows at once, by default chosen for the memory; changes the result by rounding only.
    """

    loss: RowLoss
    chunk: int | None = None

    def __call__(
        self, z: Tensor, labels: Tensor, memory_z: Tensor | None = None, memory_labels: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """See `Objective`."""
        batch = Similarities.of(z, labels, memory_z, memory_labels, self.chunk)
        count = num_queries(batch)

        def part(scores: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
            values, counted = self.loss(scores, positive, excluded)
            return (values * counted).sum() / max(count, 1)

        return batch.backward(part)


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """An `Objective`: a sum of others, each times its weight."""

    terms: tuple[tuple[float, Objective], ...]

    def __call__(
        self, z: Tensor, labels: Tensor, memory_z: Tensor | None = None, memory_labels: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """See `Objective`."""
        parts = [(weight, *objective(z, labels, memory_z, memory_labels)) for weight, objective in self.terms]
        value = sum(weight * value for weight, value, _ in parts)
        return value, torch.stack([weight * gradient for weight, _, gradient in parts]).sum(dim=0)


def num_queries(batch: Similarities) -> int:
    """Rows that have a positive."""
    labels = batch.labels if batch.memory_labels is None else torch.cat([batch.labels, batch.memory_labels])
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    known = batch.labels != UNLABELLED
    return int(((counts[inverse[: len(batch.labels)]] > 1) & known).sum())


def loss_and_gradient(loss: RowLoss, z: Tensor, labels: Tensor, chunk: int | None = None) -> tuple[float, Tensor]:
    """`Pairwise(loss, chunk)` of a batch without a memory."""
    return Pairwise(loss, chunk)(z, labels)


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
