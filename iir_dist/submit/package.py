"""What a job needs of this checkout, in a folder of its own: the package, the entry points, one config file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from iir_dist import credentials
from iir_dist.errors import InputError
from iir_dist.submit.command import CONFIG, Work

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("iir_dist", "jobs", "constraints.txt")
LIMIT_BYTES = 20 * 2**20
"""The code is below 2 MB; Ray takes 100 MB and more, but copies it to the head's memory and to every node."""


def pack(folder: Path, work: Work, variables: Mapping[str, str], root: Path = ROOT) -> int:
    """Copy into `folder` what a job needs; its size in bytes. Neither data nor .git nor environments are among it.

    Raises:
        InputError: there is no entry point for the command, or the package is too large.
    """
    if not (root / work.script).is_file():
        known = ", ".join(sorted(path.stem for path in (root / "jobs").glob("*.py")))
        if not known:
            raise InputError(f"{root} has no folder jobs; submit from a checkout of the project")
        raise InputError(f"iir {work.words[0]} does not run as a job; commands that do: {known}")
    sizes = {}
    for path in _files(root):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        sizes[path.relative_to(root)] = path.stat().st_size
    if work.config is not None:
        shutil.copyfile(work.config, folder / CONFIG)
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise InputError(
            f"the package has {total / 2**20:.1f} MB, at most {LIMIT_BYTES >> 20} MB are submitted; largest: "
            f"{', '.join(f'{name} ({sizes[name] / 2**20:.1f} MB)' for name in largest)}; move data out of {' and '.join(PARTS[:2])}"
        )
    credentials.write(folder, variables)
    return total


def _files(root: Path) -> Iterator[Path]:
    for part in PARTS:
        top = root / part
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            names = path.relative_to(root).parts
            if path.is_file() and not any(name.startswith(".") or name == "__pycache__" for name in names):
                yield path


def runtime_env(folder: Path, *, pip: bool) -> dict[str, Any]:
    """Ray's runtime environment of a job.

    Args:
        pip: install the dependencies, pinned; else the nodes have them (an image, or what `ray up` set up).
    """
    environment: dict[str, Any] = {
        "working_dir": str(folder),
        "worker_process_setup_hook": "iir_dist.credentials.adopt",
    }
    if pip:
        environment["pip"] = {"packages": pinned((folder / "constraints.txt").read_text())}
    return environment


def pinned(constraints: str) -> list[str]:
    """The direct dependencies of the package as `name==version`, Ray excepted: a cluster has it, in its own version.

    Raises:
        InputError: constraints.txt lacks one.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions = {}
    for line in constraints.splitlines():
        if match := re.match(r"([\w.-]+)==([^\s;#]+)", line):
            versions[canonicalize_name(match[1])] = match[2]
    found = []
    for text in metadata.requires("iir-dist") or []:
        need = Requirement(text)
        name = canonicalize_name(need.name)
        if name == "ray" or (need.marker is not None and not need.marker.evaluate({"extra": ""})):
            continue
        if name not in versions:
            raise InputError(f"constraints.txt does not pin {name}; add a line {name}==VERSION")
        found.append(f"{name}=={versions[name]}")
    return sorted(found)
