"""Files that call themselves images and cannot be used, made from a seed; and the small writers that make them.

The writers know only the formats' specifications, so that what the decoder makes of a file can be checked against what
was put in.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

SEED = 20221


def noise(count: int, salt: int = 0) -> bytes:
    """Random bytes, always the same ones."""
    return np.random.default_rng([SEED, salt]).bytes(count)


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth colours with a little noise, so that codecs keep it and still need bytes for it."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    pixels += np.frombuffer(noise(pixels.size), np.uint8).reshape(pixels.shape) % 16
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", second: Image.Image | None = None, **options: object) -> bytes:
    """What Pillow writes; with a second image, an animation of two."""
    out = io.BytesIO()
    if second is not None:
        options |= {"save_all": True, "append_images": [second.copy()]}
    image.copy().save(out, kind, **options)  # a copy, because Pillow leaves one format's settings on it for the next
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ writers


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG of raw scanlines, each with its filter byte; `extra` are whole chunks between header and pixels."""
    return png_of(width, height, zlib.compress(rows), depth, colour, extra)


def png_of(width: int, height: int, stream: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG around that compressed stream."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


Tag = tuple[int, str, tuple[int, ...] | bytes]


def tiff(
    width: int, height: int, pixels: bytes, bits: tuple[int, ...], photometric: int, *more: Tag, order: str = "<"
) -> bytes:
    """An uncompressed TIFF of one strip; a tag is its number, its `struct` type (B, H or I) and its values."""
    tags: list[Tag] = [
        (256, "I", (width,)), (257, "I", (height,)), (258, "H", bits), (259, "H", (1,)), (262, "H", (photometric,)),
        (273, "I", (8,)), (277, "H", (len(bits),)), (278, "I", (height,)), (279, "I", (len(pixels),)), *more,
    ]  # fmt: skip
    pixels += b"\0" * (len(pixels) % 2)
    entries, heap = b"", b""
    start = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    for number, kind, values in sorted(tags):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed) > 4:
            place, heap = struct.pack(order + "I", start + len(heap)), heap + packed + b"\0" * (len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", number, {"B": 1, "H": 3, "I": 4}[kind], len(values)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + heap


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def box(kind: bytes, data: bytes) -> bytes:
    """A box of an MP4, HEIC, AVIF or JPEG XL."""
    return struct.pack(">I4s", len(data) + 8, kind) + data


def frame(jpeg: bytes) -> int:
    """Where the frame header of a JPEG holds its precision (1 byte), height (2) and width (2)."""
    return next(jpeg.index(bytes([0xFF, marker])) for marker in (0xC0, 0xC2) if bytes([0xFF, marker]) in jpeg) + 4


def replaced(data: bytes, at: int, by: bytes) -> bytes:
    """`data` with other bytes at that place."""
    return data[:at] + by + data[at + len(by) :]


# ------------------------------------------------------------------------------------------------ corpus


def corpus() -> dict[str, tuple[bytes, str]]:
    """File name to (bytes, the reason for which it is to be refused)."""
    groups = {
        "empty": {"empty.jpg": b""},
        "not_an_image": _no_images(),
        "unsupported": _other_formats(),
        "too_large": _bombs(),
        "corrupt": _cut() | _spoilt(),
    }
    return {name: (data, reason) for reason, group in groups.items() for name, data in group.items()}


def _no_images() -> dict[str, bytes]:
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as writer:
        info = tarfile.TarInfo("photo.jpg")
        info.size = 9
        writer.addfile(info, io.BytesIO(b"the photo"))
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("photo.jpg"), b"the photo")
    page = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body><svg width='1'></svg> Not found</body></html>"
    return {
        "one_byte.jpg": b"\xff",
        "two_bytes.jpg": b"\xff\xd8",
        "text.jpg": b"These are words,\nnot pixels.\n",
        "bitmap_words.bmp": b"BMW and other makes of cars, none of them an image\n",
        "page.jpg": page,
        "answer.jpg": b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n" + page,
        "denied.jpg": b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>\n",
        "reply.json.jpg": b'{"error": "not found", "status": 404}\n',
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n",
        "utf16.jpg": "These are words.".encode("utf-16"),
        "zeros.jpg": bytes(4096),
        "ones.png": b"\xff" * 4096,
        "noise.jpg": b"\xa5" + noise(4096, 1),
        "archive.jpg": archive.getvalue(),
        "archive.tar.jpg": tar.getvalue(),
        "archive.gz.jpg": gzip.compress(encode(photo(), "JPEG"), mtime=0),
        "sound.jpg": b"RIFF" + struct.pack("<I", 4096) + b"WAVEfmt " + noise(4084, 2),
        "shifted.jpg": b"\n" + encode(photo(), "JPEG"),  # a photo, but behind a line break that no decoder skips
    }


