"""Decoding and resizing rules."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import bad_images
import numpy as np
import numpy.typing as npt
import pytest
from bad_images import chunk, encode, photo, png, replaced, tiff
from PIL import Image, ImageCms, PngImagePlugin

from iir_dist.data import images
from iir_dist.errors import ImageError

Array = npt.NDArray[Any]

CORPUS = bad_images.corpus()

RGB = np.asarray(photo(31, 18))  # odd, so that rows are padded where a format pads them
GREY = np.ascontiguousarray(RGB[:, :, 0])
ALPHA = np.ascontiguousarray(RGB[::-1, :, 1])
HEIGHT, WIDTH = GREY.shape
SIZE = (WIDTH, HEIGHT)
PALETTE = np.array([[200, 30, 40], [10, 220, 90], [60, 70, 250], [120, 130, 5]], np.uint8)
INDEX = (np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) // 3 % 4).astype(np.uint8)
INK = np.dstack([RGB, np.minimum(ALPHA, 128)])  # cyan, magenta, yellow, black


def gradient(width: int = 40, height: int = 20) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def pixels(data: bytes) -> Array:
    image = images.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def scanlines(values: Array) -> bytes:
    """Rows of a PNG, unfiltered."""
    return b"".join(b"\0" + row.tobytes() for row in values)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", CORPUS)
def test_what_cannot_be_used_is_refused_with_its_reason(name: str) -> None:
    data, reason = CORPUS[name]
    with pytest.raises(ImageError) as error:
        images.decode(data)
    assert (error.value.reason, reason in images.REASONS) == (reason, True), error.value
    detail = error.value.detail
    assert detail.isprintable()  # one line
    assert len(detail) < 300
    assert any(character.isdigit() for character in detail)  # a value of this file
    assert " at 0x" not in detail  # and none of this process


def test_the_corpus_covers_every_reason_of_the_decoder() -> None:
    assert len(CORPUS) >= 40
    assert {reason for _, reason in CORPUS.values()} == {"empty", "not_an_image", "unsupported", "too_large", "corrupt"}
    assert bad_images.corpus() == CORPUS  # the same bytes each time


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phone.heic", r"HEIF \(\.heic, \.heif\) of 436 bytes; convert it .* install a Pillow that reads it"),
        ("naked.jxl", r"JXL \(\.jxl\) of 402 bytes; convert it .* install a Pillow that reads it"),
        ("raw.cr2.tif", "a camera's RAW file of 412 bytes; convert it"),
        ("paper.jpg", "a PDF document of 51 bytes; convert it"),
        ("drawing.png", "an SVG drawing of 156 bytes; convert it"),
        ("print.jpg", "an EPS or PostScript document of 91 bytes; convert it"),
        ("film.jpg", "an MP4 or QuickTime video of 440 bytes; convert it"),
        ("text.jpg", "29 bytes starting with b'These are words,'"),
        ("strip.png", "1 x 2000000 px, allowed are 65535 px a side"),
        ("megapixels.png", "10000 x 10000 px, allowed are 89 megapixels"),
        ("lacks_the_end_marker.jpg", "JPEG of 1939 bytes: OSError: image file is truncated"),
    ],
)
def test_a_rejection_says_what_was_found_and_what_to_do(name: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        images.decode(CORPUS[name][0])


def test_the_pixel_bound_is_the_callers() -> None:
    assert images.decode(encode(gradient()), max_megapixels=0.0008).size == (40, 20)
    with pytest.raises(ImageError, match=r"40 x 20 px, allowed are 0\.0007"):
        images.decode(encode(gradient()), max_megapixels=0.0007)


@pytest.mark.parametrize(("least", "size"), [
    (None, (202, 149)), (75, (202, 149)), (74, (101, 75)), (38, (101, 75)), (37, (51, 38)), (19, (51, 38)), (18, (26, 19)),
    (1, (26, 19)),
])  # fmt: skip
def test_a_jpeg_is_decoded_as_small_as_may_be(least: int | None, size: tuple[int, int]) -> None:
    image = photo(202, 149)
    for mode in ("RGB", "L", "CMYK"):
        data = encode(image.convert(mode), "JPEG", quality=95)
        small = images.decode(data, least=least)
        assert (small.mode, small.size) == ("RGB", size)
        times = round(202 / size[0])
        whole = np.asarray(images.decode(data), float)[: 149 // times * times, : 202 // times * times]
        means = whole.reshape(149 // times, times, 202 // times, times, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(small, float)[: 149 // times, : 202 // times] - means).mean() < 1.5
    assert images.decode(encode(image), least=least).size == image.size  # a PNG


def test_smaller_decoding_keeps_the_rules() -> None:
    wide = np.asarray(images.decode(encode(photo(160, 120), "JPEG", icc_profile=WIDE), least=15), int)
    whole = images.decode(encode(photo(160, 120), "JPEG", icc_profile=WIDE)).resize((20, 15), Image.Resampling.BOX)
    plain = images.decode(encode(photo(160, 120), "JPEG")).resize((20, 15), Image.Resampling.BOX)
    assert np.abs(wide - np.asarray(whole, int)).mean() < 2
    assert np.abs(wide - np.asarray(plain, int)).mean() > 5  # the profile does tell
    exif = Image.Exif()
    exif[0x112] = 6
    turned = encode(photo(160, 120), "JPEG", exif=exif)
    assert images.decode(turned, least=15).size == (15, 20)
    second = encode(photo(160, 120), "MPO", photo(80, 60))
    assert images.decode(second, least=15).size == (20, 15)
    with pytest.raises(ImageError, match="truncated"):
        images.decode(encode(photo(160, 120), "JPEG")[:-300], least=15)
    with pytest.raises(ImageError, match=r"160 x 120 px, allowed are 0\.01 megapixels"):
        images.decode(encode(photo(160, 120), "JPEG"), max_megapixels=0.01, least=15)


@pytest.mark.parametrize(("width", "fits"), [(65_535, True), (65_536, False)])
def test_the_longest_side_is_bounded(width: int, fits: bool) -> None:
    data = f"P5 {width} 1 255\n".encode() + bytes(width)
    if fits:
        assert images.decode(data).size == (width, 1)
    else:
        with pytest.raises(ImageError, match="65536 x 1 px, allowed are 65535 px a side"):
            images.decode(data)


def test_bounds_are_checked_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decoded.append(self.size))
    for name in ("megapixels.png", "gigapixels.png", "strip.png"):
        with pytest.raises(ImageError):
            images.decode(CORPUS[name][0])
    assert decoded == []
    images.decode(encode(gradient()))
    assert decoded[0] == (40, 20)  # it does tell


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("1"), "too_large"), (Image.DecompressionBombError("2"), "too_large"), (OSError("3"), "corrupt"),
        (RecursionError("4"), "corrupt"), (struct.error("5"), "corrupt"), (SyntaxError("6"), "corrupt"),
        (KeyError("7"), "corrupt"), (AssertionError("8"), "corrupt"), (OverflowError("9"), "corrupt"),
        (EOFError("10\nlines\n" * 100), "corrupt"), (zlib.error("11"), "corrupt"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_a_plugin_raises_is_an_image_error(
    error: Exception, reason: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Image if step == "open" else PngImagePlugin.PngImageFile, step, fail)
    with pytest.raises(ImageError, match=type(error).__name__) as caught:
        images.decode(encode(gradient()))
    assert caught.value.reason == reason
    assert caught.value.detail.isprintable()
    assert len(caught.value.detail) < 300


def test_damage_raises_nothing_but_image_errors() -> None:
    """Bytes changed at random in a file of every kind: an image or a reason, never another exception."""
    source = random.Random(bad_images.SEED)
    outcomes = set()
    for data in [data for name, (data, *_) in GOOD.items() if name != "frames, avif"]:  # which holds the time
        for _ in range(25):
            damaged = bytearray(data)
            for _ in range(source.choice([1, 3, 9])):
                damaged[source.randrange(min(len(damaged), source.choice([64, 512, 1 << 20])))] = source.randrange(256)
            try:
                images.decode(bytes(damaged))
                outcomes.add("image")
            except ImageError as error:
                outcomes.add(error.reason)
    assert {"image", "corrupt", "not_an_image"} <= outcomes <= {"image", *images.REASONS}


# ------------------------------------------------------------------------------------------------ who may decode


def test_the_table_of_signatures_is_that_of_the_formats() -> None:
    assert set(images.SIGNATURES) == set(images.FORMATS.values())
    assert set(images.FORMATS) == images.EXTENSIONS
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".heic", ".avif", ".jp2"} <= images.EXTENSIONS


def test_pillow_may_try_only_the_format_that_the_bytes_announce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches a plugin off the list, and none starts a program (as Pillow's for EPS does)."""
    asked, started = [], []
    opened = Image.open

    def watch(fp: io.BytesIO, mode: str = "r", formats: list[str] | None = None) -> Image.Image:
        asked.append(tuple(formats or ()))
        return opened(fp, "r", formats)

    monkeypatch.setattr(Image, "open", watch)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args))
    monkeypatch.setattr(os, "system", started.append)
    for data in [data for data, _ in CORPUS.values()] + [data for data, *_ in GOOD.values()]:
        try:
            images.decode(data)
        except ImageError:
            continue
    assert started == []
    assert {len(formats) for formats in asked} == {1}
    readable = {name for name in images.FORMATS.values() if name in Image.OPEN}
    assert {formats[0] for formats in asked} == readable


