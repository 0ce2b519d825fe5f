"""From the bytes of a photo to the pixels that a network sees; the one place where that is decided.

What is read: JPEG (also the first picture of an MPO), PNG, WebP, BMP, GIF, TIFF, AVIF, JPEG 2000, PPM and TGA; HEIC and
JPEG XL where a plugin has taught Pillow. The bytes say what a file is, never its name, and Pillow may try that one format
only: nothing can reach a plugin that calls another program (EPS), reads a document, or is less well kept.

Decoding rules, in their order:

* Pillow decodes, to the end: a JPEG without its end marker is refused, and a PNG without its end chunk or with a wrong
  checksum. (What was cut and then closed by the rules passes, its lower rows grey or black: Pillow does not tell.)
* Bounds on pixels and on the longest side are checked before any pixel is decoded.
* Of an animation or a document, the first frame.
* EXIF orientation is applied; width and height are those after it.
* 16 bits become 8 by the full scale of the format. Floats have none: theirs is the least of 1, 255 and 65535 that holds
  them.
* An embedded ICC profile is converted to sRGB; one that is sRGB, is broken or is of another colour space than the pixels
  changes nothing. CMYK without a profile goes by Pillow's formula, and in JPEGs is taken to be inverted, as Adobe does.
* Alpha is composed over white, after the conversion to sRGB.

The stored bytes always stay the original file.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from iir_dist.errors import ImageError

REASONS = {
    "empty": "the file has no bytes",
    "not_an_image": "the bytes are not those of an image format that is known here",
    "unsupported": "an image or document of a format that is not read here",
    "corrupt": "the image cannot be decoded to the end",
    "too_large": "more pixels or bytes than allowed",
    "unreadable": "the file could not be read from its source",
    "changed": "the file changed between listing and reading",
    "not_a_file": "a link or device inside an archive",
    "unsafe_path": "a path that climbs out of its folder",
    "duplicate_name": "another image of the set has the same name",
    "duplicate": "the same bytes as another image of the set, left out by --dedupe",
}
"""The closed list of reasons for which an image is rejected."""

FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
    ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF", ".jxl": "JXL",
    ".jp2": "JPEG2000", ".ppm": "PPM", ".pgm": "PPM", ".tga": "TGA",
}  # fmt: skip
"""Extension to the name by which Pillow knows the format."""

EXTENSIONS = frozenset(FORMATS)
"""Files that count as images of a source; what they really are is seen when they are decoded."""

SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II\*\0(?!.{4}CR)|MM\0\*|II\+\0\x08|MM\0\+\0\x08",
    "AVIF": rb".{4}ftyp(?:.{4}){0,15}?avi[fs]",
    "HEIF": rb".{4}ftyp(?:.{4}){0,15}?(?:he[iv][cmsx]|mif1|msf1)",
    "JXL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "PPM": rb"P[1-6]\s",
    # TGA begins with no word of its own: type of colour map and of image, 13 bytes of anything, depth and flags.
    "TGA": rb".(?:[\x00\x01][\x02\x03\x0a\x0b]|\x01[\x01\x09]).{13}[\x01\x08\x10\x18\x20][\x00-\x3f]",
}
"""How the files of each format in `FORMATS` begin."""

FOREIGN = {
    "a camera's RAW file": rb"II\*\0.{4}CR|.{4}ftypcrx|FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|FOVb|\0MRM",
    "a Photoshop document": rb"8BPS",
    "a PDF document": rb"%PDF",
    "an EPS or PostScript document": rb"%!PS|\xc5\xd0\xd3\xc6",
    "an SVG drawing": rb"(?:\xef\xbb\xbf)?\s*(?:(?:<\?xml|<!--|<!DOCTYPE svg).*?)?<svg[\s>]",
    "an icon": rb"\0\0\x01\0[^\0]|icns",
    "a Windows metafile": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
    "an MP4 or QuickTime video": rb".{4}ftyp",
}
"""What is not read but often enough called .jpg: its rejection is to name it."""

MAX_MEGAPIXELS = 89
MAX_SIDE = 65_535  # the most that a JPEG can have; a strip of 1 x 2,000,000 px shows nothing to search for
MAX_FILE_BYTES = 512 * 2**20

Resize = Literal["long", "squash"]
Box = tuple[float, float, float, float]
U8 = npt.NDArray[np.uint8]

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation to what makes the image upright."""


