"""Several nodes and a store, for the tests that need them; the undisturbed run on this machine that they are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import chain
import pytest
from click.testing import CliRunner
from nodes import Cluster, namespaces
from submission import SlowProxy

from iir_dist.cli import main


@pytest.fixture(scope="session")
def photos(world: Path, s3: str) -> str:
    """The small world in the store."""
    return chain.upload(world, f"{s3}/photos")


@pytest.fixture(scope="session")
def undisturbed(world: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fingerprints of the chain, run by one process on the local disk of this machine."""
    root = str(tmp_path_factory.mktemp("undisturbed"))
    for line in chain.lines(str(world), root).values():
        result = CliRunner().invoke(main, line, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return chain.contents(root)


@pytest.fixture(scope="session")
def small_cluster() -> Callable[[Path], Cluster]:
    """small_cluster(folder): a head without CPUs and workers a, b of one CPU, one of them with an accelerator."""
    if namespaces() is None:
        pytest.skip("this machine gives no mount namespaces (Linux; root or unprivileged user namespaces)")

    def start(folder: Path) -> Cluster:
        cluster = Cluster(folder)
        cluster.start_head()
        cluster.add("a", wait=False)
        cluster.add("b", resources='{"accelerator_type:T4": 1}', wait=False)
        cluster.await_nodes()
        return cluster

    return start


@pytest.fixture(scope="module")
def cluster(small_cluster: Callable[[Path], Cluster], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that all tests of a module share."""
    running = small_cluster(tmp_path_factory.mktemp("nodes"))
    with running:
        yield running


@pytest.fixture(scope="module")
def proxy(s3: str) -> Iterator[SlowProxy]:
    """What the nodes take for the store; the tests look at it directly."""
    with SlowProxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running
