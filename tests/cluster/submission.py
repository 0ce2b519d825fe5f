"""Jobs of the tests: `iir submit` in a process of its own, where the work ran, a store that takes its time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import defaultdict

from faults import FaultyProxy
from nodes import Cluster


class SlowProxy(FaultyProxy):
    """A store that takes its time, so that a fault finds work under way; it breaks nothing by itself."""

    def __init__(self, target: str) -> None:
        super().__init__(target, every=0)
        self.delay_sec = 0.0

    def fault(self) -> str:
        """Wait, then answer."""
        threading.Event().wait(self.delay_sec)
        return super().fault()


class Watch:
    """Which kinds of processes of Ray ran on which node. Use as a context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.titles: dict[str, set[str]] = defaultdict(set)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def nodes_of(self, what: str) -> set[str]:
        """Names of the nodes on which a process of that title was seen."""
        return {name for name, titles in self.titles.items() if any(what in title for title in titles)}

    def _look(self) -> None:
        while not self._stop.wait(0.3):
            for name, node in list(self.cluster.nodes.items()):
                self.titles[name] |= {title for title, _ in node.workers()}


class Submission:
    """`iir submit` in a process of its own.

    Args:
        variables: for it, and so for the job.
        show: let it print, in place of keeping what it prints.
    """

    def __init__(
        self, cluster: Cluster, line: list[str], variables: dict[str, str] | None = None, *, show: bool = False
    ) -> None:
        command = [sys.executable, "-m", "iir_dist", "submit", "--address", cluster.url, *line]
        output = None if show else subprocess.PIPE
        # A token of this machine's own Ray is not the cluster's.
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"} | (variables or {})
        self.process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=None if show else subprocess.STDOUT, text=True
        )

    def wait(self, seconds: float = 400) -> tuple[int, str]:
        """Exit code and all that was printed."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output or ""


def submitted(cluster: Cluster, line: list[str], **variables: str) -> str:
    """What a job prints that succeeds."""
    code, output = Submission(cluster, line, variables).wait()
    assert code == 0, output
    return output
