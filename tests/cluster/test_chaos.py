"""Nodes, drivers, heads and stores that go away in the middle of a step: the outputs are those of an undisturbed run.

The store is slowed down by a proxy, so that a fault finds work under way. A row for each fault, with the seconds that it
cost against the same job undisturbed, goes to the file that CHAOS_TABLE names.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chain
import psutil
import pytest
from click.testing import CliRunner
from nodes import Cluster, Node
from submission import SlowProxy, Submission

from iir_dist.cli import main
from iir_dist.storage import open_folder

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3]

DELAY_SEC = {"images": 0.4, "vectors": 0.4, "tuned": 0.1, "index": 0.3, "rankings": 0.3}
"""Of each request to the store."""
UNDER_WAY = {
    "images": "_work/done/0", "vectors": "_work/done/0", "tuned": "checkpoints/", "index": "_work/done/template",
    "rankings": "_work/plan.json",
}  # fmt: skip
"""What lies in the output folder once a step has begun its work."""
SHORT = ["images", "vectors", "tuned"]
STEPS = [pytest.param(s, marks=[] if s in SHORT else [pytest.mark.long]) for s in UNDER_WAY]


@pytest.fixture(scope="module")
def base(s3: str, photos: str, cluster: Cluster, undisturbed: dict[str, str]) -> str:
    """The chain, undisturbed, on the cluster."""
    root = f"{s3}/chaos-base"
    for line in chain.lines(photos, root).values():
        code, output = Submission(cluster, line).wait()
        assert code == 0, output
    assert chain.contents(root) == undisturbed
    return root


class Trial:
    """One step whose output goes to a folder of its own; the others' results are those of `base`."""

    def __init__(self, cluster: Cluster, proxy: SlowProxy, photos: str, base: str, step: str, name: str) -> None:
        self.cluster, self.proxy, self.step, self.base = cluster, proxy, step, base
        self.root = f"{base}-{name}"
        self.line = chain.lines(photos, base)[step]
        self.line[self.line.index("--out") + 1] = f"{self.root}/{step}"

    def begin(self) -> Submission:
        """Submit it, by way of the slow store."""
        self.started = time.monotonic()
        self.proxy.delay_sec = DELAY_SEC[self.step]
        return Submission(self.cluster, self.line, {"AWS_ENDPOINT_URL": self.proxy.url})

    def await_work(self, job: Submission, seconds: float = 300.0) -> None:
        """Return once the step has begun its work, and not ended."""
        folder, deadline = open_folder(f"{self.root}/{self.step}"), time.monotonic() + seconds
        while not any(entry.name.startswith(UNDER_WAY[self.step]) for entry in folder.list()):
            assert job.process.poll() is None, job.wait()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not folder.exists("manifest.json"), "it was done before the fault; raise DELAY_SEC"

    def check(self, fault: str) -> None:
        """The bytes are those of the undisturbed run, and nothing is left that `iir gc` leaves."""
        seconds = time.monotonic() - self.started
        self.proxy.delay_sec = 0.0
        found, expected = chain.manifest(self.root, self.step), chain.manifest(self.base, self.step)
        assert found.fingerprint == expected.fingerprint
        assert CliRunner().invoke(main, ["gc", self.root]).exit_code == 0
        left = {entry.name for entry in open_folder(f"{self.root}/{self.step}").list()} - {
            *found.files,
            "manifest.json",
        }
        assert not left
        if table := os.environ.get("CHAOS_TABLE"):
            row = {"fault": fault, "step": self.line[0], "seconds": round(seconds, 1), "undisturbed": self._quiet()}
            with open(table, "a") as file:
                file.write(json.dumps(row) + "\n")

    def _quiet(self) -> float:
        """Seconds of the same job without a fault."""
        line = list(self.line)
        line[line.index("--out") + 1] = f"{self.root}-quiet/{self.step}"
        self.proxy.delay_sec, started = DELAY_SEC[self.step], time.monotonic()
        code, output = Submission(self.cluster, line, {"AWS_ENDPOINT_URL": self.proxy.url}).wait()
        self.proxy.delay_sec = 0.0
        assert code == 0, output
        return round(time.monotonic() - started, 1)


