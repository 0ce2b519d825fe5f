"""The pages in a browser: nothing missing, nothing cut off, usable by keyboard, readable in the dark and on paper.

    python -m pytest -m browser [--basetemp DIR]          # the screenshots are in DIR; tests/chromium.py says what it needs

Nothing is loaded from the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pages
import pytest
from chromium import PATIENCE_MS, assert_accessible, load_axe

from iir_dist import report
from iir_dist.report import ReportConfig
from iir_dist.report import distractors as curve

pytestmark = pytest.mark.browser

WIDTHS = {"phone": 390, "desktop": 1280}
PAGES = ("report", "bench")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of three runs, one of them re-ranked, and of a benchmark; and the benchmark's own page."""
    root = tmp_path_factory.mktemp("pages")
    truth = pages.truth(root)
    pages.evaluated(root / "first", truth, pages.lists(0))
    pages.evaluated(root / "other", truth, pages.lists(1))
    pages.evaluated(root / "again", truth, [row[1::-1] + row[2:] for row in pages.lists(0)], root / "first" / "r")
    pages.photos(root / "photos", pages.IMAGES[1:])
    pages.bench_folder(root / "curve", pages.benchmarked())
    folders = [str(root / name / "m") for name in ("first", "other", "again")]
    config = ReportConfig(labels=("first", "other", "again", "curve"))
    report.run([*folders, str(root / "curve")], [str(root / "photos")], str(root / "report"), config)
    (root / "bench.html").write_text(curve.page(pages.benchmarked()))
    return {"report": root / "report" / "index.html", "bench": root / "bench.html"}


def opened(browser: Any, path: Path, **settings: Any) -> tuple[Any, list[str]]:
    """The page, and a list that gathers what goes wrong on it."""
    page = browser.new_page(**settings)
    page.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url[:99]))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    page.goto(path.as_uri())
    return page, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_missing_or_cut_off(
    browser: Any, made: dict[str, Path], tmp_path: Path, name: str, width: str, scheme: str
) -> None:
    size = {"width": WIDTHS[width], "height": 900}
    page, wrong = opened(browser, made[name], viewport=size, color_scheme=scheme)
    page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    images = page.evaluate("[...document.images].map((i) => i.complete && i.naturalWidth > 0)")
    assert all(images)
    assert bool(images) == (name == "report")
    # What is wider than the page scrolls by itself, and the keyboard reaches it.
    assert page.evaluate(
        "[...document.querySelectorAll('main *')].filter((e) => e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).overflowX === 'auto' && e.tabIndex < 0).length"
    ) == 0  # fmt: skip
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(v) for v in paper.removeprefix("rgb(").removesuffix(")").split(",")) > 3 * 128) == (
        scheme == "light"
    )
    assert wrong == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(browser: Any, made: dict[str, Path], name: str, scheme: str) -> None:
    for width in WIDTHS.values():
        page, wrong = opened(browser, made[name], viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        load_axe(page)
        assert_accessible(page, name)
        assert wrong == []
        page.close()


def names(page: Any) -> list[str]:
    """Of the queries that are shown, in order."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('.query:not([hidden])')].map((q) => q.dataset.name)"
    )
    return found


def average_precisions(page: Any, run: int) -> list[float]:
    found: list[float] = page.evaluate(
        "(run) => [...document.querySelectorAll('.query')].map((q) => Number(q.dataset.aps.split(',')[run]))", run
    )
    return found


def test_the_keyboard_is_enough(browser: Any, made: dict[str, Path]) -> None:
    page, wrong = opened(browser, made["report"], viewport={"width": 1280, "height": 900})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # it comes into view
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if seen[-1] == "close":
            break
    assert [s for s in seen if s in ("order", "run", "filter", "open", "close")] == [
        "order",
        "run",
        "filter",
        "open",
        "close",
    ]

    page.focus("#order")
    page.keyboard.press("ArrowDown")  # worst first
    aps = average_precisions(page, 0)
    assert aps == sorted(aps)
    page.keyboard.press("ArrowDown")  # best first
    aps = average_precisions(page, 0)
    assert aps == sorted(aps, reverse=True)
    page.focus("#run")
    page.keyboard.press("ArrowDown")
    aps = average_precisions(page, 1)
    assert aps == sorted(aps, reverse=True)

    page.focus("#filter")
    page.keyboard.type("tower_2")
    assert names(page) == ["tower_2"]
    assert page.text_content("#count") == "1 of 4 queries"
    page.focus(".query:not([hidden]) > summary")
    before = page.evaluate("document.activeElement.parentElement.open")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") != before
    page.focus("#filter")
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    assert len(names(page)) == 4
    for button, state in (("#close", 0), ("#open", 4)):
        page.focus(button)
        page.keyboard.press("Space")
        assert page.evaluate("document.querySelectorAll('.query[open]').length") == state
    assert wrong == []
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_on_paper(browser: Any, made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """White with black text also where the screen is dark; without what only a screen can use."""
    page, wrong = opened(browser, made[name], viewport={"width": 794, "height": 1123}, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 33, 38)"
    for part in ("nav", ".controls", ".skip"):
        for element in page.query_selector_all(part):
            assert not element.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    pdf = page.pdf(path=tmp_path / f"{name}.pdf", format="A4")
    assert pdf.startswith(b"%PDF")
    assert wrong == []
    page.close()


def test_without_scripts_the_figures_are_there(browser: Any, made: dict[str, Path]) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(made["report"].as_uri(), timeout=PATIENCE_MS)
    text = page.inner_text("main")
    assert "Photos and sorting need JavaScript." in text
    assert page.locator("table").first.is_visible()
    assert page.locator("figure svg").first.is_visible()
    page.close()
