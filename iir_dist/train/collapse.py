"""Whether a network still tells photos apart, seen in the vectors of a probe set without any label.

Self-supervised training can fall into giving all photos one vector (complete collapse), or vectors in a few directions
only (dimensional collapse), while its loss looks fine.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from iir_dist.losses.pairwise import UNLABELLED

LEAST_SPREAD = 0.005
"""A third of what a random ResNet-101 gives, whose batch norm has seen no photo yet."""
LEAST_SPREAD_OF_HEAD = 0.1
"""Of the outputs of a head in training: 0.14 to 0.24 at the start, 0.06 where SimSiam was made to collapse."""
_LEAST_RANK = 0.02
"""Of the full rank."""
_CHUNK_BYTES = 2**24
"""Of one block of similarities or of vectors in float64; a few of them live at a time."""


@dataclass(frozen=True, slots=True)
class Health:
    """Of n unit vectors of dimension D; all are NaN where a vector is not finite."""

    spread: float
    """Standard deviation of a component over the vectors, mean over components, times sqrt(D): 1 for vectors spread
    evenly over the sphere, 0 where all are the same (Chen and He, arXiv:2011.10566, figure 2)."""
    effective_rank: float
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli, "The Effective Rank", EUSIPCO
    2007), of the vectors less their mean: 1 to min(D, n - 1). Without taking the mean off it would say how far the
    vectors lean to one side, which `spread` says already."""
    uniformity: float
    """log of the mean of exp(-2 |x - y|^2) over all pairs: 0 where all are the same, about -4 spread evenly in many
    dimensions (Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on
    the Hypersphere", ICML 2020, arXiv:2005.10242, with t = 2)."""
    alignment: float | None
    """Mean |x - y|^2 over pairs of equal label (ibidem, alpha = 2); None where there is none."""
    full_rank: int
    """min(D, n - 1)."""

    @classmethod
    @torch.no_grad()
    def of(cls, z: Tensor, labels: Tensor | None = None) -> Health:
        """Measure vectors; time grows with n^2 D, memory beyond theirs with min(n, D)^2.

        Args:
            z: (n, D) unit vectors, n of 2 or more. Half precision is computed in float32.
            labels: (n,) int64; -1 equals nothing.

        Raises:
            ValueError: fewer than two vectors.
        """
        n, dim = z.shape
        if n < 2:  # no pair
            raise ValueError(f"expected two vectors or more, got {n}")
        full_rank = min(dim, n - 1)
        if not torch.isfinite(z).all():
            return cls(math.nan, math.nan, math.nan, None if labels is None else math.nan, full_rank)
        z = z if z.dtype == torch.float64 else z.float()
        with torch.autocast(z.device.type, enabled=False):
            spread = float(z.std(dim=0, correction=0).mean()) * math.sqrt(dim)
            uniformity, alignment = _pairs(z, labels)
            return cls(spread, _effective_rank(z - z.mean(dim=0)), uniformity, alignment, full_rank)

    def as_dict(self) -> dict[str, float]:
        """What there is to log."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "full_rank"}

    def warning(self, least_spread: float = LEAST_SPREAD) -> str | None:
        """What has collapsed and what to do about it, to be put behind "at step 10", or None.

        The limits are far below what random networks give on photos, which lean to one side but tell them apart:

                                spread         effective rank of the full one
            ResNet-18           0.12 to 0.17   0.63 to 0.76
            ResNet-50           0.06           0.70
            ResNet-101          0.015          0.75
            ViT, ConvNeXt tiny  0.30 to 0.76   0.21 to 0.78

        Some steps of training put the batch norm right, and spread rises (0.33 to 0.46 for ResNet-18).

        Args:
            least_spread: below it the vectors count as one.
        """
        if math.isnan(self.spread):
            return "the probe's vectors are not finite: lower the learning rate or lengthen its warm-up"
        if self.spread < least_spread:
            return (
                f"the network has collapsed completely, all photos get nearly the same vector (spread {self.spread:.2g}; "
                f"expected above {least_spread}): start again from an earlier checkpoint with a lower learning "
                "rate or a longer warm-up, check that the head has its batch norm, raise the momentum of the target "
                "network, or take more negatives (a larger batch or queue)"
            )
        # Few directions are no collapse: below 150 of them 3 are wanted, and below 30 a tenth.
        least = max(_LEAST_RANK * self.full_rank, min(3.0, 0.1 * self.full_rank))
        if self.effective_rank < least:
            return (
                f"the network's dimensions have collapsed, vectors differ in few of {self.full_rank} directions (effective "
                f"rank {self.effective_rank:.3g}; expected above {least:.3g}): lower the learning rate or the "
                "weight decay, take more negatives, or raise the weight of the term that decorrelates components"
            )
        return None


def _effective_rank(x: Tensor) -> float:
    """Singular values as roots of the eigenvalues of the smaller Gram matrix, in float64."""
    x = x if len(x) > x.shape[1] else x.T
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(max(1, _CHUNK_BYTES // (8 * x.shape[1]))):
        part = part.double()
        gram.addmm_(part.T, part)
    # Threads wait for each other all the time here: where another process is busy, two of them took 1.2 s instead of 13 ms.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    finally:
        torch.set_num_threads(threads)
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return math.exp(-float(torch.xlogy(share, share).sum()))


def _pairs(z: Tensor, labels: Tensor | None) -> tuple[float, float | None]:
    """Uniformity and alignment; each pair once, in blocks of rows against all later ones."""
    n = len(z)
    potential, distance, equal = 0.0, 0.0, 0
    rows = max(1, _CHUNK_BYTES // (z.element_size() * n))
    for start in range(0, n, rows):
        squared = (2 - 2 * (z[start : start + rows] @ z[start:].T)).clamp_(min=0)
        later = torch.ones_like(squared, dtype=torch.bool).triu_(diagonal=1)
        if labels is not None:
            own = labels[start : start + rows, None]
            same = later & (own == labels[start:]) & (own != UNLABELLED)
            distance += float(squared[same].sum(dtype=torch.float64))
            equal += int(same.sum())
        potential += float(squared.mul_(-2).exp_().mul_(later).sum(dtype=torch.float64))
    uniformity = math.log(potential / (n * (n - 1) / 2))
    return uniformity, distance / equal if equal else None
