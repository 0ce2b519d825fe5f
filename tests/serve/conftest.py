"""One collection and one server for all tests that change neither."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import served


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> served.Collection:
    """24 photos of four landmarks, a random network, an index of two shards with operating points."""
    return served.make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(collection: served.Collection) -> Iterator[tuple[served.Http, Any]]:
    """The collection, served."""
    with served.serving(collection, upload_mb=1, max_megapixels=4) as started:
        yield started


@pytest.fixture
def http(server: tuple[served.Http, Any]) -> served.Http:
    """Asks the shared server."""
    return server[0]
