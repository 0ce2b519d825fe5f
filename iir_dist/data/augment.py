"""Random views of a photo, as a pure function of a seed: the same photo, step and view always give the same pixels.

The recipes of self-supervised learning work on (3, S, S) float32 in [0, 255] from the crop to the end and round once. In
NumPy and not in torch, so that no number of threads can change a sum.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

F32 = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]

RATIO = 4 / 3
"""The longer side of a crop over the shorter is at most this, as everywhere (arXiv:1409.4842)."""
SIGMA = (0.1, 2.0)
"""px; the blur's standard deviation is uniform in between."""
GREY = (0.299, 0.587, 0.114)
"""ITU-R 601-2 luma, as in Pillow and torchvision."""


class View(Protocol):
    """(upright RGB image, seed) -> (3, size, size) uint8. Of one class that can be pickled: loaders are sent it."""

    @property
    def least(self) -> int | None:
        """px of the shorter side below which a smaller decoding would be enlarged; None: wants all pixels."""

    def __call__(self, image: Image.Image, seed: int) -> Tensor: ...


def seed_of(*parts: int) -> int:
    """A 63-bit seed that depends on all parts (run seed, step, sample, view)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Recipe(BaseModel):
    """How one view is drawn: crop, colour jitter, grey, blur, solarisation, flip, in this order.

    Strengths are those of torchvision's ColorJitter, whose four changes come in random order. The blur's kernel is a
    tenth of the crop (arXiv:2002.05709, appendix A), its sigma between 0.1 and 2 px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(224, ge=1)
    """px of the crop's both sides."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and most part of the photo's area that a crop covers."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability, as are `jitter`, `grey`, `blur` and `solarize`."""
    jitter: float = Field(0.8, ge=0, le=1)
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    """Of a full turn."""
    grey: float = Field(0.2, ge=0, le=1)
    blur: float = Field(0.5, ge=0, le=1)
    solarize: float = Field(0.0, ge=0, le=1)
    """Values from 128 on are inverted."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @field_validator("scale")
    @classmethod
    def _a_part(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; expected least and most part of the area, 0 < least <= most <= 1")
        return scale


SIMCLR = Recipe(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
"""arXiv:2002.05709, appendix A, at colour strength 1; google-research/simclr, data_util.py."""

MOCO_V2 = Recipe(scale=(0.2, 1.0), interpolation="bilinear")
"""arXiv:2003.04297; facebookresearch/moco, main_moco.py with --aug-plus. SimSiam takes the same (arXiv:2011.10566)."""

BYOL_A = Recipe(saturation=0.2, blur=1.0)
"""arXiv:2006.07733, table 6; of Barlow Twins (arXiv:2103.03230) too, and of MoCo v3 (arXiv:2104.02057), where crops cover
at least 0.2 and are bilinear."""

BYOL_B = BYOL_A.model_copy(update={"blur": 0.1, "solarize": 0.2})
"""The other view of the pair; same sources."""

VICREG = BYOL_A.model_copy(update={"blur": 0.5, "solarize": 0.1})
"""arXiv:2105.04906, appendix C: both views alike."""

SWAV_GLOBAL = SIMCLR.model_copy(update={"scale": (0.14, 1.0), "interpolation": "bilinear"})
"""arXiv:2006.09882, appendix A; facebookresearch/swav, multicropdataset.py."""

SWAV_LOCAL = SWAV_GLOBAL.model_copy(update={"size": 96, "scale": (0.05, 0.14)})
"""The small crops; same sources."""

DINO_GLOBAL_1 = BYOL_A.model_copy(update={"scale": (0.14, 1.0)})
"""arXiv:2104.14294; facebookresearch/dino, main_dino.py, with the scales of its ResNet-50. (Where no scale is said, that
code cuts ViTs' large and small crops at 0.4.)"""

DINO_GLOBAL_2 = BYOL_B.model_copy(update={"scale": (0.14, 1.0)})
"""The second large crop; same sources."""

DINO_LOCAL = DINO_GLOBAL_1.model_copy(update={"size": 96, "scale": (0.05, 0.14), "blur": 0.5})
"""The small crops; same sources."""


def view_of(recipe: Recipe) -> View:
    """The view that a recipe describes: (upright RGB image, seed) -> (3, size, size) uint8."""
    return _Drawn(recipe)


def mild(size: int, min_scale: float = 0.4) -> View:
    """For fine-tuning: colour jitter, crop and flip, as Revaud et al. (arXiv:1906.07589, section 4.1) describe."""
    return _Seeded(
        v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.0)], p=0.5),
    )