@pytest.fixture
def trial(
    cluster: Cluster, proxy: SlowProxy, photos: str, base: str, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Trial]]:
    """trial(step); afterwards the cluster has two workers again."""

    def make(step: str) -> Trial:
        return Trial(cluster, proxy, photos, base, step, request.node.name.replace("[", "-").replace("]", ""))

    yield make
    proxy.delay_sec = proxy.gone_until = 0.0
    _complete(cluster)


def _complete(cluster: Cluster) -> None:
    for name in {"a", "b"} - cluster.nodes.keys():
        cluster.add(name, wait=False)
    cluster.await_nodes()


@pytest.mark.parametrize("step", STEPS)
def test_a_node_is_killed(trial: Callable[[str], Trial], cluster: Cluster, step: str) -> None:
    """kill -9 of raylet and workers; another node comes, as an autoscaler would bring it."""
    one = trial(step)
    job = one.begin()
    one.await_work(job)
    cluster.kill("a")
    cluster.add("a", wait=False)
    code, output = job.wait()
    assert code == 0, output
    one.check("a node is killed")


@pytest.mark.parametrize("step", STEPS)
def test_the_driver_is_killed(trial: Callable[[str], Trial], cluster: Cluster, step: str) -> None:
    """The job fails with an exit code; the same command submitted again is a second attempt that goes on."""
    one = trial(step)
    job = one.begin()
    one.await_work(job)
    (driver,) = _drivers(cluster.nodes["head"], f"jobs/{one.line[0]}.py")
    driver.kill()
    code, output = job.wait()
    assert code not in (0, None), output
    again = one.begin()
    code, output = again.wait()
    assert code == 0, output
    assert "-2: submitted" in output
    one.check("the driver is killed")


@pytest.mark.long
@pytest.mark.parametrize("step", ["vectors", "tuned"])
def test_the_head_is_killed(trial: Callable[[str], Trial], cluster: Cluster, step: str) -> None:
    """Without a head the job is lost; on a cluster that is started anew the same command goes on."""
    one = trial(step)
    job = one.begin()
    one.await_work(job)
    for name in ("head", "a", "b"):
        cluster.kill(name)
    cluster.start_head()
    _complete(cluster)
    code, output = job.wait()
    assert code == 1, output
    assert "has forgotten" in output
    code, output = one.begin().wait()
    assert code == 0, output
    one.check("head and all nodes are killed")


@pytest.mark.long
def test_a_node_is_added(trial: Callable[[str], Trial], cluster: Cluster) -> None:
    """The bytes do not depend on when it came."""
    one = trial("vectors")
    cluster.kill("a")
    job = one.begin()
    one.await_work(job)
    cluster.add("a", wait=False)
    code, output = job.wait()
    assert code == 0, output
    one.check("a node is added")


@pytest.mark.parametrize("step", ["images", pytest.param("tuned", marks=pytest.mark.long)])
def test_the_store_is_away(trial: Callable[[str], Trial], proxy: SlowProxy, step: str) -> None:
    """For 20 seconds every connection is dropped."""
    one = trial(step)
    job = one.begin()
    one.await_work(job)
    proxy.gone_until = time.monotonic() + 20
    code, output = job.wait()
    assert code == 0, output
    one.check("the store is away for 20 s")


@pytest.mark.long
def test_a_training_worker_hangs(trial: Callable[[str], Trial], cluster: Cluster) -> None:
    """A worker that stops without a word: the others give up after IIR_HANG_SEC and all start again."""
    one = trial("tuned")
    os.environ["IIR_HANG_SEC"] = "30"
    try:
        job = one.begin()
    finally:
        del os.environ["IIR_HANG_SEC"]
    one.await_work(job)
    (worker,) = [process for title, process in cluster.nodes["b"].workers("RayTrainWorker")]
    worker.send_signal(signal.SIGSTOP)
    try:
        code, output = job.wait()
    finally:
        with contextlib.suppress(psutil.Error):
            worker.kill()
    assert code == 0, output
    one.check("a training worker hangs")


def _drivers(head: Node, script: str) -> list[psutil.Process]:
    """Python processes that run an entry point; the shell around it is not one."""
    found = []
    for process in head.processes():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if script in command and Path(command[0]).name.startswith("python"):
                found.append(process)
    return found
