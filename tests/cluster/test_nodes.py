"""The chain by job submission on a head and two workers that share no disk: the same bytes as on one machine."""

from __future__ import annotations

import chain
import pytest
from nodes import Cluster
from submission import Watch, submitted

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]


def test_the_chain_on_three_nodes(cluster: Cluster, photos: str, s3: str, undisturbed: dict[str, str]) -> None:
    root = f"{s3}/three-nodes"
    where: dict[str, set[str]] = {}
    for step, line in chain.lines(photos, root).items():
        with Watch(cluster) as watch:
            output = submitted(cluster, line)
        where[step] = {f"{title.split('::')[1]}@{node}" for node, titles in watch.titles.items() for title in titles}
        assert "test-secret-value" not in output
    assert {title for title in where["tuned"] if "RayTrainWorker" in title} == {"RayTrainWorker@a", "RayTrainWorker@b"}
    embedders = {title.rpartition("@")[2] for title in where["vectors"] if "Embedder" in title}
    assert embedders == {"a", "b"}
    assert {t.rpartition("@")[2] for t in where["rankings"] if t.startswith("Shards")} <= {"a", "b"}  # not the head
    assert chain.contents(root) == undisturbed
    assert chain.left_over(root) == []


def test_secrets_are_not_in_logs_or_answers(cluster: Cluster, photos: str, s3: str) -> None:
    for path in cluster.logs():
        if path.name != "iir-environment.json":
            assert b"test-secret-value" not in path.read_bytes(), path


def test_placement_by_accelerator(cluster: Cluster, photos: str, s3: str) -> None:
    """A resource that stands for a type of GPU: both training workers lie on the node that has it."""
    root = f"{s3}/three-nodes"
    line = chain.lines(photos, root)["vectors"]
    line[line.index("--out") + 1] = f"{s3}/placed"
    with Watch(cluster) as watch:
        submitted(cluster, line, IIR_ACCELERATOR="T4")
    assert watch.nodes_of("Embedder") == {"b"}
    assert chain.manifest(s3, "placed").fingerprint == chain.manifest(root, "vectors").fingerprint
