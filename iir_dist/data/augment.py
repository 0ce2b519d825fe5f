"""Random views of a photo, as a pure function of a seed: the same photo, step and view always give the same pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

View = Callable[[Image.Image, int], Tensor]
"""(upright RGB image, seed) -> (3, size, size) uint8."""


def seed_of(*parts: int) -> int:
    """A 63-bit seed that depends on all parts (run seed, step, sample, view)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def contrastive(size: int, min_scale: float = 0.2) -> View:
    """SimCLR's recipe: crop, flip, colour jitter, grey, blur (arXiv:2002.05709, appendix A; strengths of MoCo v2)."""
    kernel = max(3, size // 10 | 1)
    return _Seeded(
        v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5),
    )


def mild(size: int, min_scale: float = 0.4) -> View:
    """For fine-tuning: colour jitter, crop and flip, as Revaud et al. (arXiv:1906.07589, section 4.1) describe."""
    return _Seeded(
        v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.0)], p=0.5),
    )


class _Seeded:
    """Crop, then colours, from one seed. A class and not a closure, because loaders get it pickled."""

    def __init__(self, crop: v2.Transform, *rest: v2.Transform) -> None:
        # Cropping on the PIL image first keeps the colour operations on few pixels.
        self.crop, self.colours = crop, v2.Compose([v2.ToImage(), *rest])

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        # torchvision draws from torch's global generator, so it is borrowed for the length of the call.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.colours(self.crop(image)).as_subclass(Tensor)  # type: ignore[no-any-return]
