"""From the bytes of a photo to the pixels that a network sees; the one place where that is decided.

Decoding rules: Pillow; EXIF orientation applied; the first frame of an animation; 16-bit scaled to 8; alpha composed
over white; everything else through Pillow's conversion to RGB. The stored bytes always stay the original file.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from iir_dist.errors import ImageError

REASONS = {
    "empty": "the file has no bytes",
    "not_an_image": "the bytes are not those of an image format that is known here",
    "corrupt": "the image cannot be decoded to the end",
    "too_large": "more pixels or bytes than allowed",
    "unreadable": "the file could not be read from its source",
    "not_a_file": "a link or device inside an archive",
    "unsafe_path": "a path that climbs out of its folder",
    "duplicate_name": "another image of the set has the same name",
}
"""The closed list of reasons for which an image is rejected."""

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".heic",
        ".heif",
        ".avif",
        ".jp2",
        ".ppm",
        ".pgm",
        ".tga",
    ]
)
"""Files that count as images of a source; what they really are is seen when they are decoded."""

MAX_MEGAPIXELS = 89
MAX_FILE_BYTES = 512 * 2**20

Resize = Literal["long", "squash"]
Box = tuple[float, float, float, float]
U8 = npt.NDArray[np.uint8]


def decode(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The upright RGB image in `data`.

    Raises:
        ImageError: with one of `REASONS`.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of broken metadata, which is no reason to refuse good pixels, and from 89 megapixels on (it
            # refuses from 179); our own bound is checked below.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"{len(data)} bytes starting with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:  # a plugin may raise anything on a broken header
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from None
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise ImageError("too_large", f"{image.width} x {image.height} px, allowed are {max_megapixels} megapixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _rgb(_upright(image))
    except Exception as error:  # truncated data, bad streams: the type depends on the format's plugin
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF: the pixels are good, and there is no orientation to apply
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        scale = 255.0 / 65535.0 if pixels.max(initial=0) > 255 else 1.0
        return Image.fromarray(np.clip(pixels * scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def prepare(image: Image.Image, size: int, resize: Resize, box: Box | None = None) -> U8:
    """Crop to a query's box and resize, as the benchmarks do.

    Args:
        image: upright RGB.
        size: px of the long side ("long") or of both sides ("squash").
        resize: "long" keeps the aspect ratio and never enlarges; "squash" makes a size x size input.
        box: x1 y1 x2 y2 in px of the upright image. With "long" the crop is scaled by size / max(side of the full
            image), so that things keep the scale that they have in the database (cirtorch's rule).

    Returns:
        (height, width, 3) uint8.
    """
    full = max(image.size)
    if box is not None:
        image = image.crop(clip_box(box, image.size))
    if resize == "squash":
        target = (size, size)
    else:
        factor = min(1.0, size / full)
        target = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    return np.asarray(image)


def clip_box(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box in whole pixels, inside the image.

    Raises:
        ImageError: if nothing of it lies inside.
    """
    x1, y1, x2, y2 = map(round, box) if all(map(math.isfinite, box)) else (0, 0, 0, 0)
    x1, y1, x2, y2 = max(0, x1), max(0, y1), min(size[0], x2), min(size[1], y2)
    if x2 <= x1 or y2 <= y1:
        raise ImageError("corrupt", f"query box {box} holds no pixel of the {size[0]} x {size[1]} image")
    return x1, y1, x2, y2


def thumbnail(data: bytes, side: int, box: Box | None = None) -> bytes:
    """A small JPEG of the (boxed) image, for reports."""
    image = decode(data)
    if box is not None:
        image = image.crop(clip_box(box, image.size))
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
