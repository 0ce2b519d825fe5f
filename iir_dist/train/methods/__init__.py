"""Self-supervised methods, one module each: its views, its head, its loss and what it remembers."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from iir_dist.train.methods.byol import BYOL, BYOLConfig, SimSiam, SimSiamConfig
from iir_dist.train.methods.dino import DINO, DINOConfig
from iir_dist.train.methods.insclr import InsCLR, InsCLRConfig
from iir_dist.train.methods.method import Context, Method
from iir_dist.train.methods.moco import MoCoV2, MoCoV2Config, MoCoV3, MoCoV3Config
from iir_dist.train.methods.redundancy import BarlowTwins, BarlowTwinsConfig, VICReg, VICRegConfig
from iir_dist.train.methods.simclr import SimCLR, SimCLRConfig
from iir_dist.train.methods.swav import SwAV, SwAVConfig

__all__ = ["METHODS", "AnyMethodConfig", "build"]

METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "simclr": (SimCLRConfig, SimCLR),
    "moco_v2": (MoCoV2Config, MoCoV2),
    "moco_v3": (MoCoV3Config, MoCoV3),
    "byol": (BYOLConfig, BYOL),
    "simsiam": (SimSiamConfig, SimSiam),
    "swav": (SwAVConfig, SwAV),
    "barlow_twins": (BarlowTwinsConfig, BarlowTwins),
    "vicreg": (VICRegConfig, VICReg),
    "dino": (DINOConfig, DINO),
    "insclr": (InsCLRConfig, InsCLR),
}
"""By name: parameters, method."""


def _named(value: Any) -> Any:
    """A table without a name is one of SimCLR."""
    return {"name": "simclr", **value} if isinstance(value, dict) else value


AnyMethodConfig = Annotated[
    Annotated[
        SimCLRConfig
        | MoCoV2Config
        | MoCoV3Config
        | BYOLConfig
        | SimSiamConfig
        | SwAVConfig
        | BarlowTwinsConfig
        | VICRegConfig
        | DINOConfig
        | InsCLRConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(_named),
]
"""One of them, chosen by `name`: `--set method.name=moco_v2 --set method.queue=4096`."""


def build(config: Any, context: Context) -> Method:
    """The method of a config, its head's weights drawn from the context's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        method: Method = METHODS[config.name][1](config, context)
    return method
