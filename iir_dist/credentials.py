"""Credentials of the object store in the processes of a job.

They travel as a file beside the code and not in Ray's runtime environment, which anybody who may open the dashboard can
read and which Ray logs where it cannot be set up. Every process of a job starts in the folder that holds the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = "iir-environment.json"
PREFIXES = ("AWS_", "IIR_")
KEPT = "IIR_KEPT"
"""Names of variables that a worker has from its driver. They go before those of the file, as `--set storage.endpoint=` does."""
OF_THIS_MACHINE = {
    "AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_DEFAULT_PROFILE", "AWS_PROFILE",
    "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "IIR_CACHE", "IIR_CACHE_GB", "IIR_SERVE_TOKEN", KEPT,
}  # fmt: skip
"""Variables that name files, disk or the role of the machine that submits: on a node they would be wrong, or take the place of
its own role. And the token of the search service, which no job needs."""


def found(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets: those of the object store and ours."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(PREFIXES) and name not in OF_THIS_MACHINE
    }


def write(folder: Path, variables: Mapping[str, str]) -> None:
    """Put the variables beside the code, readable by their owner alone."""
    path = folder / FILE
    path.touch(mode=0o600)
    path.write_text(json.dumps(dict(variables)))


def adopt() -> None:
    """Take the variables over; entry points do so, and Ray at the start of every worker process. They replace those of the
    node but not those of the driver (`KEPT`); a session token that belongs to another key goes."""
    path = Path(FILE)
    if path.is_file():
        variables = json.loads(path.read_text())
        if "AWS_ACCESS_KEY_ID" in variables:
            os.environ.pop("AWS_SESSION_TOKEN", None)
        kept = os.environ.get(KEPT, "").split(",")
        os.environ.update({name: value for name, value in variables.items() if name not in kept})