def test_a_format_that_this_pillow_lacks_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    webp, avif = encode(gradient(), "WEBP"), bad_images.box(b"ftyp", b"avif\0\0\0\0avifmif1")
    monkeypatch.setattr(images.features, "check", lambda codec: codec != "webp")
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    for data, words in ((webp, r"WEBP \(\.webp\) of"), (avif, r"AVIF \(\.avif\) of 24 bytes; .* install a Pillow")):
        with pytest.raises(ImageError, match=words) as error:
            images.decode(data)
        assert error.value.reason == "unsupported"


def test_a_fresh_process_reads_every_format() -> None:
    """Pillow knows five formats until it is told to look for more, which in this process encoding has done."""
    names = ["webp", "tiff", "jpeg 2000", "tga", *(["avif"] if "avif" in GOOD else [])]
    code = (
        "import sys; from iir_dist.data.images import decode; [print(decode(bytes.fromhex(x)).size) for x in sys.stdin]"
    )
    lines = "".join(GOOD[name][0].hex() + "\n" for name in names)
    found = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=False)
    assert (found.stdout.splitlines(), found.stderr) == ([str(SIZE)] * len(names), "")


def test_a_plugin_can_teach_pillow_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    head = bad_images.box(b"ftyp", b"heic\0\0\0\0mif1heic")

    def plugin(fp: io.BytesIO, filename: str) -> Image.Image:
        return PngImagePlugin.PngImageFile(io.BytesIO(fp.getvalue()[len(head) :]))

    monkeypatch.setitem(Image.OPEN, "HEIF", (plugin, None))
    assert np.array_equal(pixels(head + encode(gradient())), np.asarray(gradient()))


