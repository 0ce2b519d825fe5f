"""Views are what their recipes say, and functions of photo, recipe and seed alone."""

from __future__ import annotations

import colorsys
import math
import pickle
import random
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from bad_images import encode, photo
from PIL import ExifTags, Image
from pydantic import ValidationError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from iir_dist.data import augment
from iir_dist.data.augment import Recipe, crop_box, view_of
from iir_dist.data.images import TURNS, decode

PLAIN = Recipe(size=16, scale=(1, 1), flip=0, jitter=0, grey=0, blur=0, solarize=0)
"""Changes nothing of a square photo but its size: a crop of all its area and another ratio does not fit."""
SQUARE = photo(24, 24)

PUBLISHED = {
    # size, area, jitter of brightness, contrast, saturation, hue; blur, solarise, interpolation
    "SIMCLR": (224, (0.08, 1), (0.8, 0.8, 0.8, 0.2), 0.5, 0, "bicubic"),
    "MOCO_V2": (224, (0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.5, 0, "bilinear"),
    "BYOL_A": (224, (0.08, 1), (0.4, 0.4, 0.2, 0.1), 1, 0, "bicubic"),
    "BYOL_B": (224, (0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.1, 0.2, "bicubic"),
    "VICREG": (224, (0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.5, 0.1, "bicubic"),
    "SWAV_GLOBAL": (224, (0.14, 1), (0.8, 0.8, 0.8, 0.2), 0.5, 0, "bilinear"),
    "SWAV_LOCAL": (96, (0.05, 0.14), (0.8, 0.8, 0.8, 0.2), 0.5, 0, "bilinear"),
    "DINO_GLOBAL_1": (224, (0.14, 1), (0.4, 0.4, 0.2, 0.1), 1, 0, "bicubic"),
    "DINO_GLOBAL_2": (224, (0.14, 1), (0.4, 0.4, 0.2, 0.1), 0.1, 0.2, "bicubic"),
    "DINO_LOCAL": (96, (0.05, 0.14), (0.4, 0.4, 0.2, 0.1), 0.5, 0, "bicubic"),
}


def difference(a: Any, b: Any) -> Any:
    return np.abs(np.asarray(a, float) - np.asarray(b, float))


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name: str) -> None:
    recipe = getattr(augment, name)
    size, scale, strengths, blur, solarize, interpolation = PUBLISHED[name]
    assert (recipe.size, recipe.scale, recipe.blur, recipe.solarize) == (size, scale, blur, solarize)
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == strengths
    assert (recipe.flip, recipe.jitter, recipe.grey, recipe.interpolation) == (0.5, 0.8, 0.2, interpolation)
    assert Recipe(**recipe.model_dump()) == recipe  # copies are not validated when made


@pytest.mark.parametrize("wrong", [{"size": 0}, {"flip": 1.5}, {"hue": 0.6}, {"interpolation": "nearest"}, {"zoom": 2},
                                   {"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 1.2)}])  # fmt: skip
def test_what_is_no_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Recipe(**wrong)


# ------------------------------------------------------------------------------------------------ purity


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_view_is_a_function_of_photo_and_seed(name: str) -> None:
    view = view_of(getattr(augment, name).model_copy(update={"size": 33}))
    image = photo(70, 50)
    before = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    first = [view(image, seed) for seed in range(12)]
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert np.array_equal(image, photo(70, 50))  # the next view is made of it
    random.seed(1)
    torch.manual_seed(1)
    sent = pickle.loads(pickle.dumps(view))  # noqa: S301
    assert sent.least == view.least
    for seed in reversed(range(12)):
        x = sent(image, seed)
        assert torch.equal(x, first[seed])
        assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 33, 33), torch.uint8, True)
    assert len({x.numpy().tobytes() for x in first}) == 12


# ------------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("operation", ["flip", "jitter", "grey", "blur", "solarize"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_each_operation_comes_with_its_probability(operation: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 400
    monkeypatch.setattr(augment, "SIGMA", (1.0, 2.0))  # a blur of 0.1 px changes no level
    plain, view = view_of(PLAIN), view_of(PLAIN.model_copy(update={operation: p}))
    kept = plain(SQUARE, 0)
    changed = sum(not torch.equal(view(SQUARE, augment.seed_of(n, seed)), kept) for seed in range(n))
    assert abs(changed - n * p) < 4 * math.sqrt(n * p * (1 - p))
    never, always = (view_of(PLAIN.model_copy(update={operation: q})) for q in (0.0, 1.0))
    assert all(torch.equal(never(SQUARE, seed), kept) for seed in range(40))
    assert not any(torch.equal(always(SQUARE, seed), kept) for seed in range(40))


def test_operations_do_what_they_are_called() -> None:
    kept = view_of(PLAIN)(SQUARE, 0).int()

    def of(operation: str) -> torch.Tensor:
        return view_of(PLAIN.model_copy(update={operation: 1.0}))(SQUARE, 3).int()

    assert torch.equal(of("flip"), kept.flip(-1))
    assert torch.equal(of("solarize"), torch.where(kept >= 128, 255 - kept, kept))
    grey = of("grey")
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    assert (grey - F.rgb_to_grayscale(kept.float())).abs().max() <= 0.55  # one rounding; its weights are rounded
    assert of("blur").float().std() < kept.float().std()


def test_grey_follows_jitter_and_solarisation_follows_blur() -> None:
    def of(seed: int, **changes: float) -> torch.Tensor:
        return view_of(PLAIN.model_copy(update={"hue": 0.5, **changes}))(SQUARE, seed).float()

    for seed in range(5):
        jittered, blurred = of(seed, jitter=1.0), of(seed, blur=1.0)
        grey, inverted = of(seed, jitter=1.0, grey=1.0), of(seed, blur=1.0, solarize=1.0)
        assert (grey - F.rgb_to_grayscale(jittered)).abs().max() < 1.1
        clear = (blurred - 128).abs() > 1
        assert (inverted - torch.where(blurred >= 128, 255 - blurred, blurred))[clear].abs().max() <= 1


@pytest.mark.parametrize("factor", [0.2, 0.6, 1.0, 1.8])
def test_jitter_of_light_is_torchvisions(factor: float) -> None:
    x = np.asarray(SQUARE).transpose(2, 0, 1).astype(np.float32)
    unit = torch.from_numpy(x / 255)
    for ours, theirs in [
        (augment._brightness, F.adjust_brightness), (augment._contrast, F.adjust_contrast),
        (augment._saturation, F.adjust_saturation),
    ]:  # fmt: skip
        assert difference(ours(x, factor), theirs(unit, factor) * 255).max() < 0.05  # its grey has rounded weights


@pytest.mark.parametrize("turn", [-0.5, -0.2, -0.01, 0.0, 0.1, 0.37, 0.5])
def test_hue_is_that_of_hsv(turn: float) -> None:
    levels = [0.0, 17.0, 128.0, 200.0, 255.0]
    x = np.array([(r, g, b) for r in levels for g in levels for b in levels], np.float32)
    expected = []
    for r, g, b in x.tolist():
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        expected.append([255 * c for c in colorsys.hsv_to_rgb((h + turn) % 1, s, v)])
    got = augment._hue(np.ascontiguousarray(x.T).reshape(3, 5, 25), turn).reshape(3, -1).T
    assert difference(got, expected).max() < 1e-3


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 0.1), (9, 0.6), (9, 2.0), (23, 1.3), (23, 2.0)])
def test_blur_is_torchvisions(kernel: int, sigma: float) -> None:
    x = np.asarray(photo(41, 32)).transpose(2, 0, 1).astype(np.float32)
    expected = F.gaussian_blur(torch.from_numpy(x), [kernel, kernel], [sigma, sigma])
    assert difference(augment._blur(x, kernel, sigma), expected).max() < 0.05


