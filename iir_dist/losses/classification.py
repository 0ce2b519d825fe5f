"""Classification of the batch, with one learnt vector a class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iir_dist.losses.pairwise import UNLABELLED

_CHUNK_BYTES = 2**24


class ArcFace(nn.Module):
    """Cross entropy of cosines to class vectors, the true one at an angle made wider by a margin.

    Deng, Guo, Xue and Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
    arXiv:1801.07698, equation 3. With theta_c the angle to class c and y the label,

        -log(e^(scale cos(theta_y + margin)) / (e^(scale cos(theta_y + margin)) + sum_{c != y} e^(scale cos theta_c)))

    Where theta_y + margin would pass pi, cos(theta_y) - margin sin(margin) takes the place of the cosine, so that it
    goes on falling (the authors' code).

    An `Objective` and a module: a call adds the gradient of the class vectors to `weight.grad`. Every worker sees the
    global batch and would add the same, so where gradients are summed over workers all but one set `contributes` to
    False. The memory is not used.

    Args:
        num_classes: C; labels are 0..C-1, and -1 for images that take no part.
        dim: D.
        margin: radians.
        scale: inverse temperature.
        seed: of the first class vectors, which are uniform on the sphere.
    """

    def __init__(self, num_classes: int, dim: int, margin: float = 0.3, scale: float = 32.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= margin < math.pi / 2 or scale <= 0:
            raise ValueError(f"expected 0 <= margin < pi/2 and scale > 0, got margin={margin} and scale={scale}")
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, dim, generator=generator), dim=1))
        self.margin, self.scale = margin, scale
        self.contributes = True
        """Whether calls add to `weight.grad`."""

    def forward(
        self, z: Tensor, labels: Tensor, memory_z: Tensor | None = None, memory_labels: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """See `iir_dist.losses.pairwise.Objective`; the mean is over labelled images."""
        z = z.detach()
        z = z if z.dtype == torch.float64 else z.float()
        gradient = torch.zeros_like(z)
        if not torch.isfinite(z).all():
            return float("nan"), gradient.fill_(float("nan"))
        rows = (labels != UNLABELLED).nonzero()[:, 0]
        total, d_weight = 0.0, torch.zeros_like(self.weight, dtype=z.dtype)
        with torch.autocast(z.device.type, enabled=False), torch.enable_grad():
            for part in rows.split(max(1, _CHUNK_BYTES // (len(self.weight) * z.element_size()))):
                leaf, weight = z[part].requires_grad_(), self.weight.detach().to(z.dtype).requires_grad_()
                logits = self.scale * self.cosines(leaf, weight, labels[part])
                loss = F.cross_entropy(logits, labels[part], reduction="sum") / max(1, len(rows))
                gradient[part], d_part = torch.autograd.grad(loss, [leaf, weight])
                d_weight += d_part
                total += float(loss.detach())
        if self.contributes:
            d_weight = d_weight.to(self.weight.dtype)
            self.weight.grad = d_weight if self.weight.grad is None else self.weight.grad + d_weight
        return total, gradient

    def cosines(self, z: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """(Q, D), (C, D), (Q,) -> (Q, C) cosines, that of the label with the margin."""
        cosines = z @ F.normalize(weight, dim=1).T
        own = cosines.gather(1, labels[:, None])
        sine = (1 - own.square()).clamp(min=1e-6).sqrt()  # the root has no gradient at 0
        wider = own * math.cos(self.margin) - sine * math.sin(self.margin)
        fallen = own - self.margin * math.sin(self.margin)
        wider = torch.where(own > math.cos(math.pi - self.margin), wider, fallen)
        return cosines.scatter(1, labels[:, None], wider)