# ------------------------------------------------------------------------------------------------ colours by hand

D50 = np.array([0.9642, 1.0, 0.8249])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
"""RGB to XYZ under D50."""


def srgb_of(linear: Array) -> Array:
    """Linear 0..1 to sRGB 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_of_xyz(xyz: Array) -> Array:
    return srgb_of(xyz @ np.linalg.inv(SRGB).T)


def srgb_of_lab(lab: Array) -> Array:
    """L 0..100, a and b around 0."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    return srgb_of_xyz(D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))


def srgb_of_p3(values: Array) -> Array:
    """Of the profile `WIDE`: the primaries of P3 and a gamma of 563 / 256."""
    return srgb_of_xyz((values / 255.0) ** (563 / 256) @ P3.T)


def over_white(colours: Array, alpha: Array) -> Array:
    return (colours * (alpha[..., None] / 255.0)) + 255.0 - alpha[..., None]


def of_ink(ink: Array) -> Array:
    """CMYK without a profile."""
    return (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255.0


def grey(values: Array) -> Array:
    return np.repeat(values[..., None], 3, axis=-1).astype(float)


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", name: bytes = b"by hand") -> bytes:
    """An ICC profile, version 2.4."""
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz_tag(D50), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">4x4s4s4s4s", b"\2\x40\0\0", kind, space, b"Lab " if space == b"CMYK" else b"XYZ ")
    head += struct.pack(">6H4s28x", 2022, 1, 1, 0, 0, 0, b"acsp") + fixed(D50)
    return struct.pack(">I", 128 + len(table) + len(body)) + head.ljust(124, b"\0") + table + body


