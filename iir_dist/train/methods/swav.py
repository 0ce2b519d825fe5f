"""SwAV: predict the cluster of one view from the others (Caron et al., NeurIPS 2020, arXiv:2006.09882)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from iir_dist.data.augment import SWAV_GLOBAL, SWAV_LOCAL
from iir_dist.losses.clusters import swapped_prediction
from iir_dist.train.memory import CrossBatchMemory
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, mlp, random_units, unit


class SwAVConfig(MethodConfig):
    """SwAV (arXiv:2006.09882)."""

    name: Literal["swav"] = "swav"
    dim: int = Field(128, ge=2)
    prototypes: int = Field(3000, ge=2)
    temperature: float = Field(0.1, gt=0)
    epsilon: float = Field(0.05, gt=0)
    """Of Sinkhorn's entropy."""
    iterations: int = Field(3, ge=1)
    """Of Sinkhorn."""
    local_views: int = Field(6, ge=0)
    """Small crops beside the two large ones."""
    queue: int = Field(0, ge=0)
    """Outputs of earlier batches that Sinkhorn sees too; 3,840 for batches of 256, 0 for 4,096."""
    queue_start: int = Field(0, ge=0)
    """First step that uses the queue (the authors: epoch 15)."""
    freeze_prototypes: int = Field(313, ge=0)
    """Steps in which the prototypes stay; 313 at a batch of 4,096, 5,005 at 256: one epoch."""
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "final": 1e-3}


class _Queues:
    """One memory for each of the two large views."""

    def __init__(self, config: SwAVConfig, device: torch.device) -> None:
        self.rings = [CrossBatchMemory(config.queue, config.dim, device=device) for _ in range(2)]

    def state_dict(self) -> dict[str, Any]:
        return {str(i): ring.state_dict() for i, ring in enumerate(self.rings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, ring in enumerate(self.rings):
            ring.load_state_dict(state[str(i)])


class SwAV(Method):
    """Prototypes are the loss's own weights, of unit norm; assignments balance over the global batch and the queue."""

    remedy = "lower method.epsilon, keep the prototypes frozen longer, or lower optim.lr"

    def __init__(self, config: SwAVConfig, context: Context) -> None:
        self.config = config
        local = config.local_views
        self.recipes = (context.recipe(SWAV_GLOBAL),) * 2 + (context.recipe(SWAV_LOCAL, local=True),) * local
        self.passes = (Pass((0, 1)),) + ((Pass(tuple(range(2, 2 + local))),) if local else ())
        self.head = mlp([context.width, context.width, config.dim])
        self.weights = nn.Module()
        self.weights.prototypes = nn.Parameter(random_units(config.prototypes, config.dim, context.seed))
        self.memory: _Queues | None = _Queues(config, context.device) if config.queue else None

    def trains_weights(self, step: int) -> bool:
        """See `Method`."""
        return step >= self.config.freeze_prototypes

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        c, prototypes = self.config, self.weights.prototypes
        assert isinstance(prototypes, Tensor)
        with torch.no_grad():
            prototypes.copy_(unit(prototypes))
        z = unit(z)
        queued = self._queued(step, z)
        scores = z @ prototypes.T
        return swapped_prediction(scores, queued, c.temperature, c.epsilon, c.iterations)

    @torch.no_grad()
    def _queued(self, step: int, z: Tensor) -> Tensor | None:
        """Scores (2, M, K) of what the queues hold, once they are full; then the batch is taken in."""
        if self.memory is None:
            return None
        rings, prototypes = self.memory.rings, self.weights.prototypes
        assert isinstance(prototypes, Tensor)
        full = step >= self.config.queue_start and all(len(ring) == self.config.queue for ring in rings)
        found = [ring.contents(step)[0] for ring in rings] if full else []
        for view, ring in enumerate(rings):
            ring.add(step, z[view], torch.full((z.shape[1],), -1, device=z.device))
        return torch.stack([x.to(z) @ prototypes.T for x in found if x is not None]) if found else None
