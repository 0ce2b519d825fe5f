"""Published checkpoints: a torch or safetensors file -> the tensors of its backbone under their plain names.

What a training saved is wrapped in dicts, prefixed and accompanied by heads; `WRAPPERS` and `LAYOUTS` say how, each from the
code that writes such files. Nothing is unpickled, and a key that is neither of the backbone nor of a known head is refused.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iir_dist.errors import InputError

log = logging.getLogger(__name__)

WRAPPERS = (
    ("classy_state_dict", "base_model", "model", "trunk"),  # VISSL
    ("teacher",),  # DINO: of its two networks the one that it evaluates
    ("state_dict",),  # MoCo, SwAV, Lightning
    ("model",),  # Barlow Twins, VICReg
)
"""Where the dict of tensors lies in a file that holds more (optimizer, epoch, ...)."""
HEADS = ("fc.", "_fc.", "classifier.", "head.", "head_dist.")
"""Prefixes of classifiers and projections that the networks themselves carry; those of the trunk's own keys are kept."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys of one kind of file, without DataParallel's `module.`: known by `trunk` and all of `marks`."""

    name: str
    trunk: str
    """Prefix of the backbone's keys."""
    heads: tuple[str, ...] = ()
    """Prefixes of what is left out."""
    marks: tuple[str, ...] = ()


LAYOUTS = (
    Layout("MoCo", "encoder_q.", ("encoder_k.", "queue")),
    Layout("MoCo v3", "base_encoder.", ("momentum_encoder.", "predictor.")),
    Layout("VISSL", "_feature_blocks."),
    Layout("SwAV", "", ("projection_head.", "prototypes."), ("projection_head.", "prototypes.")),
    Layout("BYOL", "online_network.encoder.", ("online_network.projector.", "target_network.", "predictor.")),
    Layout("byol-pytorch", "online_encoder.net.", ("online_encoder.projector.", "target_encoder.", "online_predictor.", "net.")),
    Layout("Barlow Twins", "backbone.", ("projector.", "bn."), ("projector.", "bn.")),
    Layout("VICReg", "backbone.", ("projector.",), ("projector.",)),
    Layout("DINO", "backbone.", ("head.",), ("head.",)),
    Layout("Lightning", "backbone."),
    Layout("Lightning", "encoder.", ("projection.",)),
    Layout("Lightning", "model."),
    Layout("plain", ""),
)  # fmt: skip
"""The first that fits is taken; the last fits all."""


def read_checkpoint(path: str, own: Collection[str] = ()) -> tuple[dict[str, Tensor], str]:
    """Tensors of the backbone by plain name, and the name of the file's layout.

    Args:
        path: `.safetensors`, or a torch file (`.pth`, `.pth.tar`, `.pt`, `.ckpt`, `.torch`).
        own: keys of the network; what is one of them is not taken for a head or for the prefix of a layout.

    Raises:
        InputError: the file is missing or damaged, holds code or no tensors, or has keys that its layout does not know.
    """
    state = _tensors(_load(path), path)
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    layout = next(one for one in LAYOUTS if _fits(one, state, own))
    trunk: dict[str, Tensor] = {}
    left: Counter[str] = Counter()
    strange = []
    for key, value in state.items():
        plain = key.removeprefix(layout.trunk)
        if head := _prefix(key, layout.heads):
            left[head] += 1
        elif not key.startswith(layout.trunk):
            strange.append(key)
        elif plain not in own and (head := _prefix(plain, HEADS)):
            left[head] += 1
        else:
            trunk[plain] = value
    if strange:
        raise InputError(
            f"weights {path} ({layout.name} layout): {len(strange)} keys are neither of the backbone nor of a known head"
            f" (first: {', '.join(sorted(strange)[:3])})"
        )
    if layout.name == "MoCo v3" and "pos_embed" in trunk and trunk["pos_embed"].shape[-1] == 384:
        raise InputError(
            f"weights {path}: the ViT-S of MoCo v3 has 12 heads of attention, timm's has 6; its weights would load and mean"
            " something else. Give its ViT-B (timm:vit_base_patch16_224.dino) or its ResNet-50 (resnet50)"
        )
    heads = ", ".join(f"{name} ({n})" for name, n in left.items()) or "nothing"
    log.info("weights %s: %s layout, %d tensors; left out as heads: %s", path, layout.name, len(trunk), heads)
    return trunk, layout.name


def _fits(layout: Layout, keys: Iterable[str], own: Iterable[str]) -> bool:
    marks = tuple(m for m in (layout.trunk, *layout.marks) if m)
    return all(any(k.startswith(m) for k in keys) for m in marks) and not any(k.startswith(marks) for k in own)


def _prefix(key: str, prefixes: Iterable[str]) -> str | None:
    return next((p for p in prefixes if key.startswith(p)), None)


def _load(path: str) -> Any:
    if not Path(path).is_file():
        raise InputError(f"weights {path!r}: no such file; give 'random', 'imagenet' or a .safetensors/.pth file")
    if path.endswith(".pkl"):
        raise InputError(
            f"weights {path}: a bare pickle (BYOL's own files are such, of JAX arrays) can only be read by running it;"
            " convert it to a torch file and give that"
        )
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():  # about old pickle protocols: what cannot be read raises
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise types of their own on damaged or unsafe files
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"weights {path}: not readable as plain tensors: it holds {found[1]}, and nothing is unpickled. If you trust the"
                " file, save its tensors alone: c = torch.load(FILE, map_location='cpu', weights_only=False);"
                " torch.save(c['state_dict'], 'weights.pth') (or c['model'], or {'teacher': c['teacher']}), and give that"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(f"weights {path}: not readable as plain tensors ({type(error).__name__}: {reason})") from error


def _tensors(value: Any, path: str) -> dict[str, Tensor]:
    """The dict of tensors in what was read: itself, or in one of `WRAPPERS`."""
    for way in ((), *WRAPPERS):
        inner = value
        for key in way:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if (
            isinstance(inner, dict)
            and inner
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in inner.items())
        ):
            return inner
    holds = ", ".join(map(str, list(value)[:5])) if isinstance(value, dict) else type(value).__name__
    places = ", ".join(".".join(way) for way in WRAPPERS)
    raise InputError(
        f"weights {path}: expected a dict of tensors, at the top or in {places}; it holds: {holds or 'nothing'}"
    )
