"""How to reach an object store, beyond what the usual AWS variables and profile say.

The settings travel in the environment, so that workers of a stage, in whatever process, have those of the driver.
Credentials are not among them: they come from AWS variables, profile or the machine's role, and go nowhere else.
"""

from __future__ import annotations

import os
from typing import ClassVar

from pydantic import Field

from iir_dist.config import StageConfig, build

_VARIABLES = {
    "endpoint": "AWS_ENDPOINT_URL", "region": "AWS_DEFAULT_REGION", "path_style": "IIR_S3_PATH_STYLE",
    "attempts": "AWS_MAX_ATTEMPTS", "patience_sec": "IIR_STORAGE_PATIENCE_SEC",
}  # fmt: skip


class StorageConfig(StageConfig):
    """`[storage]`, for any command."""

    endpoint: str | None = None
    """Address of the store where it is not AWS."""
    region: str | None = None
    path_style: bool = False
    """Put the bucket into the path (`host/bucket/key`) and not into the host name."""
    attempts: int | None = Field(None, ge=1)
    """Of one request in quick succession; 3 where not set."""
    patience_sec: float = Field(120.0, ge=0)
    """A store that gives no answer for so long is given up; what was done is kept."""
    execution: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_environment(cls) -> StorageConfig:
        """As this process has them."""
        found = {key: os.environ[name] for key, name in _VARIABLES.items() if os.environ.get(name)}
        return build(cls, found, "storage")

    def to_environment(self) -> None:
        """For this process and those that it starts."""
        for key in self.model_fields_set:
            value = getattr(self, key)
            if value is not None:
                os.environ[_VARIABLES[key]] = str(value)


def forwarded() -> dict[str, str]:
    """The variables that workers on other machines need; no secret is among them."""
    return {name: os.environ[name] for name in _VARIABLES.values() if name in os.environ}
