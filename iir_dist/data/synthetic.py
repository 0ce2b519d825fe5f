"""A procedural landmark world: a retrieval benchmark that needs no download.

A landmark is a facade drawn from a seed: blocks, roofs, windows and ornaments in colours that all landmarks share, so
that only its structure tells it from others. A photo shows it under a random viewpoint, scale, light, weather and
crop, before a random scene and partly behind trees and people. Since everything is drawn, the box and how much of the
landmark can be seen are known, and with them its label: easy, hard or junk.

Everything is a function of (seed, landmark, view), so two machines make the same world.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from iir_dist.progress import Progress

Rng = np.random.Generator
Color = tuple[int, int, int]
Label = Literal["easy", "hard", "junk"]

FACADE = 256
"""px of a side of the drawing of a landmark."""
STONES: tuple[Color, ...] = ((196, 178, 148), (170, 160, 150), (150, 98, 78), (208, 200, 188), (120, 112, 104))
ROOFS: tuple[Color, ...] = ((96, 84, 78), (136, 72, 56), (70, 96, 92), (110, 110, 118))


@dataclass(frozen=True, slots=True)
class World:
    """Sizes of a world. Benchmark, training and distractor landmarks are all different ones."""

    landmarks: int = 12
    queries: int = 3
    """Query photos of each benchmark landmark."""
    views: int = 20
    """Database photos of each benchmark landmark."""
    train_landmarks: int = 24
    train_views: int = 16
    unlabelled: int = 600
    distractors: int = 600
    side: int = 224
    """px of the long side of a photo."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Shot:
    """One photo: the image, the landmark's box (x1 y1 x2 y2 in px) and its label as a database image."""

    image: Image.Image
    box: tuple[float, float, float, float]
    label: Label


# ------------------------------------------------------------------------------------------------ landmark


