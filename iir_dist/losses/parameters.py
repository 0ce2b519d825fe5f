"""The base of losses that are their own table of parameters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Parameters(BaseModel):
    """A frozen model, so that a loss can stand in a config as it is; unknown parameters are refused.

    Raises:
        ValueError: a parameter is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
