"""The encoder: trunk, pooling, optional projection, optional whitening; every stage gives unit vectors.

On disk it is `weights.safetensors` and `encoder.json`, which holds all that decides a descriptor (input size and
resize rule, normalization, scales, pooling), so that a result can say what it was made with.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Manifest
from iir_dist.config import StageConfig
from iir_dist.data.images import Resize
from iir_dist.errors import ConfigError, CorruptError
from iir_dist.models.backbones import BACKBONES, TIMM, Trunk, backbone, build_backbone, load_strictly
from iir_dist.models.pooling import GeM, Pooling, RegionalGeM, build_pooling
from iir_dist.storage import Folder, sha256_of

ScaleRule = Literal["mean", "max"]
WEIGHTS, SPEC = "weights.safetensors", "encoder.json"


class WhiteningSpec(BaseModel):
    """How the whitening was learnt, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: Literal["pca", "lw", "regions"] = "pca"
    dim: int
    power: float | None
    """Of pca and regions."""
    shrinkage: float | None = None
    """Of lw."""
    learnt_on: str
    """Fingerprint of the embeddings; of regions, of the images."""
    images: str | None = None
    """Fingerprint of the images artifact that they were made of."""
    splits: dict[str, int] = {}
    """Number of the vectors by split; of regions, of the images that were drawn."""
    base: str
    """Fingerprint of the encoder before whitening."""