def fixed(values: Array) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz_tag(values: Array) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(values)


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256))


def rgb_profile(matrix: Array, curve: bytes, name: bytes = b"by hand") -> bytes:
    colorants = {letter + b"XYZ": xyz_tag(column) for letter, column in zip([b"r", b"g", b"b"], matrix.T, strict=True)}
    return profile(b"RGB ", colorants | {letter + b"TRC": curve for letter in (b"r", b"g", b"b")}, name=name)


def cmyk_profile(corners: Array, kind: bytes = b"prtr") -> bytes:
    """Lab of the 16 corners of the CMYK cube, white paper (0 0 0 0) first, black varying fastest; between them, linear."""
    ramp = bytes(range(256))
    encoded = (
        np.stack([corners[:, 0] * 2.55, corners[:, 1] + 128, corners[:, 2] + 128], axis=-1).round().astype(np.uint8)
    )
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(np.eye(3).ravel())
    table += ramp * 4 + encoded.tobytes() + ramp * 3
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, kind)


SRGB_CURVE = np.linspace(0, 1, 1024)
SRGB_CURVE = np.where(SRGB_CURVE <= 0.04045, SRGB_CURVE / 12.92, ((SRGB_CURVE + 0.055) / 1.055) ** 2.4)
SRGB_CURVE_TAG = b"curv\0\0\0\0" + struct.pack(">I", 1024) + (SRGB_CURVE * 65535).round().astype(">u2").tobytes()

WIDE = rgb_profile(P3, gamma_tag(2.2))
LINEAR = rgb_profile(SRGB, gamma_tag(1.0), name=b"sRGB linear")  # so named, and not sRGB
ANY_NAME = rgb_profile(SRGB, SRGB_CURVE_TAG)  # not so named, and sRGB
PILLOWS = replaced(
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), 24, bytes(12)
)  # without the time
STEEP_GREY = profile(b"GRAY", {b"kTRC": gamma_tag(1.5)})
SRGB_GREY = profile(b"GRAY", {b"kTRC": SRGB_CURVE_TAG})

CORNERS = np.stack(
    [np.linspace(100, 0, 16), 20 * np.sin(np.arange(16) * 0.9), 20 * np.sin(np.arange(16) * 1.7)], axis=-1
).round()  # paper white to black by steps, with colours that no formula would guess
CORNERS[0, 1:] = CORNERS[15, 1:] = 0
AT_CORNERS = (np.arange(HEIGHT * WIDTH) % 16).reshape(HEIGHT, WIDTH)
INK_AT_CORNERS = ((AT_CORNERS[..., None] >> np.arange(3, -1, -1)) & 1).astype(np.uint8) * 255
PRESS = cmyk_profile(CORNERS)


# ------------------------------------------------------------------------------------------------ what is read


def ycck() -> bytes:
    """A CMYK JPEG whose inks are coded as luma, chroma and black, as Photoshop writes them."""
    c, m, y = (INK[..., n].astype(float) for n in range(3))
    luma = 0.299 * c + 0.587 * m + 0.114 * y
    bands = np.stack([luma, 128 + (y - luma) / 1.772, 128 + (c - luma) / 1.402, 255.0 - INK[..., 3]], axis=-1)
    # Pillow writes inverted inks and says that they are plain CMYK (transform 0 of Adobe's segment); 2 is YCCK.
    data = encode(Image.fromarray((255 - bands.round()).astype(np.uint8), "CMYK"), "JPEG", quality=100, subsampling=0)
    return replaced(data, data.index(b"Adobe") + 11, b"\2")


def indexed(**info: object) -> Image.Image:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())
    image.info.update(info)
    return image