def test_jitter_comes_in_every_order_with_factors_from_the_whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["brightness", "contrast", "saturation", "hue"]
    calls: list[tuple[str, float]] = []
    for name in names:
        monkeypatch.setattr(augment, f"_{name}", lambda x, f, name=name: (calls.append((name, f)), x)[1])
    recipe = PLAIN.model_copy(update={"jitter": 1.0, "brightness": 1.2, "saturation": 0.2})
    view = view_of(recipe)
    for seed in range(300):
        view(SQUARE, seed)
    orders = {tuple(name for name, _ in calls[i : i + 4]) for i in range(0, len(calls), 4)}
    assert orders == set(permutations(names))
    ranges = {"brightness": (0, 2.2), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        factors = np.array([f for called, f in calls if called == name])
        slack = (high - low) * 0.02
        assert low <= factors.min() < low + slack
        assert high - slack < factors.max() <= high
    calls.clear()
    view_of(recipe.model_copy(update={"hue": 0.0, "contrast": 0.0}))(SQUARE, 0)
    assert {name for name, _ in calls} == {"brightness", "saturation"}


# ------------------------------------------------------------------------------------------------ crops


def boxes(width: int, height: int, scale: tuple[float, float], n: int = 3000) -> Any:
    return np.array([crop_box(width, height, scale, random.Random(seed)) for seed in range(n)])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)])
