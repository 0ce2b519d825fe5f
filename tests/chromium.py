"""The system's Chromium and axe-core, for the tests of pages (marker `browser`).

    apt-get install chromium && npm install --prefix tests/browser

axe-core may lie elsewhere: AXE_CORE names the folder that holds axe.min.js.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(os.environ.get("AXE_CORE") or Path(__file__).parent / "browser/node_modules/axe-core") / "axe.min.js"
PATIENCE_MS = 120_000


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser; where there is none, the test is skipped."""
    if PROGRAM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield started
        started.close()


def load_axe(page: Any) -> None:
    """Teach a page axe-core; where there is none, the test is skipped."""
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE} (npm install --prefix tests/browser, or AXE_CORE)")
    page.add_script_tag(path=AXE)


def assert_accessible(page: Any, where: str) -> None:
    """Axe finds nothing in what the page shows now."""
    found = page.evaluate("axe.run()")
    assert [(where, v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]] == []
    assert len(found["passes"]) > 10
