"""Checks of the machine: what is installed, what there is to run on, what can be reached, and what is wrong."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

from iir_dist.errors import IirError
from iir_dist.provenance import versions
from iir_dist.session import cpu_count
from iir_dist.storage import open_folder

GB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what is wrong with it (empty: nothing)."""

    what: str
    found: str
    problem: str = ""


def examine(store: str | None = None) -> list[Finding]:
    """Look at everything; `store` is an s3:// address to try."""
    import psutil

    findings = [Finding(f"version of {name}", version) for name, version in versions().items()]
    findings += [_missing(module, use) for module, use in (
        ("torch", "encoders"), ("torchvision", "augmentation"), ("ray", "every stage"), ("faiss", "the index"),
    )]  # fmt: skip
    memory, free = psutil.virtual_memory(), shutil.disk_usage(tempfile.gettempdir()).free
    findings += [
        Finding("CPU cores", str(cpu_count())),
        Finding(
            "memory", f"{memory.total / GB:.1f} GB, {memory.available / GB:.1f} GB available",
            "under 2 GB are available; stop other programs" if memory.available < 2 * GB else "",
        ),
        Finding(
            "scratch space", f"{free / GB:.1f} GB in {tempfile.gettempdir()}",
            "under 5 GB are free; set TMPDIR to a larger disk" if free < 5 * GB else "",
        ),
        _gpus(),
        _ray(),
        _store(store),
    ]  # fmt: skip
    return [f for f in findings if f.found]


def _missing(module: str, use: str) -> Finding:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        return Finding(module, "not installed", f"{use} cannot run; pip install {module}")
    return Finding(module, "")


def _gpus() -> Finding:
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    except ImportError:
        return Finding("GPUs", "unknown, torch is not installed")
    if not count and shutil.which("nvidia-smi"):
        return Finding(
            "GPUs", "none for torch", "nvidia-smi is there but torch sees no device; check driver and CUDA build"
        )
    return Finding("GPUs", names or "none (CPU is used)")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    try:
        from iir_dist import session

        ray: Any = session.connect()
        resources = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
        where = f"cluster at {address}" if address else "starts on this machine"
        return Finding("Ray", f"{where}: {resources}")
    except (IirError, ImportError) as error:
        return Finding("Ray", f"not reachable at {address or 'this machine'}", str(error))


def _store(store: str | None) -> Finding:
    if store is None:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return Finding("object store", f"not tried (endpoint {endpoint}); give --store s3://bucket")
    try:
        next(iter(open_folder(store).list()), None)
    except IirError as error:
        return Finding("object store", f"{store} failed", str(error))
    return Finding("object store", f"{store} can be listed")