def _other_formats() -> dict[str, bytes]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>\n'
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n0 0 moveto 9 9 lineto stroke\nshowpage\n%%EOF\n"
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(encode(photo(16, 16))), 22)
    return {
        "phone.jpg": box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", noise(400, 4)),
        "phone.heic": box(b"ftyp", b"mif1\0\0\0\0mif1heicmiaf") + box(b"meta", noise(400, 5)),
        "burst.heic": box(b"ftyp", b"msf1\0\0\0\0msf1hevc") + box(b"meta", noise(400, 6)),
        "naked.jxl": b"\xff\x0a" + noise(400, 7),
        "boxed.jxl.jpg": box(b"JXL ", b"\r\n\x87\n") + box(b"ftyp", b"jxl \0\0\0\0jxl ") + noise(400, 8),
        "film.jpg": box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + box(b"mdat", noise(400, 9)),
        "film.mov.jpg": box(b"ftyp", b"qt  \0\0\0\0qt  ") + box(b"mdat", noise(400, 10)),
        "raw.cr3.jpg": box(b"ftyp", b"crx \0\0\0\1crx isom") + box(b"moov", noise(400, 11)),
        "raw.cr2.tif": b"II*\0\x10\0\0\0CR\2\0" + noise(400, 12),
        "raw.raf.jpg": b"FUJIFILMCCD-RAW 0201FF383501" + noise(400, 13),
        "raw.orf.jpg": b"IIRO\x08\0\0\0" + noise(400, 14),
        "layers.jpg": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + noise(400, 15),
        "paper.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
        "drawing.jpg": svg,
        "drawing.png": b'\xef\xbb\xbf<?xml version="1.0" encoding="UTF-8"?>\n<!-- a square -->\n' + svg,
        "print.jpg": eps,
        "print_with_preview.jpg": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, len(eps), 0, 0, 0, 0, 0xFFFF) + eps,
        "favicon.png": icon + encode(photo(16, 16)),
        "app.jpg": b"icns" + struct.pack(">I", 416) + b"ic07" + struct.pack(">I", 408) + noise(400, 16),
        "clipart.jpg": b"\xd7\xcd\xc6\x9a" + struct.pack("<HhhhhHI", 0, 0, 0, 9, 9, 96, 0) + noise(400, 3),
        "clipart.emf.jpg": struct.pack("<II", 1, 88) + bytes(32) + b" EMF" + noise(400, 17),
    }


def _bombs() -> dict[str, bytes]:
    whole = encode(photo(), "JPEG")
    gif, bmp = encode(photo(), "GIF"), encode(photo(), "BMP")
    return {
        "megapixels.png": png(10_000, 10_000, b""),  # 100 megapixels in 60 bytes
        "gigapixels.png": png(60_000, 60_000, bytes(1000)),
        "endless.png": png(2**31 - 1, 2**31 - 1, b""),
        "strip.png": png(1, 2_000_000, bytes(8_000_000), colour=2),  # every pixel is there, and it shows nothing
        "band.ppm": b"P6 70000 1 255\n" + bytes(210_000),
        "huge.ppm": b"P6 30000 30000 255\n" + bytes(100),
        "huge.jpg": replaced(whole, frame(whole) + 1, struct.pack(">HH", 65_500, 65_500)),
        "huge.gif": replaced(gif, 6, struct.pack("<HH", 65_535, 65_535)),
        "huge.bmp": replaced(bmp, 18, struct.pack("<ii", 40_000, 40_000)),
        "huge.tif": tiff(50_000, 50_000, bytes(100), (8, 8, 8), 2),
        "huge.tga": struct.pack("<BBB5xHHHHBB", 0, 0, 2, 0, 0, 60_000, 60_000, 24, 0) + bytes(100),
    }


