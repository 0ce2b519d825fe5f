"""The Ray that a stage runs on: the cluster that it is submitted to, else one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from iir_dist.errors import IirError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no call home
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AUTH_MODE": "disabled",  # a local session listens on loopback and dies with this process
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def connect() -> Any:
    """The `ray` module, connected: to `RAY_ADDRESS` where it is set (in a submitted job it is), else started here."""
    for key, value in QUIET.items():
        if key != "RAY_AUTH_MODE" or not os.environ.get("RAY_ADDRESS"):
            os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return ray
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                num_cpus=cpu_count(),
                include_dashboard=False,
                object_store_memory=object_store_bytes(),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS")
        raise IirError(f"Ray cannot be reached at {address or 'this machine'}: {error}; see `iir doctor`") from error
    return ray


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def object_store_bytes() -> int:
    """A tenth of the memory, from 256 MB to 4 GB: stages keep few blocks in flight and spill the rest."""
    import psutil

    return int(min(max(psutil.virtual_memory().total // 10, 256 * 2**20), 4 * 2**30))


def cluster_cpus() -> int:
    """CPUs of the connected cluster."""
    return int(connect().cluster_resources().get("CPU", 1))


def cluster_gpus() -> int:
    """GPUs of the connected cluster."""
    return int(connect().cluster_resources().get("GPU", 0))


def result_of(ref: Any) -> Any:
    """`ray.get`, with an error of ours raised as itself and not wrapped in Ray's traceback."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, IirError):
            raise cause from None
        raise


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving every large block back to the kernel.

    A network's activations are freed and asked for again at each batch; returning them costs page faults that halve
    the speed of EfficientNet-Lite0 at batch 16 on a CPU. Does nothing where the C library is another.
    """
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