def test_crops_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    width, height, n = 640, 480, 3000
    x1, y1, x2, y2 = boxes(width, height, scale, n).T
    assert min(x1.min(), y1.min()) >= 0
    assert x2.max() <= width
    assert y2.max() <= height
    area, ratio = (x2 - x1) * (y2 - y1) / (width * height), (x2 - x1) / (y2 - y1)
    assert scale[0] - 1e-9 <= area.min() <= area.max() <= scale[1] + 1e-9
    assert 3 / 4 - 1e-9 <= ratio.min() <= ratio.max() <= 4 / 3 + 1e-9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crop, image = v2.RandomResizedCrop(8, scale=scale), torch.empty(3, height, width)
        drawn = [crop.make_params([image]) for _ in range(n)]
    h, w, top, left = (np.array([d[key] for d in drawn]) for key in ("height", "width", "top", "left"))
    bound = 1.95 * math.sqrt(2 / n)  # of Kolmogorov and Smirnov, at 0.001
    pairs = [(area, h * w / (width * height)), (ratio, w / h), (x1 + x2, 2 * left + w), (y1 + y2, 2 * top + h)]
    for ours, theirs in pairs:
        at = np.sort(np.concatenate([ours, theirs]))
        ours, theirs = (np.searchsorted(np.sort(v), at, side="right") / n for v in (ours, theirs))
        assert difference(ours, theirs).max() < bound


@pytest.mark.parametrize(("size", "box"), [((1000, 90), (440, 0, 560, 90)), ((60, 1000), (0, 460, 60, 540))])
def test_of_a_panorama_the_middle_is_taken(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert np.allclose(boxes(*size, (1.0, 1.0), 5), box)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3)])
def test_the_smallest_photos_have_views(size: tuple[int, int]) -> None:
    view = view_of(augment.SIMCLR.model_copy(update={"size": 32}))
    assert all(view(Image.new("RGB", size, "teal"), seed).shape == (3, 32, 32) for seed in range(20))


# ------------------------------------------------------------------------------------------------ smaller decoding


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (3000, 400), (500, 500)])
def test_no_crop_of_what_is_decoded_smaller_is_enlarged(size: tuple[int, int]) -> None:
    for scale in [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)]:
        view = view_of(PLAIN.model_copy(update={"size": 32, "scale": scale}))
        assert view.least is not None
        factor = view.least / min(size)  # as much smaller as it could be
        x1, y1, x2, y2 = boxes(round(size[0] * factor), round(size[1] * factor), scale, 1000).T
        smallest = min((x2 - x1).min(), (y2 - y1).min())
        assert smallest > 31.5  # of sides that are rounded
        if max(size) < 2 * min(size):
            assert smallest < 42
    assert augment.mild(32).least is None  # its pixels stay those of a whole photo


ORIENTATIONS = {1: None, **TURNS}
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_views_are_those_of_the_upright_photo_however_it_is_stored(orientation: int, mode: str) -> None:
    upright = photo(256, 192)
    turn = ORIENTATIONS[orientation]
    stored = upright if turn is None else upright.transpose(BACK.get(turn, turn))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(stored.convert(mode), "JPEG", quality=100, subsampling=0, exif=exif)
    small = decode(data, least=40)
    assert small.size == (64, 48)
    recipe = PLAIN.model_copy(update={"scale": (0.2, 1.0), "flip": 0.5})
    view = view_of(recipe)
    for seed in range(6):
        expected = view(upright, seed)
        assert difference(view(decode(data), seed), expected).mean() < 0.6
        assert difference(view(small, seed), expected).mean() < 1.0
