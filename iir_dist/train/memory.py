"""Cross-batch memory: embeddings of the last batches as further things to be told apart (arXiv:1912.06798, XBM).

What is kept are gathered embeddings of the global batch, in its order. So every worker holds the same memory, any
number of workers has the same, and nothing needs to be exchanged. It belongs into the checkpoint: a run that goes on
without it would start again with an empty one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iir_dist.errors import MismatchError


class CrossBatchMemory:
    """A ring of `size` embeddings with their labels; where it is full, the oldest are overwritten.

    Embeddings are stored as float32, whatever they are computed in: losses are not computed in less, and a memory in
    half precision would differ from the batch that it is compared with.

    Args:
        size: embeddings held at most, 4 D + 8 bytes each.
        dim: D.
        start_step: the memory is neither filled nor used before this step. At the beginning embeddings change too
            fast to be of use (the paper's "slow drift" comes later).
        device: where it lies; that of the embeddings saves copies.
    """

    def __init__(self, size: int, dim: int, start_step: int = 0, device: torch.device | str = "cpu") -> None:
        self.size, self.dim, self.start_step = size, dim, start_step
        self._z = torch.zeros(size, dim, device=device)
        self._labels = torch.full((size,), -1, dtype=torch.int64, device=device)
        self._next = self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @torch.no_grad()
    def add(self, step: int, z: Tensor, labels: Tensor) -> None:
        """Take in the embeddings of a step; of a batch larger than the memory, its last ones. Nothing before the start.

        Args:
            z: (B, D) unit vectors of the global batch, in its order; no graph is kept.
            labels: (B,) int64; -1 is allowed.
        """
        if step < self.start_step:
            return
        z, labels = z.detach()[-self.size :], labels[-self.size :]
        rows = (self._next + torch.arange(len(z), device=self._z.device)) % self.size
        self._z[rows] = z.to(self._z)
        self._labels[rows] = labels.to(self._labels)
        self._next = (self._next + len(z)) % self.size
        self._filled = min(self.size, self._filled + len(z))

    def contents(self, step: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Copies of embeddings (n, D) float32 and labels (n,) int64, oldest first; None before the start or while empty."""
        if step < self.start_step or not self._filled:
            return None, None
        if self._filled < self.size:  # then it has not come round: the oldest is the first
            return self._z[: self._filled].clone(), self._labels[: self._filled].clone()
        return self._z.roll(-self._next, 0), self._labels.roll(-self._next)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers, for a checkpoint; the tensors are the memory's own."""
        return {"z": self._z, "labels": self._labels, "next": self._next, "filled": self._filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the memory that `state` is of.

        Raises:
            MismatchError: that one had another size or dimension.
        """
        if tuple(state["z"].shape) != (self.size, self.dim):
            there = " x ".join(map(str, state["z"].shape))
            raise MismatchError(
                f"the checkpoint has a memory of {there}, this run one of {self.size} x {self.dim}; set the size that it "
                "was begun with, or begin anew with --force"
            )
        self._z.copy_(state["z"])
        self._labels.copy_(state["labels"])
        self._next, self._filled = int(state["next"]), int(state["filled"])
