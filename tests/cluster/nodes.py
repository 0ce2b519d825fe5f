"""A Ray cluster of several nodes on this machine: each `ray start` has its own address, resources, home and /tmp.

A node lives in a mount namespace in which /tmp is a folder of its own, and has an address of its own in 127.0.0.0/8. So
nothing passes from node to node by the local disk: what a stage leaves under /tmp on one is not there on another.
Needs Linux, and root or unprivileged user namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

STORE_BYTES = 200_000_000
"""Ray's object store of each node."""


STARTS = 4
"""A raylet ends where its agents need more than 15 s to tell their ports, as they do on a machine that is busy."""


def namespaces() -> list[str] | None:
    """The command that starts another in a mount namespace of its own; None where this machine does not let us."""
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return None


@dataclass
class Node:
    """One `ray start --block` and all that it started."""

    name: str
    address: str
    folder: Path
    start: Callable[[], subprocess.Popen[bytes]]
    starts: int = 1

    def __post_init__(self) -> None:
        self.process = self.start()

    def start_again(self) -> None:
        """After it ended by itself."""
        self.kill()
        self.starts += 1
        self.process = self.start()

    def processes(self) -> list[psutil.Process]:
        """Raylet, agents and workers; also where `ray start` itself has ended, by the session that it began."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid:
                    found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        return list(found.values())

    def workers(self, what: str = "") -> list[tuple[str, psutil.Process]]:
        """Ray's worker processes whose title holds `what`: a task's or an actor's name."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and what in title:
                    found.append((title, process))
        return found

    def kill(self) -> None:
        """`kill -9` of all of it, as where the machine is gone."""
        while found := [p for p in self.processes() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            # All at once: a raylet whose workers go first would have time to say so.
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=5)
        self.process.wait()


@dataclass
class Cluster:
    """Head and workers below a folder. Use as a context manager; the head has no CPUs, as it should in production.

    Args:
        folder: of logs and of the nodes' own /tmp.
        variables: environment of the nodes, beside a bare one; a node has no credentials of any store.
    """

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port, self.dashboard = _free_port(), _free_port()
        # Of this process alone, so that two clusters on one machine have no address in common.
        self._net = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}"
        self._last = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self.nodes.values()][::-1]:
            node.kill()
        self.nodes.clear()

    @property
    def url(self) -> str:
        """Of the job server."""
        return f"http://{self.nodes['head'].address}:{self.dashboard}"

    def start_head(self) -> Node:
        """The head, known to itself; again after it was killed, under the same address."""
        arguments = ["--head", f"--port={self.port}", "--dashboard-host=0.0.0.0", f"--dashboard-port={self.dashboard}"]
        arguments += ["--include-dashboard=true", "--no-monitor", f"--ray-client-server-port={_free_port()}"]
        node = self._start("head", f"{self._net}.1", [*arguments, "--num-cpus=0"])
        self._await(lambda: node.address in self.alive())
        return node

    def add(self, name: str, cpus: int = 1, resources: str = "{}", wait: bool = True) -> Node:
        """One more worker node; returns when the head knows it, or at once."""
        self._last += 1
        address = f"{self._net}.{self._last + 1}"
        head = f"{self.nodes['head'].address}:{self.port}"
        node = self._start(name, address, [f"--address={head}", f"--num-cpus={cpus}", f"--resources={resources}"])
        if wait:
            self.await_nodes()
        return node

    def await_nodes(self) -> None:
        """Return when the head knows all nodes."""
        self._await(lambda: {n.address for n in self.nodes.values()} <= set(self.alive()))

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head holds to be alive."""
        headers = {}
        if token := self.variables.get("RAY_AUTH_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        answer = requests.get(f"{self.url}/nodes?view=summary", timeout=10, headers=headers)
        summary = answer.json()["data"]["summary"]
        return [n["raylet"]["nodeManagerAddress"] for n in summary if n["raylet"].get("state") == "ALIVE"]

    def kill(self, name: str) -> Node:
        """`kill -9` of a node."""
        node = self.nodes.pop(name)
        node.kill()
        return node

    def logs(self) -> Iterator[Path]:
        """Every file that the nodes wrote below their /tmp."""
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path

    def _start(self, name: str, address: str, arguments: list[str]) -> Node:
        separate = namespaces()
        assert separate is not None
        folder = self.folder / f"{name}-{address.rpartition('.')[2]}"
        (folder / "tmp" / "home").mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "IIR_", "RAY_", "PYTEST_", "TMP"))}
        variables = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs say `python`
            "HOME": "/tmp/home", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "600", "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not the node's
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        # Ray leaves the processes of a node that is killed to the system; here they have a session to be found by.
        bind = 'mount --bind "$0" /tmp && exec "$@"'
        command = [
            *separate,
            "sh",
            "-c",
            bind,
            str(folder / "tmp"),
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
        ]
        command += ["--block", "--disable-usage-stats", "--temp-dir=/tmp/ray", f"--node-ip-address={address}"]
        command += [f"--object-store-memory={STORE_BYTES}", f"--dashboard-agent-listen-port={_free_port()}"]
        command += ["--include-log-monitor=false", *arguments]

        def start() -> subprocess.Popen[bytes]:
            with open(folder / "log", "ab") as log:
                return subprocess.Popen(
                    command, env=kept | variables | dict(self.variables), cwd="/", stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip

        node = Node(name, address, folder, start)
        self.nodes[name] = node
        return node

    def _await(self, ready: object, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(requests.RequestException, KeyError, ValueError):
                if ready():  # type: ignore[operator]
                    return
            for node in self.nodes.values():
                if node.process.poll() is None:
                    continue
                if node.starts < STARTS:
                    node.start_again()
                else:
                    raise RuntimeError(f"{node.name} ended: {(node.folder / 'log').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster did not come up in {seconds} s; see {self.folder}")
            time.sleep(0.25)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
