"""InsCLR: learn instances from unlabelled photos by pseudo positives (Deng et al., AAAI 2022, arXiv:2112.01390).

A training has rounds. At the start of each, all photos are embedded by the network as it is, and each one's nearest
neighbours are found (`iir_dist.mine.neighbours`). A batch is anchors with their nearest neighbours, one augmented view of
each; pseudo positives are found in the batch and in a bank that has a vector of every photo. No two views of one photo
are compared: what is learnt is what photos of one instance have in common.

What is trained is the encoder's own descriptor (trunk, GeM, L2), so that the vectors of the embed stage, of the bank and
of the batch lie in one space. The authors train a linear layer behind it, which would have to be a part of the result; here
it can be learnt later (`finetune.projection`, `iir whiten`). Their batch norm takes its statistics from the batch; here
it is frozen (evaluation mode), so that a photo's vector does not depend on the batch that it is in. So it needs a network
that tells photos apart: ImageNet's, or one pretrained by another method (`encoder.weights`, `--init`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from iir_dist.data.augment import Recipe
from iir_dist.errors import ConfigError
from iir_dist.losses.instances import contrastive_sum, positives_in_batch, positives_of_others
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, with_gradient
from iir_dist.train.neighbours import Neighbours, NeighbourSampler
from iir_dist.vectors import I64

VIEW = Recipe(scale=(0.75, 1.0), jitter=0, grey=0, blur=0, interpolation="bilinear")
"""Crop and flip alone (zeludeng/insclr, configs/gldv2/base_stage1.yaml; its largest scale, 1.33, never fits)."""
_CHUNK_BYTES = 2**27
"""Of the bank's vectors that are compared at a time."""
_LIKE_ALL = 0.5
"""Part of random pairs that are positives, from which on a network counts as one that does not tell photos apart."""


class InsCLRConfig(MethodConfig):
    """InsCLR (arXiv:2112.01390; zeludeng/insclr, configs/gldv2). Thresholds are cosines.

    The authors select positives in a last stage only (impr.yaml) and take all of an anchor's neighbours before it; here
    they are selected in every round.
    """

    name: Literal["insclr"] = "insclr"
    rounds: int = Field(3, ge=1)
    """Parts of the training, neighbours being found anew at the start of each (the authors: 60,000 steps each)."""
    candidates: int = Field(500, ge=1)
    """Neighbours of each photo that the bank is searched for positives in; of a smaller set, all others."""
    nearest: int = Field(3, ge=1)
    """Of each anchor, that come into its batch (NEIGHBOR.K): of 256 photos, 64 are anchors."""
    selected: float = Field(0.6, ge=-1, le=1)
    """From which on two photos of a batch are positives (SELECTION.THRESH)."""
    sure: float = Field(0.75, ge=-1, le=1)
    """From which on a photo of the bank is a positive (XBM.POSITIVE_THRESH)."""
    never: float = Field(0.5, ge=-1, le=1)
    """Below which it is a negative (XBM.NEGATIVE_THRESH)."""
    mean: float = Field(0.6, ge=-1, le=1)
    """In between it is a positive from this mean cosine to a photo and its positives on (XBM.CANDIDATE_MODE, avg0.60)."""
    margin: float = Field(0.4, ge=-1, le=1)
    """Negatives above it are pushed (CONTRASTIVE_LOSS.MARGIN)."""
    bank_negatives: int = Field(100_000, ge=0)
    """Random photos of the bank beside the candidates (XBM.GET_SIZE)."""
    bank_start: int = Field(4000, ge=0)
    """Step of a round from which on they are used (XBM.GET_STEP)."""
    exact_rows: int = Field(500_000, ge=0)
    """Up to so many photos the search for neighbours is exact; beyond, an index is built for it."""
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-4}

    @model_validator(mode="after")
    def _in_order(self) -> InsCLRConfig:
        if self.never > self.sure:
            raise ValueError(
                f"never = {self.never} and sure = {self.sure}: below the first are negatives, from the second on positives; "
                "expected never <= sure"
            )
        return self


