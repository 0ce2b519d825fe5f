"""Baselines of pairs and triplets, on the similarities of the batch: contrastive, triplet, multi-similarity.

As everywhere here, a row without a positive is no query: it stays a column, so that others are pushed away from it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from iir_dist.losses.pairwise import Similarities
from iir_dist.losses.parameters import Parameters


class _Pairs(Parameters):
    """An `Objective`: mean over the positive pairs that still cost something, plus the same over negative pairs.

    Both counts are those of the whole batch, whatever the chunks. Pairs at cost 0 do not dilute the mean, as in the
    code released with arXiv:2110.01445.
    """

    def costs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, N) -> cost of each pair if it is positive, and if it is negative."""
        raise NotImplementedError

    def __call__(
        self, z: Tensor, labels: Tensor, memory_z: Tensor | None = None, memory_labels: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """See `iir_dist.losses.pairwise.Objective`."""
        batch = Similarities.of(z, labels, memory_z, memory_labels)

        def split(scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
            pull, push = self.costs(scores)
            negative = ~(positive | excluded) & positive.any(dim=1, keepdim=True)
            return pull * positive, push * negative

        counts = batch.total(lambda *chunk: torch.stack([(cost > 0).sum() for cost in split(*chunk)]))
        num_pull, num_push = (int(count) for count in counts.clamp(min=1))

        def part(scores: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
            pull, push = split(scores, positive, excluded)
            return pull.sum() / num_pull + push.sum() / num_push

        return batch.backward(part)


class Contrastive(_Pairs):
    """max(0, positive_margin - s) of positive pairs, max(0, s - negative_margin) of negative ones, s their cosine.

    The calibration term of ROADMAP, arXiv:2110.01445, where it keeps one threshold for all queries.
    """

    positive_margin: float = 0.9
    negative_margin: float = 0.6

    def costs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return (self.positive_margin - scores).clamp(min=0), (scores - self.negative_margin).clamp(min=0)


class EuclideanContrastive(_Pairs):
    """d^2 / 2 of positive pairs, max(0, margin - d)^2 / 2 of negative ones, with d^2 = 2 - 2s.

    Radenovic, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", arXiv:1711.02512.
    Departure: the mean over the pairs of a batch in place of the sum over mined tuples.
    """

    margin: float = Field(0.85, gt=0)
    """Of GeM networks in the paper."""

    def costs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        squared: Tensor = (2 - 2 * scores).clamp(min=1e-12)  # the root has no gradient at 0
        return squared / 2, (self.margin - squared.sqrt()).clamp(min=0).square() / 2


class Triplet(Parameters):
    """max(0, margin - s_p + s_n) of a positive and a negative of each row.

    hard: the least similar positive and the most similar negative (batch hard of Hermans, Beyer and Leibe, "In Defense
    of the Triplet Loss", arXiv:1703.07737, equation 5). semihard: every positive, mean over them, each with the most
    similar negative that is less similar than the positive (Schroff, Kalenichenko and Philbin, "FaceNet",
    arXiv:1503.03832); a positive without one costs nothing.
    """

    margin: float = Field(0.1, gt=0)
    """Of cosines; half of the margin of squared distances, which is 0.2 in FaceNet."""
    mining: Literal["hard", "semihard"] = "hard"

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`; a row without a negative costs 0."""
        num_positive = positive.sum(dim=1)
        negatives = scores.masked_fill(positive | excluded, -torch.inf)
        if self.mining == "hard":
            furthest = scores.masked_fill(~positive, torch.inf).amin(dim=1)
            return (self.margin - furthest + negatives.amax(dim=1)).clamp(min=0), num_positive > 0
        row, column = positive.nonzero(as_tuple=True)
        rising = negatives.sort(dim=1).values  # from -inf, which stands for all others
        number_below = torch.searchsorted(rising.detach(), scores.detach())[row, column]
        cost = (self.margin - scores[row, column] + rising[row, number_below - 1]).clamp(min=0)
        return scores.new_zeros(len(scores)).index_add(0, row, cost) / num_positive.clamp(min=1), num_positive > 0


class MultiSimilarity(Parameters):
    """Soft weights on mined pairs of each row.

    Wang, Han, Huang, Dong and Scott, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
    2019, arXiv:1904.06627. Kept are negatives more similar than the least similar positive - epsilon, and positives
    less similar than the most similar negative + epsilon; then

        log(1 + sum_p exp(-alpha (s_p - base))) / alpha + log(1 + sum_n exp(beta (s_n - base))) / beta

    averaged over all rows that have a positive; a row without a pair left costs 0.
    """

    alpha: float = Field(2.0, gt=0)
    beta: float = Field(50.0, gt=0)
    base: float = 0.5
    """lambda; of the released code."""
    epsilon: float = Field(0.1, ge=0)

    def __call__(self, scores: Tensor, positive: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Args and result as in `iir_dist.losses.pairwise`."""
        negative = ~(positive | excluded)
        seen = scores.detach()
        least = seen.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
        most = seen.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
        pull = _log_one_plus(-self.alpha * (scores - self.base), positive & (seen < most + self.epsilon)) / self.alpha
        push = _log_one_plus(self.beta * (scores - self.base), negative & (seen > least - self.epsilon)) / self.beta
        return pull + push, positive.any(dim=1)


def _log_one_plus(logits: Tensor, kept: Tensor) -> Tensor:
    """(Q, N) -> (Q,): log(1 + sum of exp over the kept ones)."""
    return torch.logsumexp(F.pad(logits.masked_fill(~kept, -torch.inf), (0, 1)), dim=1)