def packed(values: Array, bits: int) -> bytes:
    """Rows of big-endian values of so many bits, each row padded to a byte."""
    return np.packbits((values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(HEIGHT, -1), axis=1).tobytes()


def good() -> dict[str, tuple[bytes, Array, float]]:
    """Name to (file, the pixels that it holds, how far a channel may be off)."""
    rgb, l8 = Image.fromarray(RGB), Image.fromarray(GREY)
    other = Image.fromarray(255 - RGB)
    best = {"quality": 100, "subsampling": 0}
    deep = np.minimum(GREY * 257.0 + 3 * np.arange(WIDTH), 65_535).astype(np.uint16)
    dark = (GREY.astype(np.uint16) // 2) * 2  # of 65,535: all but black
    twelve = deep >> 4
    bits = (GREY > 128).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
    la = Image.fromarray(np.dstack([GREY, ALPHA]), "LA")
    cmyk, inks = Image.fromarray(INK, "CMYK"), of_ink(INK)
    steps = np.array([0, 90, 180, 255], np.uint8)
    lab = np.stack([100 + GREY // 3, 118 + GREY // 12, 138 - ALPHA // 12], axis=-1).astype(np.uint8)
    signed_lab = lab - np.array([0, 128, 128], np.uint8)
    true_lab = np.stack([lab[..., 0] / 2.55, lab[..., 1] - 128.0, lab[..., 2] - 128.0], axis=-1)
    premultiplied = np.dstack([(RGB * (ALPHA[..., None] / 255.0)).round().astype(np.uint8), ALPHA])
    key = chunk(b"tRNS", struct.pack(">HHH", *PALETTE[1]))
    deep_key = int(deep[3, 4])
    words = (RGB.astype(int) * 256 + 77).astype(">u2")
    four = {"bits": (8, 8, 8, 8), "photometric": 5}

    cases: dict[str, tuple[bytes, Array, float]] = {
        # formats
        "jpeg": (encode(rgb, "JPEG", **best), RGB, 4),
        "jpeg, progressive": (encode(rgb, "JPEG", progressive=True, **best), RGB, 4),
        "jpeg, grey": (encode(l8, "JPEG", quality=100), grey(GREY), 2),
        "jpeg with text behind it": (encode(rgb, "JPEG", **best) + b"\n<!-- -->\n", RGB, 4),
        "mpo": (encode(rgb, "MPO", second=other, **best), RGB, 4),
        "png": (png(*SIZE, scanlines(RGB)), RGB, 0),
        "webp": (encode(rgb, "WEBP", lossless=True), RGB, 0),
        "bmp": (encode(rgb, "BMP"), RGB, 0),
        "gif": (encode(indexed(), "GIF"), PALETTE[INDEX], 0),
        "tiff": (tiff(*SIZE, RGB.tobytes(), (8, 8, 8), 2), RGB, 0),
        "tiff, big-endian": (tiff(*SIZE, RGB.tobytes(), (8, 8, 8), 2, order=">"), RGB, 0),
        "tiff, lzw": (encode(rgb, "TIFF", compression="tiff_lzw"), RGB, 0),
        "jpeg 2000": (encode(rgb, "JPEG2000"), RGB, 0),
        "ppm": (b"P6 %d %d 255\n" % SIZE + RGB.tobytes(), RGB, 0),
        "tga": (encode(rgb, "TGA"), RGB, 0),
        "tga, run lengths": (encode(indexed().convert("RGB"), "TGA", compression="tga_rle"), PALETTE[INDEX], 0),
        # depths
        "1 bit, png": (png(*SIZE, scanlines(np.packbits(bits, axis=1)), 1, 0), grey(bits * 255), 0),
        "1 bit, tiff, white is 0": (tiff(*SIZE, packed(1 - bits, 1), (1,), 0), grey(bits * 255), 0),
        "1 bit, tiff, group 4": (
            encode(Image.fromarray(bits * 255).convert("1"), "TIFF", compression="group4"), grey(bits * 255), 0
        ),
        "1 bit, pbm": (b"P4 %d %d\n" % SIZE + packed(1 - bits, 1), grey(bits * 255), 0),
        "12 bits, tiff": (tiff(*SIZE, packed(twelve, 12), (12,), 1), grey(twelve * (255 / 4095)), 0.5),
        "16 bits, png": (png(*SIZE, scanlines(deep.astype(">u2")), 16, 0), grey(deep / 257), 0.5),
        "16 bits, png, dark": (png(*SIZE, scanlines(dark.astype(">u2")), 16, 0), grey(dark / 257), 0.5),
        "16 bits, png, colours": (png(*SIZE, scanlines(words), 16, 2), RGB, 0),
        "16 bits, tiff": (tiff(*SIZE, deep.tobytes(), (16,), 1), grey(deep / 257), 0.5),
        "16 bits, tiff, big-endian": (tiff(*SIZE, deep.astype(">u2").tobytes(), (16,), 1, order=">"), grey(deep / 257), 0.5),
        "16 bits, tiff, white is 0": (tiff(*SIZE, (65_535 - deep).tobytes(), (16,), 0), grey(deep / 257), 0.5),
        "16 bits, pgm": (b"P5 %d %d 65535\n" % SIZE + deep.astype(">u2").tobytes(), grey(deep / 257), 0.5),
        "32 bits, tiff": (encode(Image.fromarray(deep.astype(np.int32)), "TIFF"), grey(deep / 257), 0.5),
        "floats to 1": (encode(Image.fromarray(np.where(GREY > 9, GREY / 255.0, np.nan).astype(np.float32)), "TIFF"),
            grey(np.where(GREY > 9, GREY, 0)), 0.5),
        "floats to 255": (encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), grey(GREY), 0.5),
        "floats to 65535": (encode(Image.fromarray(deep.astype(np.float32)), "TIFF"), grey(deep / 257), 0.5),
        # transparency
        "alpha, png": (png(*SIZE, scanlines(np.dstack([RGB, ALPHA])), 8, 6), over_white(RGB, ALPHA), 1),
        "alpha, webp": (encode(rgba, "WEBP", lossless=True, exact=True), over_white(RGB, ALPHA), 1),
        "alpha, tga": (encode(rgba, "TGA"), over_white(RGB, ALPHA), 1),
        "alpha, tiff": (
            tiff(*SIZE, np.dstack([RGB, ALPHA]).tobytes(), (8, 8, 8, 8), 2, (338, "H", (2,))), over_white(RGB, ALPHA), 1
        ),
        "alpha, tiff, premultiplied": (
            tiff(*SIZE, premultiplied.tobytes(), (8, 8, 8, 8), 2, (338, "H", (1,))), over_white(RGB, ALPHA), 2
        ),
        "alpha, grey": (png(*SIZE, scanlines(np.dstack([GREY, ALPHA])), 8, 4), over_white(grey(GREY), ALPHA), 1),
        "transparent colour": (
            png(*SIZE, scanlines(PALETTE[INDEX]), 8, 2, key),
            np.where((INDEX == 1)[..., None], 255, PALETTE[INDEX]), 0,
        ),
        "transparent grey": (
            png(*SIZE, scanlines(steps[INDEX]), 8, 0, chunk(b"tRNS", b"\0\x5a")), grey(np.where(INDEX == 1, 255, steps[INDEX])), 0
        ),
        "transparent grey, 16 bits": (
            png(*SIZE, scanlines(deep.astype(">u2")), 16, 0, chunk(b"tRNS", struct.pack(">H", deep_key))),
            grey(np.where(deep == deep_key, 65_535, deep) / 257), 0.5,
        ),
        "palette": (encode(indexed(), "PNG"), PALETTE[INDEX], 0),
        "palette with alphas": (
            encode(indexed(), "PNG", transparency=steps.tobytes()), over_white(PALETTE[INDEX], steps[INDEX]), 1
        ),
        "palette, gif with a transparent index": (
            encode(indexed(), "GIF", transparency=2), np.where((INDEX == 2)[..., None], 255, PALETTE[INDEX]), 0
        ),
        # inks and Lab
        "cmyk, jpeg": (encode(cmyk, "JPEG", **best), inks, 4),
        "ycck, jpeg": (ycck(), inks, 6),
        "cmyk, tiff": (tiff(*SIZE, INK.tobytes(), **four), inks, 1),
        "lab, tiff": (tiff(*SIZE, signed_lab.tobytes(), (8, 8, 8), 8), srgb_of_lab(true_lab), 3),
        # the first of several
        "frames, gif": (encode(indexed(), "GIF", second=other), PALETTE[INDEX], 0),
        "frames, png": (encode(rgb, "PNG", second=other), RGB, 0),
        "frames, webp": (encode(rgb, "WEBP", lossless=True, second=other), RGB, 0),
        "pages, tiff": (encode(rgb, "TIFF", second=other), RGB, 0),
        # profiles
        "wide, png": (encode(rgb, icc_profile=WIDE), srgb_of_p3(RGB), 2),
        "wide, jpeg": (encode(rgb, "JPEG", icc_profile=WIDE, **best), srgb_of_p3(pixels(encode(rgb, "JPEG", **best))), 2),
        "wide, webp": (encode(rgb, "WEBP", lossless=True, icc_profile=WIDE), srgb_of_p3(RGB), 2),
        "wide, tiff": (tiff(*SIZE, RGB.tobytes(), (8, 8, 8), 2, (34675, "B", WIDE)), srgb_of_p3(RGB), 2),
        "wide, alpha": (encode(rgba, icc_profile=WIDE), over_white(srgb_of_p3(RGB), ALPHA), 2),
        "wide, palette": (encode(indexed(), icc_profile=WIDE), srgb_of_p3(PALETTE)[INDEX], 2),
        "linear, for all its name": (encode(rgb, icc_profile=LINEAR), srgb_of(RGB / 255), 2),
        "steep, grey": (encode(l8, icc_profile=STEEP_GREY), grey(srgb_of((GREY / 255) ** 1.5)), 3),
        "steep, grey, alpha": (encode(la, icc_profile=STEEP_GREY), over_white(grey(srgb_of((GREY / 255) ** 1.5)), ALPHA), 3),
        "steep, grey, 16 bits": (
            encode(Image.fromarray(GREY.astype(np.uint16) * 257), icc_profile=STEEP_GREY), grey(srgb_of((GREY / 255) ** 1.5)), 2
        ),
        "press, tiff": (
            tiff(*SIZE, INK_AT_CORNERS.tobytes(), (8, 8, 8, 8), 5, (34675, "B", PRESS)), srgb_of_lab(CORNERS)[AT_CORNERS], 3
        ),
        "sRGB by Pillow": (encode(rgb, icc_profile=PILLOWS), RGB, 0),
        "sRGB by another name": (encode(rgb, icc_profile=ANY_NAME), RGB, 0),
        "sRGB, jpeg": (encode(rgb, "JPEG", icc_profile=ANY_NAME, **best), pixels(encode(rgb, "JPEG", **best)), 0),
        "sRGB, grey": (encode(l8, icc_profile=SRGB_GREY), grey(GREY), 0),
        "broken profile": (encode(rgb, icc_profile=WIDE[:300]), RGB, 0),
        "no profile at all": (encode(rgb, icc_profile=b"sRGB IEC61966-2.1"), RGB, 0),
        "profile without curves": (encode(rgb, icc_profile=profile(b"RGB ", {})), RGB, 0),
        "profile of another space": (encode(rgb, icc_profile=STEEP_GREY), RGB, 0),
        "profile of colours for grey": (encode(l8, icc_profile=LINEAR), grey(GREY), 0),
        "profile of inks for colours": (encode(rgb, icc_profile=PRESS), RGB, 0),
        "profile of colours for inks": (tiff(*SIZE, INK.tobytes(), (8, 8, 8, 8), 5, (34675, "B", LINEAR)), inks, 1),
        "profile that is text": (tiff(*SIZE, RGB.tobytes(), (8, 8, 8), 2, (34675, "H", (1, 2, 3))), RGB, 0),
        "broken exif": (encode(rgb, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), RGB, 0),
    }  # fmt: skip
    if "AVIF" in Image.SAVE:
        cases["avif"] = (encode(rgb, "AVIF", quality=100, subsampling="4:4:4"), RGB, 6)
        cases["avif, by its second name"] = (cases["avif"][0].replace(b"ftypavif", b"ftypmif1"), RGB, 6)
        cases["frames, avif"] = (encode(rgb, "AVIF", quality=100, subsampling="4:4:4", second=other), RGB, 6)
    return cases


GOOD = good()


@pytest.mark.parametrize("name", GOOD)
def test_what_is_read_is_what_was_written(name: str) -> None:
    data, expected, tolerance = GOOD[name]
    found = pixels(data)
    assert found.shape == expected.shape == (HEIGHT, WIDTH, 3)
    assert expected.std() > 0 or "dark" in name  # a uniform image would show no mistake
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("name", [name for name in GOOD if name.startswith(("wide", "linear", "steep", "press"))])
def test_the_cases_with_profiles_would_see_one_that_is_not_applied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, expected, tolerance = GOOD[name]
    monkeypatch.setattr(images, "_transform", lambda profile, mode: None)
    assert np.abs(pixels(data) - expected).max() > 3 * tolerance


def test_black_and_white_survive_every_profile() -> None:
    """Black point compensation: a press whose black is L = 20 prints black all the same."""
    corners = CORNERS.copy()
    corners[15] = [20, 0, 0]
    ends = np.array([[[0, 0, 0, 0], [255, 255, 255, 255]]], np.uint8)
    data = tiff(2, 1, ends.tobytes(), (8, 8, 8, 8), 5, (34675, "B", cmyk_profile(corners, b"scnr")))
    assert pixels(data).tolist() == [[[255] * 3, [0] * 3]]


def test_a_profile_is_read_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: built.append(args) or build(*args))
    images._transform.cache_clear()
    for _ in range(3):
        images.decode(encode(Image.fromarray(RGB), icc_profile=WIDE))
        images.decode(encode(Image.fromarray(RGB), icc_profile=PILLOWS))
    assert len(built) == 2
    for step in range(40):
        images.decode(encode(Image.fromarray(RGB), icc_profile=rgb_profile(P3, gamma_tag(1 + step / 64))))
    assert len(built) == 42
    assert images._transform.cache_info().currsize == 16


def test_no_metadata_survive() -> None:
    """A profile or an orientation left in place would be applied again by whoever opens the thumbnail."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(gradient(), "JPEG", icc_profile=WIDE, exif=exif, comment=b"words", dpi=(300, 300))
    assert images.decode(data).info == {}
    small = Image.open(io.BytesIO(images.thumbnail(data, 40)))
    assert small.size == (20, 40)
    assert not small.info.keys() & {"icc_profile", "exif", "comment", "dpi"}


# ------------------------------------------------------------------------------------------------ orientation

STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""What a camera stores of an upright scene, by the value of EXIF's orientation."""


def turned(kind: str, orientation: int) -> bytes:
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    height, width = stored.shape[:2]
    if kind == "TIFF":
        return tiff(width, height, stored.tobytes(), (8, 8, 8), 2, (274, "H", (orientation,)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encode(Image.fromarray(stored), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    """A camera that was turned stores turned pixels and says so; all eight ways give the same upright image."""
    found = pixels(turned(kind, orientation))
    assert found.shape == RGB.shape
    assert np.abs(found - RGB).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encode(Image.fromarray(RGB), exif=exif)), RGB)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (0x011A, 1, b"\1\0\0\0"),  # a resolution that is a byte
        (0x0128, 4, b"\xff\xff\xff\xff"),  # a unit that does not fit its type
        (0x010F, 11, b"\0\0\0\0"),  # a maker that is a float
    ],
)
def test_an_orientation_counts_whatever_else_the_exif_holds(tag: int, kind: int, value: bytes) -> None:
    """Such tags can be read and not written, on which Pillow's own exif_transpose gives up."""
    entries = sorted([struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0"), struct.pack("<HHI4s", tag, kind, 1, value)])
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entries) + bytes(4)
    data = encode(Image.fromarray(np.ascontiguousarray(np.rot90(RGB))), exif=exif)
    assert np.array_equal(pixels(data), RGB)


@pytest.mark.parametrize("exif", [b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"no TIFF at all", b""])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_image(kind: str, exif: bytes) -> None:
    assert images.decode(encode(gradient(), kind, exif=b"Exif\0\0" + exif)).size == (40, 20)


def test_broken_exif_in_a_text_does_not_either() -> None:
    text = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nno hexadecimal")
    assert np.array_equal(pixels(png(*SIZE, scanlines(RGB), extra=text)), RGB)


# ------------------------------------------------------------------------------------------------ resizing


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