class _Bank:
    """A vector of every photo (n, D) float32: the round's at first, then the newest output. Each round begins anew."""

    def __init__(self, vectors: Tensor, first_step: int) -> None:
        self.z, self.first_step = vectors.clone(), first_step

    def state_dict(self) -> dict[str, Any]:
        return {"z": self.z, "first_step": self.first_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["first_step"] == self.first_step:  # else that of the round before, whose end this one starts from
            self.z.copy_(state["z"])


class InsCLR(Method):
    """See the module. Each photo of the batch, anchor or not, is judged and pulled by its own candidates.

    Memory: 8 n D bytes of a worker's device for a set of n photos (the bank, and the vectors that positives are found
    by), 4 n k of its host.

    Raises:
        ConfigError: the network gives nearly all photos of the set alike vectors.
    """

    descriptor = True
    remedy = "lower optim.lr, raise method.selected, method.sure and method.mean, or lower method.margin"

    def __init__(self, config: InsCLRConfig, context: Context) -> None:
        assert context.neighbours is not None
        self.config, self.seed, self.neighbours = config, context.seed, context.neighbours
        self.recipes = (context.recipe(VIEW),)
        self.passes = (Pass((0,)),)
        self.head = nn.Identity()
        self.sampler: NeighbourSampler = NeighbourSampler(self.neighbours, context.batch, config.nearest, context.seed)
        self.reference = torch.from_numpy(self.neighbours.vectors).to(context.device)
        self.memory: _Bank = _Bank(self.reference, self.neighbours.first_step)
        self._own = self.reference[:0]
        _refuse_alike(self.neighbours, config, context.seed)

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`: the sums over all pairs with a photo of the batch, divided by the number of these."""
        c, z = self.config, z[0]
        numbers = self.sampler.batch(step)
        rows = torch.from_numpy(numbers).to(z.device)
        self._own = own = self.reference[rows]
        positive = positives_in_batch(own @ own.T, c.selected)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        total = contrastive_sum((z @ z.T).masked_fill(itself, c.margin), positive, c.margin)
        value, gradient = self._against_bank(self._others(step, numbers), z.detach(), own, positive)
        self.memory.z[rows] = z.detach().to(self.memory.z)
        return (total + with_gradient(value, z, gradient)) / len(z)

    def pair(self, z: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Method`: the views, and the same photos as they were when the round began."""
        return z[0], self._own.to(z)

    def _against_bank(self, others: I64, z: Tensor, own: Tensor, positive: Tensor) -> tuple[float, Tensor]:
        """The sum over pairs of the batch with others, and its gradient with respect to z, part by part."""
        c, value, gradient = self.config, 0.0, torch.zeros_like(z)
        size = max(1, _CHUNK_BYTES // (z.shape[1] * z.element_size()))
        for columns in torch.from_numpy(others).to(z.device).split(size):
            found = positives_of_others(own @ self.reference[columns].T, positive, c.sure, c.never, c.mean)
            bank = self.memory.z[columns].to(z)
            scores = (z @ bank.T).requires_grad_()
            part = contrastive_sum(scores, found, c.margin)
            (slope,) = torch.autograd.grad(part, scores)
            value += float(part.detach())
            gradient += slope @ bank
        return value, gradient

    def _others(self, step: int, numbers: I64) -> I64:
        """Numbers of the bank's photos that the batch is compared with: all its candidates, and later random ones.

        The batch's own are left out: they are compared as they are now.
        """
        near = self.neighbours.candidates[numbers]
        n, c = len(self.neighbours.candidates), self.config
        if c.bank_negatives and step - self.neighbours.first_step >= c.bank_start:
            rng = np.random.default_rng([self.seed, step, 1])
            near = np.append(near, rng.choice(n, min(c.bank_negatives, n), replace=False))
        return np.setdiff1d(near[near >= 0], numbers).astype(np.int64)


def _refuse_alike(neighbours: Neighbours, config: InsCLRConfig, seed: int) -> None:
    x, n = neighbours.vectors, len(neighbours.vectors)
    rng = np.random.default_rng(seed)
    a = rng.integers(n, size=1000)
    b = (a + rng.integers(1, n, size=1000)) % n
    cosines = np.einsum("nd,nd->n", x[a], x[b])
    part = float((cosines >= config.selected).mean())
    if part > _LIKE_ALL:
        raise ConfigError(
            f"{part:.0%} of random pairs of photos have a cosine of {config.selected} (method.selected) or more, in the "
            f"mean {cosines.mean():.2f}, so most photos would be positives of each other; start from a network that tells "
            "photos apart (encoder.weights, --init), or raise selected, sure, never, mean and margin alike"
        )
