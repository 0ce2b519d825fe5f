"""Decoding and resizing rules."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from iir_dist.data import images
from iir_dist.errors import ImageError


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int = 40, height: int = 20) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


def huge_png() -> bytes:
    """100 megapixels that say so in 60 bytes: only the header is honest."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"these are words, not pixels", "not_an_image"),
        (encode(gradient(400, 200), "JPEG")[:900], "corrupt"),
        (encode(gradient())[:60], "corrupt"),
        (huge_png(), "too_large"),
    ],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        images.decode(data)
    assert error.value.reason == reason
    assert reason in images.REASONS


def test_the_pixel_bound_is_the_callers() -> None:
    assert images.decode(encode(gradient()), max_megapixels=0.0008).size == (40, 20)
    with pytest.raises(ImageError, match=r"40 x 20 px, allowed are 0\.0007"):
        images.decode(encode(gradient()), max_megapixels=0.0007)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """A camera that was turned stores turned pixels and says so; all eight ways give the same upright image."""
    upright = gradient()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encode(stored, "PNG", exif=exif))
    assert decoded.size == (40, 20)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encode(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert images.decode(data).size == (40, 20)


def test_modes() -> None:
    rgb = np.asarray(gradient())
    grey16 = Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(images.decode(encode(grey16)))[:, :, 0], rgb[:, :, 0])
    alpha = Image.fromarray(np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)]), "RGBA")
    assert (np.asarray(images.decode(encode(alpha))) == 255).all()  # transparent is white, not what lies below
    palette = gradient().convert("P")
    assert images.decode(encode(palette)).mode == "RGB"
    cmyk = images.decode(encode(gradient().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(cmyk).astype(int) - rgb).mean() < 6
    frames = encode(gradient(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), "red")])
    assert np.asarray(images.decode(frames))[:, :, 0].mean() < 200


def test_long_keeps_the_aspect_and_never_enlarges() -> None:
    assert images.prepare(gradient(400, 200), 100, "long").shape == (50, 100, 3)
    assert images.prepare(gradient(40, 20), 100, "long").shape == (20, 40, 3)
    assert images.prepare(gradient(400, 3), 10, "long").shape == (1, 10, 3)
    assert images.prepare(gradient(400, 200), 64, "squash").shape == (64, 64, 3)


def test_a_query_crop_keeps_the_scale_of_the_full_image() -> None:
    """400 px go to 100, so a box of 80 x 40 px goes to 20 x 10, not to 100 x 50."""
    image = gradient(400, 200)
    crop = images.prepare(image, 100, "long", (100.0, 50.0, 180.0, 90.0))
    assert crop.shape == (10, 20, 3)
    inside = images.prepare(image, 100, "long")[13:22, 26:44].astype(int)
    assert np.abs(crop[:9, 1:19].astype(int) - inside).max() <= 6


def test_boxes_are_clipped_and_empty_ones_refused() -> None:
    assert images.clip_box((-3.0, 0.4, 50.0, 19.6), (40, 20)) == (0, 0, 40, 20)
    for box in ((50.0, 0.0, 60.0, 10.0), (5.0, 5.0, 5.2, 9.0), (float("nan"), 0.0, 1.0, 1.0)):
        with pytest.raises(ImageError):
            images.clip_box(box, (40, 20))


def test_thumbnail() -> None:
    small = Image.open(io.BytesIO(images.thumbnail(encode(gradient(400, 200)), 64, (0.0, 0.0, 100.0, 200.0))))
    assert small.size == (32, 64)