def decode(data: bytes, max_megapixels: float = MAX_MEGAPIXELS, least: int | None = None) -> Image.Image:
    """The upright sRGB image in `data`, without metadata.

    Args:
        data: of the file.
        max_megapixels: of the file, whatever size it is decoded at.
        least: a JPEG may be decoded at 1/2, 1/4 or 1/8 (sides rounded up), the smallest at which its shorter side has
            that many px; other formats are decoded in full.

    Raises:
        ImageError: with one of `REASONS`; nothing else, whatever the bytes are.
    """
    kind = _kind(data)
    try:
        with warnings.catch_warnings():
            # Pillow warns of broken metadata, which is no reason to refuse good pixels, and from 89 megapixels on (it
            # refuses from 179); our own bound is checked below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[kind])
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise ImageError("too_large", f"{width} x {height} px, allowed are {max_megapixels} megapixels")
            if max(width, height) > MAX_SIDE:
                raise ImageError("too_large", f"{width} x {height} px, allowed are {MAX_SIDE} px a side")
            if kind == "PNG":  # while decoding, Pillow skips the checksums of the pixels and does not miss the end
                Image.open(io.BytesIO(data), formats=[kind]).verify()
            if least is not None:
                image.draft(None, (least, least))  # the smallest scale at which both sides have as much; JPEG only
            image.load()
            return _srgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:  # its message is the address of our buffer
        raise ImageError("corrupt", f"{kind} of {len(data)} bytes: its header cannot be read") from None
    except Exception as error:  # truncated data, bad streams: a plugin may raise anything
        reason = "too_large" if isinstance(error, (Image.DecompressionBombError, MemoryError)) else "corrupt"
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ImageError(reason, f"{kind} of {len(data)} bytes: {why}") from None


def _kind(data: bytes) -> str:
    """Pillow's name of the format of `data`, if it is one of `FORMATS` and Pillow reads it here."""
    if not data:
        raise ImageError("empty", "0 bytes")
    kind = _match(SIGNATURES, data)
    if kind is None:
        what = _match(FOREIGN, data)
        if what is None:
            raise ImageError("not_an_image", f"{len(data)} bytes starting with {data[:16]!r}")
        raise ImageError("unsupported", f"{what} of {len(data)} bytes; convert it to JPEG or PNG")
    Image.init()  # Pillow registers the rarer formats only when asked
    codec = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)  # may be left out of a build
    if kind not in Image.OPEN or (codec and not features.check(codec)):
        names = ", ".join(extension for extension, name in FORMATS.items() if name == kind)
        advice = "convert it to JPEG or PNG, or install a Pillow that reads it"
        raise ImageError("unsupported", f"{kind} ({names}) of {len(data)} bytes; {advice}")
    return kind


def _match(signatures: dict[str, bytes], data: bytes) -> str | None:
    """The first whose pattern `data` begins with."""
    head = data[:1024]
    return next((name for name, pattern in signatures.items() if re.match(pattern, head, re.DOTALL)), None)


def _upright(image: Image.Image) -> Image.Image:
    """As the EXIF orientation says. (`ImageOps.exif_transpose` fails where it cannot write the rest of the EXIF back.)"""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF: the pixels are good, and there is no orientation to apply
        return image
    return image if turn is None else image.transpose(turn)


def _srgb(image: Image.Image) -> Image.Image:
    """The image as three channels of 8 bits, its profile converted, over white."""
    profile = image.info.get("icc_profile")
    alpha = _alpha(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.mode == "LA":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        image = transform.apply(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    image.info = {}  # the profile and the orientation hold no more; a thumbnail would carry them on
    return image


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is; None if all are."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # Pillow would compare only the lower 8 bits with the transparent value
        clear = np.asarray(image) == image.info["transparency"]
        return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, by the full scale of the format and not by the content."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    if image.mode == "F":
        white = next((w for w in (1, 255) if pixels.max() <= w), 65535)
    else:
        tags = getattr(image, "tag_v2", {})  # of a TIFF: 12 bits are not scaled by Pillow, and white may be 0
        white = 2 ** min(16, tags.get(258, [16])[0]) - 1
        pixels = white - pixels if tags.get(262) == 0 else pixels
    return Image.fromarray(np.clip(pixels * (255 / white) + 0.5, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=16)  # photos of one collection share a few profiles; a CMYK one has half a megabyte
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an embedded profile to sRGB; None if the pixels stay as they are.

    The intent is relative colorimetric with black point compensation: colours that sRGB has stay what they are, white
    and black stay white and black. Perceptual would compress all colours by a table that is a matter of taste: the
    ICC's own sRGB v4 profile would shift sRGB photos by 13 levels in the mean.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
        # What a profile does decides, not its name: sRGB has many, there is a "Generic Gray Gamma 2.2" that is sRGB and a
        # "linear sRGB" that is not. Those of sRGB differ from ours by a level; their photos keep their very pixels.
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
        probe = Image.fromarray(grid).convert(mode)
        change = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
        return transform if np.abs(change).max() > 2 else None
    except Exception:  # a broken profile, or one of another colour space: the pixels are good
        return None


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
