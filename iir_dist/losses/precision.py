"""Losses are computed in float32 or better, whatever precision the network runs in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def precise(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Give the function its tensors in one dtype, the widest of theirs and float32, and no autocast."""
    call: Callable[..., Tensor] = function

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)

        def wide(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) else x

        with torch.autocast(tensors[0].device.type, enabled=False):
            return call(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})

    return computed
