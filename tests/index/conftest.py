"""The same clustered vectors for all tests of the index, and what the stage builds of them on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from indexed import NQ, N, clustered, write_vectors

from iir_dist.index import points


@pytest.fixture(scope="session", autouse=True)
def _few_queries_are_timed() -> Iterator[None]:
    """Of each operating point; they are most of the time of a small build."""
    patch = pytest.MonkeyPatch()
    patch.setattr(points, "TIMED", 10)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Database in five files, and queries; plain Parquet of somebody."""
    root = tmp_path_factory.mktemp("vectors")
    write_vectors(root / "db", clustered(N, 1), files=5)
    write_vectors(root / "queries", clustered(NQ, 2), "query", "query")
    return root


@pytest.fixture(scope="session")
def indexes(vectors: Path, ray_session: None) -> dict[int, Path]:
    """The same index in one and in three shards."""
    from iir_dist.index import build
    from iir_dist.index.plan import IndexConfig

    for shards in (1, 3):
        build.run([str(vectors / "db")], str(vectors / f"index-{shards}"), IndexConfig(shards=shards))
    return {shards: vectors / f"index-{shards}" for shards in (1, 3)}
