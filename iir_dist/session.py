"""The Ray that a stage runs on: the cluster that it is submitted to, else one on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from iir_dist.credentials import KEPT
from iir_dist.errors import IirError
from iir_dist.storage.settings import forwarded

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no call home
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AUTH_MODE": "disabled",  # a local session listens on loopback and dies with this process
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ side logs harmless conditions as errors
}

KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20)}
"""Environment of all workers: glibc keeps freed memory (up to 512 MB) instead of returning each large block.

Activations are freed and asked for again at every batch; on a CPU the page faults cost a third to a half of the speed
(EfficientNet-Lite0, 15 images of 224 px, one thread: 34 against 49 images/s). Other C libraries ignore it.
"""

CACHE = ("IIR_CACHE", "IIR_CACHE_GB")
"""Where a node keeps its copies, and how much of them; the same on all nodes."""


def connect() -> Any:
    """The `ray` module, connected: to `RAY_ADDRESS` where it is set (in a submitted job it is), else started here."""
    for key, value in QUIET.items():
        if key != "RAY_AUTH_MODE" or not os.environ.get("RAY_ADDRESS"):
            os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return ray
    cache = {name: os.environ[name] for name in CACHE if name in os.environ}
    passed = forwarded() | cache
    variables = KEEP_FREED_MEMORY | passed | {KEPT: ",".join(passed)}
    # Ray refuses a variable that the job sets already; the job's is the one that was asked for.
    environment = {"env_vars": {name: value for name, value in variables.items() if name not in _set_by_job()}}
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with _silent_stderr():
            if os.environ.get("RAY_ADDRESS"):
                ray.init(runtime_env=environment, **quiet)
            else:
                memory = object_store_bytes()
                ray.init(
                    num_cpus=cpu_count(), object_store_memory=memory, include_dashboard=False, runtime_env=environment,
                    **quiet,
                )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS")
        raise IirError(f"Ray cannot be reached at {address or 'this machine'}: {error}; see `iir doctor`") from error
    return ray


def _set_by_job() -> set[str]:
    """Variables of the runtime environment that this process was submitted with."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return set((job.get("runtime_env") or {}).get("env_vars") or {})


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's C++ side prints while it starts; what goes wrong comes as an exception."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


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


def num_nodes() -> int:
    """Nodes of the cluster that `connect` connects to; 1 where it starts one here."""
    return sum(node["Alive"] for node in connect().nodes()) if os.environ.get("RAY_ADDRESS") else 1


def largest_node_cpus() -> int:
    """CPUs of the node of the connected cluster that has most; nothing that asks for more is ever started."""
    return max([1, *(int(resources.get("CPU", 0)) for resources in _nodes())])


def cluster_gpus() -> int:
    """GPUs of the connected cluster, of the wanted type where one is."""
    return int(sum(resources.get("GPU", 0) for resources in _nodes(*accelerator())))


def threads_of(workers: int) -> int:
    """The most threads that each of some workers without GPUs can have, none lying on two nodes."""
    return most_threads(workers, [int(resources.get("CPU", 0)) for resources in _nodes(*accelerator())])


def most_threads(workers: int, cpus: Sequence[int]) -> int:
    """As `threads_of`, for nodes with so many CPUs.

    >>> most_threads(2, [8]), most_threads(2, [2, 2, 2]), most_threads(3, [4, 2]), most_threads(9, [4, 2])
    (4, 2, 2, 1)
    """
    fitting = (n for n in range(1, max(cpus, default=1) + 1) if sum(c // n for c in cpus) >= workers)
    return max(fitting, default=1)


def accelerator() -> dict[str, float]:
    """What a worker asks for beside its GPU or CPUs so that it lies on a node with accelerators of the type `IIR_ACCELERATOR`
    (Ray's names: T4, A100, H100); nothing where that is not set. Ray gives each such node one of this resource."""
    wanted = os.environ.get("IIR_ACCELERATOR")
    if not wanted:
        return {}
    name = f"accelerator_type:{wanted}"
    if not connect().cluster_resources().get(name):
        there = sorted(n.partition(":")[2] for n in connect().cluster_resources() if n.startswith("accelerator_type:"))
        raise IirError(
            f"IIR_ACCELERATOR = {wanted!r}, but no node has one; the cluster has {', '.join(there) or 'none'}"
        )
    return {name: 0.001}


def on_worker(number: int) -> Any:
    """Scheduling strategy for one of several actors without CPUs of their own: a node that has CPUs (a head often has none),
    the nodes in turn; another one where that is gone."""
    ray = connect()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = sorted(node["NodeID"] for node in alive if node["Resources"].get("CPU")) or [alive[0]["NodeID"]]
    return NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=True)


def here() -> Any:
    """Scheduling strategy for what must not outlive this process: it lies on its node."""
    ray = connect()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _nodes(*having: str) -> list[dict[str, float]]:
    """Resources of the nodes of the connected cluster that have all of these."""
    found = [node["Resources"] for node in connect().nodes() if node["Alive"]]
    return [resources for resources in found if all(resources.get(name) for name in having)]


def object_stores_bytes() -> int:
    """Ray's object stores of the connected cluster, all nodes."""
    return int(connect().cluster_resources().get("object_store_memory", 0))


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
