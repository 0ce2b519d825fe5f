"""Chunks of views: the same pixels whoever makes them, with whatever else is in the chunk."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from bad_images import encode, photo
from photos import jpeg
from torch import Tensor

from iir_dist.data.augment import BYOL_A, BYOL_B, DINO_LOCAL, MOCO_V2, View, mild, seed_of, view_of
from iir_dist.data.cache import Photos
from iir_dist.data.images import decode
from iir_dist.errors import TrainingError
from iir_dist.train import views
from iir_dist.train.views import Key, Stream

SIZE = 16


def at(size: int, *recipes: Any) -> list[View]:
    return [view_of(recipe.model_copy(update={"size": size})) for recipe in recipes]


PAIR = [*at(SIZE, BYOL_A, BYOL_B), mild(SIZE)]
"""The first two ask for a smaller decoding, the third for the whole photo."""


def album(*damaged: int) -> Photos:
    """Four JPEGs and a PNG, by number, as `Photos` has them; the damaged ones lack their end."""
    images = [encode(photo(300 + 8 * n, 240), "JPEG", quality=90) for n in range(3)]
    images += [encode(photo(200, 150)), jpeg(4)]
    data = [x[:-400] if n in damaged else x for n, x in enumerate(images)]
    return cast(Photos, [SimpleNamespace(name=f"p{n}", data=x) for n, x in enumerate(data)])


@pytest.fixture(scope="module")
def photos() -> Photos:
    return album()


def key(number: int, view: int, seed: int = 0) -> Key:
    return Key(number, seed_of(seed, number, view), view)


def chunks(photos: Photos, view: Any, plan: list[list[Key]], loaders: int = 0) -> list[Tensor]:
    return list(Stream(photos, view, lambda _: plan, 1, loaders).chunks(0))


def alone(photos: Photos, key: Key) -> Tensor:
    view = PAIR[key.view]
    return view(decode(photos[key.number].data, least=view.least), key.seed)


def test_a_view_does_not_depend_on_the_rest_of_its_chunk(photos: Photos) -> None:
    keys = [key(n, v, s) for v in range(3) for s in range(2) for n in range(len(photos))]
    mixed = [keys[i] for i in torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)).tolist()]
    for plan in ([keys], [mixed], [keys[:7], mixed[3:9], keys[2:3]], [[keys[0], keys[0]]]):
        for chunk, own in zip(chunks(photos, PAIR, plan), plan, strict=True):
            assert torch.equal(chunk, torch.stack([alone(photos, k) for k in own]))
    assert len({alone(photos, k).numpy().tobytes() for k in keys}) == len(keys)


@pytest.mark.parametrize("loaders", [0, 2])
def test_loaders_make_the_same_pixels_and_name_what_no_longer_decodes(photos: Photos, loaders: int) -> None:
    plan = [[key(n, v) for v in range(3) for n in own] for own in ([0, 2], [2, 3], [3, 0, 2])]
    stream = Stream(album(1, 4), PAIR, lambda _: [*plan, [*plan[0], key(1, 0), key(4, 0)]], 1, loaders).chunks(0)
    for keys in plan:
        assert torch.equal(next(stream), torch.stack([alone(photos, k) for k in keys]))
    with pytest.raises(TrainingError, match=r"^photo 'p1' cannot be decoded: .*; run iir verify"):
        next(stream)


def test_a_photo_is_decoded_once_for_a_chunk_and_scale_and_not_held(
    photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []
    alive: list[weakref.ref[Any]] = []
    decoded = views.decoded

    def counted(photos: Photos, number: int, least: int | None = None) -> Any:
        assert all(image() is None for image in alive)
        image = decoded(photos, number, least)
        asked.append((number, least))
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(views, "decoded", counted)
    numbers = [2, 0, 1]
    least = PAIR[0].least
    chunks(photos, PAIR, [[key(n, v) for v in range(2) for n in numbers], [key(n, v) for v in (0, 2) for n in (0, 1)]])
    assert asked == [(2, least), (0, least), (1, least), (0, least), (1, least), (0, None), (1, None)]


def test_one_view_or_several(photos: Photos) -> None:
    assert Key(1, 2) == Key(1, 2, 0)
    plan = [[Key(0, 5), Key(1, 6)]]
    assert torch.equal(chunks(photos, PAIR[0], plan)[0], chunks(photos, PAIR, plan)[0])


def test_fine_tuning_still_sees_whole_photos(photos: Photos) -> None:
    view = mild(SIZE)
    expected = torch.stack([view(decode(photos[n].data), n) for n in range(3)])
    assert torch.equal(chunks(photos, view, [[Key(n, n) for n in range(3)]])[0], expected)


@pytest.mark.parametrize(("size", "recipe", "expected"), [(16, MOCO_V2, 60), (16, DINO_LOCAL, 120), (64, MOCO_V2, 240)])
def test_how_small_is_decided_by_recipe_and_photo(photos: Photos, size: int, recipe: Any, expected: int) -> None:
    (view,) = at(size, recipe)
    assert min(views.decoded(photos, 0, view.least).size) == expected
    assert min(views.decoded(photos, 3, view.least).size) == 150  # a PNG
    assert min(views.decoded(photos, 0).size) == 240