class _Seeded:
    """torchvision's transforms, crop first, from one seed. A class and not a closure, because loaders get it pickled."""

    least: int | None = None

    def __init__(self, crop: v2.Transform, *rest: v2.Transform) -> None:
        # Cropping on the PIL image first keeps the colour operations on few pixels.
        self.crop, self.colours = crop, v2.Compose([v2.ToImage(), *rest])

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        # torchvision draws from torch's global generator, so it is borrowed for the length of the call.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.colours(self.crop(image)).as_subclass(Tensor)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Drawn:
    """A recipe's view; all that is random comes from one generator of its own."""

    recipe: Recipe

    @property
    def least(self) -> int:
        """From this shorter side on, the smallest and narrowest crop has `size` px a side."""
        return math.ceil(self.recipe.size / math.sqrt(self.recipe.scale[0] / RATIO))

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        recipe, rng = self.recipe, random.Random(seed)
        resample = Image.Resampling[recipe.interpolation.upper()]
        box = crop_box(*image.size, recipe.scale, rng)
        crop = image.resize((recipe.size, recipe.size), resample, box)
        x = np.asarray(crop).transpose(2, 0, 1).astype(np.float32, order="C")
        if rng.random() < recipe.jitter:
            x = _jitter(x, recipe, rng)
        if rng.random() < recipe.grey:
            x = np.broadcast_to(_grey(x), x.shape)
        if rng.random() < recipe.blur:
            x = _blur(x, max(3, recipe.size // 10 | 1), rng.uniform(*SIGMA))
        if rng.random() < recipe.solarize:
            x = np.where(x >= 128, 255 - x, x)
        if rng.random() < recipe.flip:
            x = x[:, :, ::-1]
        return torch.from_numpy((x + 0.5).astype(np.uint8, order="C"))


def crop_box(width: float, height: float, scale: tuple[float, float], rng: random.Random) -> Box:
    """x1 y1 x2 y2 of a random crop, not rounded, so that it is the same part of the photo however small it was decoded.

    As torchvision's RandomResizedCrop: area uniform in `scale`, ratio of the sides log-uniform; where ten draws do not
    fit, the largest central box that keeps the bound of the ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = RATIO ** rng.uniform(-1, 1)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            break
    else:
        w, h = min(width, height * RATIO), min(height, width * RATIO)
        x, y = (width - w) / 2, (height - h) / 2
    return x, y, min(x + w, width), min(y + h, height)  # sums round upwards too


def _jitter(x: F32, recipe: Recipe, rng: random.Random) -> F32:
    changes: list[tuple[Callable[[F32, float], F32], float, float]] = [
        (_brightness, recipe.brightness, 1), (_contrast, recipe.contrast, 1), (_saturation, recipe.saturation, 1),
        (_hue, recipe.hue, 0),
    ]  # fmt: skip
    rng.shuffle(changes)
    for change, strength, neutral in changes:
        if strength:
            x = change(x, rng.uniform(max(0, neutral - strength) if neutral else -strength, neutral + strength))
    return x


def _grey(x: F32) -> F32:
    grey: F32 = x[0] * GREY[0] + x[1] * GREY[1] + x[2] * GREY[2]
    return grey


def _blend(x: F32, other: F32 | float, factor: float) -> F32:
    """`x` where the factor is 1, `other` where it is 0, and beyond x above 1."""
    blended: F32 = x * factor + other * (1 - factor)
    np.clip(blended, 0, 255, out=blended)
    return blended


def _brightness(x: F32, factor: float) -> F32:
    return _blend(x, 0.0, factor)


def _contrast(x: F32, factor: float) -> F32:
    return _blend(x, float(_grey(x).mean()), factor)


def _saturation(x: F32, factor: float) -> F32:
    return _blend(x, _grey(x), factor)


def _hue(x: F32, turn: float) -> F32:
    """Turns the hue of HSV by a part of a full turn, at most half of one.

    Value V and chroma C stay. A channel is V - C clip(2 - d, 0, 1), where d is how far the hue is, in sixths of the
    circle, from the channel's complement. Times C, all of it is piecewise linear in the pixel: nothing is divided, and
    grey needs no case of its own.
    """
    r, g, b = x
    top = np.maximum(np.maximum(r, g), b)
    chroma = top - np.minimum(np.minimum(r, g), b)
    twice = 2 * chroma
    # (hue - 2) C, in sixths from red: within 3 C of 0, and once turned within 6 C
    hue = np.where(top == r, g - b - twice, np.where(top == g, b - r, r - g + twice))
    hue += chroma * (6 * turn)
    out = np.empty_like(x)
    for channel, offset in enumerate((-1, 3, 1)):  # 2 less the complements: cyan 3, magenta 5, yellow 1 (of 6)
        far = np.abs(hue + chroma * offset)
        far = np.minimum(far, np.abs(3 * twice - far))  # around the circle of 6
        np.subtract(top, np.clip(twice - far, 0, chroma), out=out[channel])
    return out


def _blur(x: F32, kernel: int, sigma: float) -> F32:
    """Gaussian of `kernel` px, the edges mirrored; what lies beyond 4 sigma would not change a level."""
    radius = min(kernel // 2, math.ceil(4 * sigma))
    weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for _ in range(2):  # along the rows, then along the columns
        padded = np.pad(x, ((0, 0), (radius, radius), (0, 0)), mode="reflect")
        rows = x.shape[1]
        x = padded[:, radius : radius + rows] * (weights[0] / total)
        for d in range(1, radius + 1):
            pair = padded[:, radius - d : radius - d + rows] + padded[:, radius + d : radius + d + rows]
            pair *= weights[d] / total
            x += pair
        x = x.transpose(0, 2, 1)
    return x
