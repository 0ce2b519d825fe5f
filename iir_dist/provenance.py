"""What a result was made with: versions of packages, commit of the code."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("iir-dist", "ray", "torch", "torchvision", "faiss-gpu", "faiss-cpu", "pyarrow", "numpy", "pillow")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout this program runs from, `+dirty` where files differ; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