class EncoderConfig(StageConfig):
    """`[encoder]`: an off-the-shelf encoder, or the start of a training."""

    backbone: str = "efficientnet_lite0"
    """efficientnet_lite0, _lite1, _lite2, resnet18, 34, 50, 101, convnext_tiny, _small, _base, or timm:NAME."""
    weights: str = "imagenet"
    """"imagenet" (from a package), "random", or a .safetensors/.pth file in any layout of `checkpoints.LAYOUTS`."""
    seed: int = 0
    """Seed of random weights."""
    pooling: Pooling = "gem"
    """"gem", "spoc", "mac", "rmac" (`iir whiten --set method=regions` whitens its regions), or "cls" (a ViT's class token)."""
    p: float = Field(3.0, gt=0)
    """GeM's exponent (its start, where it is trained)."""
    size: int = Field(224, ge=16, le=4096)
    """px of the long side (resize long) or of both sides (squash)."""
    resize: Resize = "squash"
    scales: tuple[float, ...] = (1.0,)
    """Image scales whose vectors are combined; the benchmarks' choice is [1, 0.7071, 0.5]."""
    scale_rule: ScaleRule = "mean"
    """"mean" (generalized as GeM's, where that is the last layer) or "max" (Scale-GeM)."""
    regional_gem: bool = False
    """Regional GeM before the pooling."""
    relu_plus: bool = False
    """ResNets: ReLU+, max(x, 0.014), at the outputs of the blocks of the first three stages (`backbones.add_relu_plus`)."""
    flip: bool = False
    """Average with the mirrored image."""
    execution: ClassVar[frozenset[str]] = frozenset()

    @field_validator("scales")
    @classmethod
    def _positive(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or not all(0 < s <= 4 for s in scales):
            raise ValueError("expected one or more scales in (0, 4]")
        return scales

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BACKBONES and not name.startswith(TIMM):
            raise ValueError(f"not a known backbone; known: {', '.join(sorted(BACKBONES))}, {TIMM}NAME")
        return name


class EncoderSpec(BaseModel):
    """`encoder.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    backbone: str
    weights: str
    pooling: Pooling
    p: float
    region_whitening: WhiteningSpec | None = None
    """Of each region of R-MAC."""
    projection: int | None = None
    whitening: WhiteningSpec | None = None
    size: int
    resize: Resize
    resample: str = "bilinear"
    scales: tuple[float, ...]
    scale_rule: ScaleRule = "mean"
    regional_gem: bool = False
    relu_plus: bool = False
    flip: bool = False
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dim: int


class Encoder(nn.Module):
    """(B, 3, H, W) float in [0, 1], RGB -> (B, dim) float32, unit L2 norm."""

    mean: Tensor
    std: Tensor
    whiten_mean: Tensor
    whiten_matrix: Tensor

    def __init__(self, spec: EncoderSpec, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.spec = spec
        channels = backbone(spec.backbone).dim
        width = spec.region_whitening.dim if spec.region_whitening else channels
        self.trunk = trunk if trunk is not None else build_backbone(spec.backbone, relu_plus=spec.relu_plus)
        self.regional = RegionalGeM() if spec.regional_gem else nn.Identity()
        self.pool = build_pooling(spec.pooling, spec.p, (width, channels) if spec.region_whitening else None)
        self.projection = nn.Linear(width, spec.projection) if spec.projection else None
        # Constants of the input and learnt whitening: not trained, but part of the network.
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        if spec.whitening:
            source = spec.projection or width
            self.register_buffer("whiten_mean", torch.zeros(source))
            self.register_buffer("whiten_matrix", torch.zeros(spec.whitening.dim, source))

    def pooled(self, x: Tensor) -> Tensor:
        """Trunk, pooling, L2."""
        token, feature_map = self.trunk.tokens((x - self.mean) / self.std)
        by_token = self.spec.pooling == "cls"
        v = cast(Tensor, token if by_token else feature_map).to(self.mean.dtype)
        with _no_autocast(x):
            return F.normalize(v if by_token else self.pool(self.regional(v)), dim=-1)

    def describe(self, x: Tensor) -> Tensor:
        """One scale, before whitening: trunk, pooling, L2, projection, L2."""
        v = self.pooled(x)
        if self.projection is not None:
            with _no_autocast(x):
                v = F.normalize(self.projection(v), dim=-1)
        return v

    def forward(self, x: Tensor) -> Tensor:
        """All scales, of the image and of its mirror image where that is asked for; then whitening."""
        v = self._scales(x)
        if self.spec.flip:
            v = F.normalize(v + self._scales(x.flip(-1)), dim=-1)
        return self.whiten(v)

    def _scales(self, x: Tensor) -> Tensor:
        """All scales combined as (mean of v_s^m)^(1/m), m = GeM's p without a projection, else 1; or as their maximum.

        The mean is cirtorch's (Radenovic et al., arXiv:1711.02512, section 5), the maximum Scale-GeM's with p at
        infinity (Shao et al., arXiv:2308.06954, section 3.1.3).
        """
        if self.spec.scales == (1.0,):
            return self.describe(x)
        parts = torch.stack([self.describe(_rescale(x, s)) for s in self.spec.scales])
        if self.spec.scale_rule == "max":
            v = parts.amax(dim=0)
        elif isinstance(self.pool, GeM) and self.projection is None:
            v = parts.pow(self.pool.p).mean(dim=0).pow(1.0 / self.pool.p)
        else:
            v = parts.mean(dim=0)
        return F.normalize(v, dim=-1)

    def whiten(self, v: Tensor) -> Tensor:
        """Apply the whitening, if there is one, to unit vectors (B, D)."""
        if self.spec.whitening is None:
            return v
        with _no_autocast(v):
            return F.normalize((v - self.whiten_mean) @ self.whiten_matrix.T, dim=-1)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast is for the trunk: pooling and all behind it, a few thousandths of the work, compute in float32."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    off: contextlib.AbstractContextManager[None] = torch.autocast(device, enabled=False)
    return off


def _rescale(x: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return x
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False, antialias=scale < 1)


def create(config: EncoderConfig) -> Encoder:
    """A new encoder from a config.

    Raises:
        ConfigError: the backbone has no class token to pool by, is no ResNet for ReLU+, or takes one size of images only.
    """
    chosen = backbone(config.backbone)
    if config.pooling == "cls" and not chosen.tokens:
        raise ConfigError(f"encoder.pooling = 'cls': {config.backbone} has no class token; expected a ViT of timm")
    if chosen.size and (config.resize, config.scales, (config.size, config.size)) != ("squash", (1.0,), chosen.size):
        raise ConfigError(
            f"encoder.backbone = {config.backbone!r} takes images of {chosen.size[0]} px only: --set size={chosen.size[0]} "
            "--set resize=squash --set scales=[1.0]"
        )
    trunk = build_backbone(config.backbone, config.weights, config.seed, relu_plus=config.relu_plus)
    spec = EncoderSpec(
        backbone=config.backbone, weights=config.weights, pooling=config.pooling, p=config.p, size=config.size,
        resize=config.resize, scales=config.scales, scale_rule=config.scale_rule, regional_gem=config.regional_gem,
        relu_plus=config.relu_plus, flip=config.flip, mean=chosen.mean, std=chosen.std, dim=chosen.dim,
    )  # fmt: skip
    return Encoder(spec, trunk).eval()


def project(encoder: Encoder, dim: int) -> Encoder:
    """The encoder with a projection (FC) of `dim` outputs behind its pooling; its weights are still to be set."""
    if encoder.spec.projection is not None:
        raise ConfigError(
            f"the encoder has a projection to {encoder.spec.projection} dimensions already; --set projection=null goes on "
            "training that one"
        )
    if dim > encoder.spec.dim:
        raise ConfigError(
            f"a projection to {dim} dimensions: the encoder has {encoder.spec.dim}; expected at most that"
        )
    spec = encoder.spec.model_copy(update={"projection": dim, "dim": dim})
    projected = Encoder(spec, encoder.trunk)
    projected.pool = encoder.pool
    return projected.eval()


def centre(encoder: Encoder, v: Tensor) -> None:
    """Set the projection so that it centres: W (v - mean), rows of W orthonormal, the directions of most variance first.

    n vectors vary in n - 1 directions; rows beyond these are drawn orthogonal to them, from a seed.

    Pooled ReLU maps are positive, so their cosines crowd near 1, where a histogram of similarities sees nothing;
    centred, they spread, and all that the trunk knows is kept.

    Args:
        v: (n, D) unit vectors of training images, before the projection.
    """
    layer = cast(nn.Linear, encoder.projection)
    v = v.double()
    mean = v.mean(dim=0)
    _, vectors = torch.linalg.eigh((v - mean).T @ (v - mean))
    known = vectors.T.flip(0)[: min(len(v) - 1, v.shape[1])]
    # An eigenvector's sign is arbitrary: its largest component is made positive.
    known = known * known.gather(1, known.abs().argmax(dim=1, keepdim=True)).sign()
    rows = known[: layer.out_features]
    if len(rows) < layer.out_features:
        drawn = torch.randn(
            v.shape[1], layer.out_features - len(rows), dtype=v.dtype, generator=torch.Generator().manual_seed(0)
        )
        rest, _ = torch.linalg.qr(drawn - known.T @ (known @ drawn))
        rows = torch.cat([rows, rest.T])
    with torch.no_grad():
        layer.weight.copy_(rows)
        layer.bias.copy_(-rows @ mean)


def save(encoder: Encoder, folder: Folder) -> dict[str, FileEntry]:
    """Write `weights.safetensors` and `encoder.json`; the entries for the manifest."""
    from safetensors.torch import save_file

    p = float(encoder.pool.p.detach()) if isinstance(encoder.pool, GeM) else encoder.spec.p
    spec = encoder.spec.model_copy(update={"p": p})
    with folder.publish(WEIGHTS) as weights:
        save_file({k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}, weights.path)
    with folder.publish(SPEC) as text:
        text.path.write_text(spec.model_dump_json(indent=2))
    return {WEIGHTS: artifact.entry_of(weights), SPEC: artifact.entry_of(text)}


def read_spec(folder: Folder) -> EncoderSpec:
    """`encoder.json` alone. Raises `CorruptError`."""
    try:
        return EncoderSpec.model_validate_json(folder.read(SPEC))
    except ValidationError as error:
        raise CorruptError(f"{folder.address(SPEC)} is not an encoder description: {error}") from error


def load(folder: Folder, manifest: Manifest) -> Encoder:
    """Rebuild the network, bit for bit, after checking its files against the manifest."""
    from safetensors.torch import load_file

    spec = read_spec(folder)
    encoder = Encoder(spec)
    artifact.check_file(folder, SPEC, manifest.files[SPEC])
    artifact.check_file(folder, WEIGHTS, manifest.files[WEIGHTS])
    with folder.local(WEIGHTS) as path:
        load_strictly(encoder, load_file(path), folder.address(WEIGHTS))
    return encoder.eval()


def run(out: str, config: EncoderConfig, *, force: bool = False) -> Manifest:
    """Write an off-the-shelf encoder artifact."""
    path = Path(config.weights)
    inputs = {}
    if config.weights not in ("random", "imagenet") and path.is_file():
        inputs["weights"] = artifact.InputRef(uri=str(path), fingerprint=sha256_of(path))
    with artifact.begin(out, "encoder", config, inputs, force=force) as work:
        if work.finished:
            return work.finished
        encoder = create(config)
        return work.publish({"parameters": num_parameters(encoder)}, save(encoder, work.folder), info_of(encoder))


def num_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(math.prod(p.shape) for p in module.parameters())


def info_of(encoder: Encoder) -> dict[str, Any]:
    """What later stages and reports show of an encoder without loading it."""
    return {"encoder": encoder.spec.model_dump(mode="json")}