def _cut() -> dict[str, bytes]:
    """Files that end too early."""
    image = photo()
    jpeg, progressive = encode(image, "JPEG", quality=90), encode(image, "JPEG", quality=90, progressive=True)
    scan = jpeg.index(b"\xff\xda")
    whole_png, lossless = encode(image), encode(image, "WEBP", lossless=True)
    files = {
        "cut_behind_its_first_bytes.jpg": jpeg[:4],
        "cut_in_a_table.jpg": jpeg[: jpeg.index(b"\xff\xdb") + 30],
        "cut_before_the_frame.jpg": jpeg[: frame(jpeg) - 4],
        "cut_in_the_frame.jpg": jpeg[: frame(jpeg) + 4],
        "cut_before_the_scan.jpg": jpeg[:scan],
        "cut_in_the_scan_header.jpg": jpeg[: scan + 6],
        "cut_after_a_tenth.jpg": jpeg[: scan + (len(jpeg) - scan) // 10],
        "cut_after_half.jpg": jpeg[: scan + (len(jpeg) - scan) // 2],
        "lacks_the_end_marker.jpg": jpeg[:-2],
        "lacks_one_byte.jpg": jpeg[:-1],
        "cut_after_half.jpeg": progressive[: len(progressive) // 2],
        "lacks_the_end_marker.jpeg": progressive[:-2],
        "cut_in_the_header.png": whole_png[:20],
        "cut_before_the_pixels.png": whole_png[:33],
        "cut_after_half.png": whole_png[: len(whole_png) // 2],
        "lacks_the_end_chunk.png": whole_png[:-12],
        "cut_in_the_end_chunk.png": whole_png[:-9],
        "cut_in_the_header.gif": encode(image, "GIF")[:12],
        "cut_in_the_header.webp": lossless[:18],
        "lacks_one_byte.webp": lossless[:-2],  # RIFF pads to even
        "cut_in_the_header.bmp": encode(image, "BMP")[:30],
        "cut_in_the_header.tif": tiff(96, 64, image.tobytes(), (8, 8, 8), 2)[:8],
        "cut_lzw.tif": encode(image, "TIFF", compression="tiff_lzw")[:3000],
        "cut_in_the_header.ppm": b"P6 96",
    }
    for kind, extension in [("GIF", "gif"), ("WEBP", "webp"), ("TIFF", "tif"), ("BMP", "bmp"), ("PPM", "ppm"),
                            ("TGA", "tga"), ("JPEG2000", "jp2"), ("AVIF", "avif")]:  # fmt: skip
        if kind in Image.SAVE:  # AVIF came with Pillow 11.3
            data = encode(image, kind)
            files[f"cut_after_half.{extension}"] = data[: len(data) // 2]
            if kind not in ("PPM", "TGA"):  # there, random bytes are pixels
                files[f"random_behind_the_header.{extension}"] = data[:24] + noise(len(data), 26)
    return files


def _spoilt() -> dict[str, bytes]:
    """Files that are long enough and wrong."""
    image = photo()
    jpeg, whole_png, gif = encode(image, "JPEG"), encode(image), encode(image, "GIF")
    idat = whole_png.index(b"IDAT")
    idat_crc = idat + 4 + int.from_bytes(whole_png[idat - 4 : idat])
    bomb = zlib.compress(bytes(20_000_000))
    rows = bytes(4 * 2 * 3 + 2)
    stream = zlib.compress(rows)
    return {
        "no_size.jpg": replaced(jpeg, frame(jpeg) + 1, bytes(4)),
        "no_height.jpg": replaced(jpeg, frame(jpeg) + 1, bytes(2)),
        "twelve_bits.jpg": replaced(jpeg, frame(jpeg), b"\x0c"),
        "five_channels.jpg": replaced(jpeg, frame(jpeg) + 5, b"\5"),
        "no_tables.jpg": jpeg.replace(b"\xff\xdb", b"\xff\xfe"),  # quantization tables turned into comments
        "only_a_frame.jpg": b"\xff\xd8" + segment(0xC0, struct.pack(">BHHB3s", 8, 9, 9, 1, b"\1\x11\0")) + b"\xff\xd9",
        "random.jpg": jpeg[:20] + noise(4096, 20),
        "random.png": whole_png[:8] + noise(4096, 21),
        "random.webp": b"RIFF" + struct.pack("<I", 4096) + b"WEBPVP8 " + noise(4084, 22),
        "random.gif": gif[:13] + noise(4096, 23),
        "random.tif": b"II*\0\x08\0\0\0" + noise(4096, 24),
        "random.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + noise(4096, 25),
        "no_directory.tif": b"MM\0*\xff\xff\xff\x00" + noise(4096, 27),
        "wrong_sum_of_the_header.png": replaced(whole_png, 29, b"\0\0\0\0"),
        "wrong_sum_of_the_pixels.png": replaced(whole_png, idat_crc, b"\0\0\0\0"),
        "flipped_bit.png": replaced(whole_png, idat + 900, bytes([whole_png[idat + 900] ^ 0x10])),
        "not_deflated.png": png_of(4, 2, noise(100, 28)),
        "wrong_sum_of_the_stream.png": png_of(4, 2, replaced(stream, len(stream) - 1, b"\xff")),
        "half_a_stream.png": png_of(4, 2, stream[: len(stream) // 2]),
        "no_size.png": png(0, 0, b""),
        "no_such_colour.png": png(4, 2, rows, colour=5),
        "text_bomb_z.png": png(4, 2, rows, extra=chunk(b"zTXt", b"Comment\0\0" + bomb)),
        "text_bomb_i.png": png(4, 2, rows, extra=chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb)),
        "profile_bomb.png": png(4, 2, rows, extra=chunk(b"iCCP", b"profile\0\0" + bomb)),
        "no_size.gif": replaced(replaced(gif, 6, bytes(4)), gif.index(b",", 13 + 768) + 5, bytes(4)),
        "no_frame.gif": gif[:13].replace(b"\x87", b"\7") + b";",
        "no_size.bmp": replaced(encode(image, "BMP"), 18, bytes(8)),
        "no_such_depth.bmp": replaced(encode(image, "BMP"), 28, b"\7"),
        "no_size.tif": tiff(0, 0, b"", (8, 8, 8), 2),
        "pixels_elsewhere.tif": tiff(96, 64, b"", (8, 8, 8), 2),
        "no_size.ppm": b"P6 0 0 255\n",
        "words.ppm": b"P6 wide high 255\n" + bytes(100),
        "no_size.tga": struct.pack("<BBB5xHHHHBB", 0, 0, 2, 0, 0, 0, 0, 24, 0) + bytes(100),
    }