def facade(seed: int, landmark: int) -> Image.Image:
    """The landmark seen straight on: RGBA, FACADE px square, transparent around it."""
    rng = np.random.default_rng([seed, 1, landmark])
    image = Image.new("RGBA", (FACADE, FACADE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    stone, roof = STONES[rng.integers(len(STONES))], ROOFS[rng.integers(len(ROOFS))]
    num_blocks = int(rng.integers(1, 5))
    cuts = np.sort(rng.uniform(0.1, 0.9, num_blocks - 1)) if num_blocks > 1 else np.array([])
    edges = 16 + (FACADE - 32) * np.concatenate([[0.0], cuts, [1.0]])
    mirrored = bool(rng.random() < 0.4) and num_blocks > 2
    blocks = [_block(rng, e0, e1, stone, roof) for e0, e1 in pairwise(edges) if e1 - e0 > 14]
    if mirrored:
        edge = FACADE - 1
        half = [b for b in blocks if b.right <= FACADE / 2] or blocks[:1]
        blocks = half + [b.mirror(edge) for b in half] + [b for b in blocks if b.left < FACADE / 2 < b.right]
    for block in blocks:
        block.draw(draw)
    return image


@dataclass(frozen=True, slots=True)
class _Block:
    left: float
    right: float
    top: float
    stone: Color
    roof_color: Color
    roof: int
    roof_height: float
    rows: int
    columns: int
    window: int
    fill: float
    bands: int
    ornament: int

    def mirror(self, edge: float) -> _Block:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _Block(**{**values, "left": edge - self.right, "right": edge - self.left})

    def draw(self, draw: ImageDraw.ImageDraw) -> None:
        left, right, top, bottom = self.left, self.right, self.top, FACADE - 10.0
        dark = _shade(self.stone, 0.45)
        draw.rectangle((left, top, right, bottom), fill=self.stone, outline=_shade(self.stone, 0.7))
        self._draw_roof(draw)
        for band in range(1, self.bands + 1):
            y = top + (bottom - top) * band / (self.bands + 1)
            draw.rectangle((left, y - 2, right, y + 2), fill=_shade(self.stone, 0.8))
        width, height = (right - left) / self.columns, (bottom - top - 12) / self.rows
        for row in range(self.rows):
            for column in range(self.columns):
                x, y = left + width * column, top + 8 + height * row
                w, h = width * self.fill, height * self.fill * 0.9
                x0, y0 = x + (width - w) / 2, y + (height - h) / 2
                if w < 2 or h < 2:
                    continue
                if self.window == 0:
                    draw.rectangle((x0, y0, x0 + w, y0 + h), fill=dark)
                elif self.window == 1:
                    draw.ellipse((x0, y0, x0 + w, y0 + h), fill=dark)
                elif self.window == 2:
                    draw.pieslice((x0, y0, x0 + w, y0 + min(h, 2 * w)), 180, 360, fill=dark)
                    draw.rectangle((x0, y0 + min(h, 2 * w) / 2, x0 + w, y0 + h), fill=dark)
                else:
                    draw.polygon(((x0 + w / 2, y0), (x0 + w, y0 + h), (x0, y0 + h)), fill=dark)
        middle, size = (left + right) / 2, (right - left) * 0.28
        if self.ornament == 1:
            draw.ellipse(
                (middle - size, top + 10, middle + size, top + 10 + 2 * size),
                fill=_shade(self.stone, 1.25),
                outline=dark,
                width=3,
            )
            draw.line((middle, top + 10 + size, middle + size * 0.6, top + 10 + size * 0.5), fill=dark, width=3)
        elif self.ornament == 2:
            draw.rectangle(
                (middle - size / 2, bottom - 3 * size, middle + size / 2, bottom), fill=_shade(self.roof_color, 0.7)
            )
        elif self.ornament == 3:
            draw.polygon(
                ((left, top + 30), (right, top + 30), (middle, top + 2)), fill=_shade(self.stone, 1.15), outline=dark
            )

    def _draw_roof(self, draw: ImageDraw.ImageDraw) -> None:
        left, right, top, h = self.left, self.right, self.top, self.roof_height
        middle = (left + right) / 2
        if self.roof == 0:
            draw.polygon(((left - 4, top), (right + 4, top), (middle, top - h)), fill=self.roof_color)
        elif self.roof == 1:
            draw.pieslice((left, top - h, right, top + h), 180, 360, fill=self.roof_color)
        elif self.roof == 2:
            step = max(6.0, (right - left) / 6)
            for x in np.arange(left, right - step / 2, step):
                draw.rectangle((x, top - 10, x + step / 2, top), fill=self.stone)
        elif self.roof == 3:
            draw.polygon(((middle - 6, top), (middle + 6, top), (middle, top - 1.6 * h)), fill=self.roof_color)
            draw.rectangle((left - 3, top - 5, right + 3, top), fill=self.roof_color)
        else:
            draw.rectangle((left - 5, top - 6, right + 5, top + 2), fill=_shade(self.stone, 0.85))


def _block(rng: Rng, left: float, right: float, stone: Color, roof_color: Color) -> _Block:
    wide = right - left
    top = float(rng.uniform(70, 190))
    return _Block(
        left, right, top, _shade(stone, float(rng.uniform(0.9, 1.1))), roof_color,
        roof=int(rng.integers(5)), roof_height=float(rng.uniform(20, 60)),
        rows=int(rng.integers(1, 8)), columns=max(1, int(wide / rng.uniform(10, 36))),
        window=int(rng.integers(4)), fill=float(rng.uniform(0.35, 0.75)), bands=int(rng.integers(0, 4)),
        ornament=int(rng.integers(5)) if wide > 40 else 0,
    )  # fmt: skip


def _shade(color: Color, factor: float) -> Color:
    r, g, b = (max(0, min(255, int(c * factor))) for c in color)
    return r, g, b


# ------------------------------------------------------------------------------------------------ photo


def photograph(drawing: Image.Image | None, rng: Rng, side: int) -> Shot:
    """A photo of a landmark's drawing (None: a scene without one), as a function of `rng`'s state."""
    width, height = (side, int(side * rng.uniform(0.66, 0.8)))
    if rng.random() < 0.4:
        width, height = height, width
    scene = _scene(rng, width, height)
    if drawing is None:
        _clutter(scene, rng, 6)
        return Shot(_develop(scene, rng), (0.0, 0.0, float(width), float(height)), "junk")
    scale = rng.uniform(0.35, 1.05) * min(width, height)
    corners = _corners(rng, width, height, scale)
    warped = drawing.transform(
        (width, height), Image.Transform.PERSPECTIVE, _coefficients(corners), Image.Resampling.BILINEAR
    )
    whole = np.asarray(warped.getchannel("A")) > 127
    scene.paste(warped, (0, 0), warped)
    before = np.asarray(scene).copy()
    _clutter(scene, rng, int(rng.integers(0, 9)))
    covered = (np.asarray(scene) != before).any(axis=2)
    seen = whole & ~covered
    expected = float((np.asarray(drawing.getchannel("A")) > 127).mean()) * scale * scale
    visible = float(seen.sum()) / max(expected, 1.0)
    size = scale / min(width, height)
    label: Label = "easy" if visible > 0.6 and size > 0.5 else "hard" if visible > 0.4 else "junk"
    rows, columns = np.flatnonzero(whole.any(axis=1)), np.flatnonzero(whole.any(axis=0))
    if len(rows) < 4 or len(columns) < 4:
        return Shot(_develop(scene, rng), (0.0, 0.0, float(width), float(height)), "junk")
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Shot(_develop(scene, rng), box, label)


def _corners(rng: Rng, width: int, height: int, scale: float) -> npt.NDArray[np.float64]:
    """Where the corners of the drawing fall in the photo: a turned, tilted square about a random centre."""
    unit = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    yaw, roll = rng.uniform(-0.9, 0.9), rng.normal(0, 0.06)
    depth = 1 + 0.45 * np.sin(yaw) * unit[:, 0]  # the far side is smaller
    points = unit * [[np.cos(yaw), 1.0]] / depth[:, None]
    points[:, 0] *= 1 + 0.25 * rng.uniform(-1, 1) * (points[:, 1] < 0)  # looking up
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    centre = np.array([width, height]) * rng.uniform(0.32, 0.68, 2)
    return np.asarray((points @ turn.T) * scale + centre)


def _coefficients(corners: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Pillow's eight numbers, which map a photo's pixel to the drawing's."""
    source = np.array([[0, 0], [FACADE, 0], [FACADE, FACADE], [0, FACADE]], dtype=np.float64)
    rows = []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return tuple(np.linalg.solve(np.array(rows), source.ravel()))


def _scene(rng: Rng, width: int, height: int) -> Image.Image:
    horizon = rng.uniform(0.55, 0.85)
    sky_top, sky_low = rng.uniform(90, 235, 3), rng.uniform(150, 245, 3)
    ground = np.array([[110, 130, 80], [140, 130, 120], [170, 160, 140], [90, 100, 110]])[rng.integers(4)]
    y = np.linspace(0, 1, height)[:, None]
    sky = sky_top * (1 - y / horizon) + sky_low * (y / horizon)
    rows = np.where(y < horizon, sky, ground * (1.1 - 0.3 * y))
    pixels = np.repeat(rows[:, None, :], width, axis=1) + rng.normal(0, 6, (height, width, 1))
    scene = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(scene)
    for _ in range(int(rng.integers(0, 7))):  # a skyline behind
        x, w, h = rng.uniform(0, width), rng.uniform(0.05, 0.25) * width, rng.uniform(0.05, 0.45) * height
        color = _shade(STONES[rng.integers(len(STONES))], float(rng.uniform(0.6, 1.1)))
        draw.rectangle((x, horizon * height - h, x + w, horizon * height), fill=color)
        for wx in np.arange(x + 3, x + w - 3, 8):
            draw.line((wx, horizon * height - h + 4, wx, horizon * height - 4), fill=_shade(color, 0.7), width=2)
    return scene


def _clutter(scene: Image.Image, rng: Rng, count: int) -> None:
    """Trees, people and signs in front of everything."""
    draw = ImageDraw.Draw(scene)
    width, height = scene.size
    for _ in range(count):
        x, y = rng.uniform(0, width), rng.uniform(0.45, 1.0) * height
        size = rng.uniform(0.06, 0.22) * height
        kind = rng.integers(3)
        if kind == 0:
            green = (int(rng.integers(30, 90)), int(rng.integers(80, 140)), int(rng.integers(30, 80)))
            draw.rectangle((x - size * 0.08, y, x + size * 0.08, y + size), fill=(84, 62, 44))
            draw.ellipse((x - size * 0.7, y - size, x + size * 0.7, y + size * 0.4), fill=green)
        elif kind == 1:
            cloth = (int(rng.integers(256)), int(rng.integers(256)), int(rng.integers(256)))
            draw.rectangle((x - size * 0.15, y - size * 0.5, x + size * 0.15, y + size * 0.5), fill=cloth)
            draw.ellipse((x - size * 0.1, y - size * 0.72, x + size * 0.1, y - size * 0.5), fill=(206, 166, 140))
        else:
            paint = (int(rng.integers(256)), int(rng.integers(256)), int(rng.integers(256)))
            draw.rectangle((x - size, y - size * 0.3, x + size, y + size * 0.3), fill=paint, outline=(30, 30, 30))


def _develop(scene: Image.Image, rng: Rng) -> Image.Image:
    """Light, colour cast, haze, blur and noise."""
    scene = ImageEnhance.Brightness(scene).enhance(float(rng.uniform(0.55, 1.35)))
    scene = ImageEnhance.Contrast(scene).enhance(float(rng.uniform(0.6, 1.3)))
    scene = ImageEnhance.Color(scene).enhance(float(rng.uniform(0.2, 1.4)))
    if rng.random() < 0.3:
        scene = scene.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.4))))
    pixels = np.asarray(scene, dtype=np.float64) * rng.uniform(0.8, 1.2, 3)
    pixels += rng.normal(0, rng.uniform(1, 9), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


# ------------------------------------------------------------------------------------------------ world


def shoot(world: World, group: int, landmark: int, view: int, drawing: Image.Image | None) -> Shot:
    """One photo of the world; (group, landmark, view) are its address."""
    return photograph(drawing, np.random.default_rng([world.seed, 2, group, landmark, view]), world.side)


def write(world: World, folder: Path) -> None:
    """Write `benchmark.tar`, `train.tar`, `unlabelled.tar`, `distractors.tar` and `groundtruth.json`.

    The layout is that of real data (`jpg/name.jpg`, and `class/file.jpg` for training), and the ground truth has the
    revisited structure as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = (
        world.landmarks * (world.queries + world.views) + world.train_landmarks * world.train_views
        + world.unlabelled + world.distractors
    )  # fmt: skip
    with Progress("world", total, "images") as progress:
        _write_benchmark(world, folder, progress)
        with _Tar(folder / "train.tar", progress) as tar:
            for landmark in range(world.train_landmarks):
                drawing = facade(world.seed, 10_000 + landmark)
                for view in range(world.train_views):
                    tar.add(f"site_{landmark:03d}/{view:05d}.jpg", shoot(world, 1, landmark, view, drawing))
        with _Tar(folder / "unlabelled.tar", progress) as tar:
            for number in range(world.unlabelled):
                drawing = facade(world.seed, 20_000 + number)
                tar.add(f"jpg/photo_{number:06d}.jpg", shoot(world, 2, number, 0, drawing))
        with _Tar(folder / "distractors.tar", progress) as tar:
            for number in range(world.distractors):
                nothing = number % 4 == 0
                drawing_or_none = None if nothing else facade(world.seed, 30_000 + number)
                tar.add(f"jpg/distractor_{number:06d}.jpg", shoot(world, 3, number, 0, drawing_or_none))


def _write_benchmark(world: World, folder: Path, progress: Progress) -> None:
    names: list[str] = []
    queries: list[tuple[str, tuple[float, float, float, float], int]] = []
    labels: dict[int, dict[str, list[int]]] = {}
    with _Tar(folder / "benchmark.tar", progress) as tar:
        for landmark in range(world.landmarks):
            drawing = facade(world.seed, landmark)
            taken = view = 0
            while taken < world.queries:  # a query is a photo on which the landmark is easy to see
                shot = shoot(world, 0, landmark, view, drawing)
                view += 1
                if shot.label == "easy":
                    name = f"landmark{landmark:03d}_{taken:06d}"
                    queries.append((name, shot.box, landmark))
                    tar.add(f"jpg/{name}.jpg", shot)
                    taken += 1
            labels[landmark] = {"easy": [], "hard": [], "junk": []}
            for number in range(world.views):
                shot = shoot(world, 0, landmark, view + number, drawing)
                labels[landmark][shot.label].append(len(names))
                names.append(f"landmark{landmark:03d}_{world.queries + number:06d}")
                tar.add(f"jpg/{names[-1]}.jpg", shot)
    gnd = [{"bbx": list(box), **labels[landmark]} for _, box, landmark in queries]
    truth = {"imlist": names, "qimlist": [name for name, _, _ in queries], "gnd": gnd}
    (folder / "groundtruth.json").write_text(json.dumps(truth))


class _Tar:
    """A tar of JPEGs whose bytes depend on the images alone."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._file = tarfile.open(path, "w")  # noqa: SIM115 - closed in __exit__
        self._progress = progress

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, shot: Shot) -> None:
        out = io.BytesIO()
        shot.image.save(out, "JPEG", quality=85)
        info = tarfile.TarInfo(name)
        info.size = len(out.getvalue())
        self._file.addfile(info, io.BytesIO(out.getvalue()))
        self._progress.advance()
