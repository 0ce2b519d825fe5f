"""The page in a browser: found by upload, box, link and keyboard; on a phone, in the dark, without a mouse, and in trouble.

python -m pytest -m browser tests/serve [--basetemp DIR]          # the screenshots are in DIR; see tests/chromium.py
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import served
from chromium import PATIENCE_MS, assert_accessible, load_axe
from PIL import Image

pytestmark = pytest.mark.browser

WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}
EXPECTED = "the server responded with a status of"
"""What the browser itself says of answers that are not 2xx."""


class Page:
    """A page of the server, what was asked of the API, and what went wrong."""

    def __init__(self, browser: Any, url: str, path: str = "/", width: str = "desktop", **settings: Any) -> None:
        w, h = WIDTHS[width]
        self.page = browser.new_page(viewport={"width": w, "height": h}, **settings)
        self.page.set_default_timeout(PATIENCE_MS)
        self.wrong: list[str] = []
        self.asked: list[Any] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._note)
        self.url = url
        self.page.goto(url + path)

    def _note(self, request: Any) -> None:
        if request.url.endswith("/v1/search") or "/v1/search?" in request.url:
            self.asked.append(request)
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.wrong.append(request.url)

    def found(self) -> list[str]:
        """Names of the results, once they are there."""
        self.page.wait_for_selector("#hits[aria-busy=false] .hit .score")
        names: list[str] = self.page.evaluate("[...document.querySelectorAll('.hit .name')].map((e) => e.textContent)")
        return names

    def search(self, act: Any) -> list[str]:
        """The names that a search gives which `act` begins."""
        with self.page.expect_response(lambda r: "/v1/search" in r.url and r.status == 200):
            act()
        return self.found()

    def upload(self, data: bytes, name: str = "photo.jpg") -> list[str]:
        """Choose a file."""
        file = {"name": name, "mimeType": "image/jpeg", "buffer": data}
        return self.search(lambda: self.page.set_input_files("#file", files=[file]))

    def drag(self, *way: tuple[float, float]) -> None:
        """With the mouse over the photo, in fractions of it."""
        frame = self.page.locator("#stage").bounding_box()
        points = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in way]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point, steps=3)
        self.page.mouse.up()

    def last(self) -> dict[str, list[str]]:
        """The settings of the last search with a photo."""
        return parse_qs(urlsplit(self.asked[-1].url).query)

    def at(self) -> dict[str, list[str]]:
        """The settings in the address."""
        return parse_qs(urlsplit(self.page.url).query)

    def close(self, *allowed: str) -> None:
        """Nothing went wrong but this."""
        assert [text for text in self.wrong if not any(a in text for a in allowed)] == []
        self.page.close()


@pytest.fixture
def photo(collection: served.Collection) -> tuple[str, bytes]:
    """Name and bytes of one."""
    return list(collection.photos.items())[8]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_upload_box_compare(
    browser: Any, http: served.Http, photo: tuple[str, bytes], tmp_path: Path, width: str, scheme: str
) -> None:
    name, data = photo
    p = Page(browser, http.url, width=width, color_scheme=scheme)

    def look(what: str) -> None:
        p.page.wait_for_load_state("networkidle")
        p.page.screenshot(path=tmp_path / f"{what}-{width}-{scheme}.png")
        assert p.page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
        assert p.page.evaluate("[...document.images].every((i) => !i.src || i.loading === 'lazy' || i.complete)")

    p.page.wait_for_selector(".hit")
    look("empty")
    paper = p.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(v) for v in paper.removeprefix("rgb(").removesuffix(")").split(",")) > 3 * 128
    assert light == (scheme == "light")

    whole = p.upload(data)
    assert whole[0] == name
    assert f"{len(whole)} photos among 24" in p.page.text_content("#summary")
    look("found")

    part = p.search(lambda: p.drag((0.3, 0.2), (0.7, 0.8)))
    assert part != whole
    x1, y1, x2, y2 = (float(v) for v in p.last()["box"][0].split(","))
    w, h = Image.open(io.BytesIO(data)).size
    for value, wanted in ((x1, 0.3 * w), (y1, 0.2 * h), (x2, 0.7 * w), (y2, 0.8 * h)):
        assert abs(value - wanted) < 0.02 * max(w, h) + 1
    look("box")
    # Moved as a whole, it keeps its size; by a corner it does not.
    p.search(lambda: p.drag((0.5, 0.5), (0.6, 0.6)))
    moved = [float(v) for v in p.last()["box"][0].split(",")]
    assert abs((moved[2] - moved[0]) - (x2 - x1)) < 1
    assert moved[0] > x1
    assert p.search(lambda: p.page.click("#whole")) == whole
    assert "box" not in p.last()

    p.page.click(".hit >> nth=2")
    p.page.wait_for_selector("#lightbox[open]")
    assert p.page.text_content("#light-name") == whole[2]
    look("compare")
    p.page.click("#light-next")
    assert p.page.text_content("#light-name") == whole[3]
    again = p.search(lambda: p.page.click("#light-search"))
    assert again[0] == whole[3]
    assert p.page.text_content(".hit >> nth=0").startswith("1query")
    assert "id" in p.at()
    assert p.search(p.page.go_back) == whole  # the own photo is still known
    p.close()


def test_the_keyboard_is_enough(browser: Any, http: served.Http) -> None:
    p = Page(browser, http.url, "/?id=3")
    names = p.found()
    assert names[0] == "landmark_0/view_3"
    p.page.keyboard.press("Tab")
    assert p.page.evaluate("document.activeElement.className") == "skip"
    p.page.keyboard.press("Enter")
    assert p.page.evaluate("document.activeElement.id") == "found"
    p.page.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        p.page.keyboard.press(key)
    assert p.page.evaluate("document.activeElement.querySelector('.name').textContent") == names[1]
    p.page.keyboard.press("ArrowDown")
    p.page.keyboard.press("ArrowUp")
    p.page.keyboard.press("Home")
    assert p.page.evaluate("document.activeElement.querySelector('.name').textContent") == names[0]
    p.page.keyboard.press("ArrowRight")
    p.page.keyboard.press("Enter")
    assert p.page.text_content("#light-name") == names[1]
    p.page.keyboard.press("ArrowRight")
    assert p.page.text_content("#light-name") == names[2]
    p.page.keyboard.press("Escape")
    p.page.wait_for_selector(f".hit:focus:has-text('{names[2]}')")
    p.page.keyboard.press("Enter")
    assert p.search(lambda: p.page.keyboard.press("s"))[0] == names[2]

    whole = p.found()
    p.page.evaluate("document.activeElement.blur()")
    part = p.search(lambda: p.page.keyboard.press("b"))
    assert p.page.evaluate("document.activeElement.id") == "box"
    assert part != whole
    p.search(lambda: p.page.keyboard.press("ArrowLeft"))
    assert p.at()["box"] == ["0.1800,0.2000,0.7800,0.8000"]
    p.search(lambda: p.page.keyboard.press("Shift+ArrowDown"))
    assert p.at()["box"] == ["0.1800,0.2000,0.7800,0.8200"]
    assert p.search(lambda: p.page.keyboard.press("Delete")) == whole
    # Whatever can be reached shows that it was.
    p.page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
    for _ in range(25):
        p.page.keyboard.press("Tab")
        shown = "getComputedStyle(document.activeElement.id === 'exact' ? document.querySelector('.knob') : document.activeElement)"
        assert p.page.evaluate(f"{shown}.outlineStyle") != "none"
    p.close()


def test_settings(browser: Any, http: served.Http, photo: tuple[str, bytes]) -> None:
    p = Page(browser, http.url)
    p.upload(photo[1])
    assert "recall 0.900 · index 0.20 ms" in p.page.text_content("#point-said")
    assert p.page.get_attribute("#point", "aria-valuetext").startswith("recall 0.900")
    p.page.focus("#point")
    p.search(lambda: p.page.keyboard.press("ArrowRight"))
    assert "recall 1.000 · index 0.40 ms" in p.page.text_content("#point-said")
    assert (p.last()["nprobe"], p.last()["refine"]) == (["4"], ["4"])
    p.search(lambda: p.page.check("#exact", force=True))
    assert p.last()["exact"] == ["true"]
    assert "nprobe" not in p.last()
    assert p.page.is_disabled("#point")
    assert "compared with 24" in p.page.text_content("#summary")
    p.search(lambda: p.page.select_option("#rerank", "superglobal"))
    assert p.last()["rerank"] == ["superglobal"]
    assert "rerank" in p.page.text_content("#time-steps")
    assert len(p.search(lambda: p.page.select_option("#k", "20"))) == 20
    names = p.search(lambda: p.page.click("#splits button >> nth=1"))
    assert {name[9] for name in names} == {"2", "3"}
    assert p.page.get_attribute("#splits button >> nth=1", "aria-pressed") == "true"
    names = p.search(lambda: p.page.fill("#prefix", "landmark_2"))
    assert len(names) == served.VIEWS
    # All of it is in the address, and comes back.
    p.page.click(".hit >> nth=0")
    names = p.search(lambda: p.page.click("#light-search"))
    other = Page(browser, http.url, p.page.url.removeprefix(http.url))
    assert other.found() == names
    for of in ("document.getElementById('exact').checked", "document.getElementById('rerank').value", "document.title"):
        assert other.page.evaluate(of) == p.page.evaluate(of)
    other.close()
    p.page.fill("#prefix", "nothing")
    p.page.wait_for_selector("#trouble strong")
    assert "begins with 'nothing'" in p.page.text_content("#trouble")
    p.close(EXPECTED)


def test_drop_and_paste(browser: Any, http: served.Http, collection: served.Collection) -> None:
    import base64

    p = Page(browser, http.url)
    p.page.wait_for_selector(".hit")
    script = """([kind, text]) => {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const carried = new DataTransfer();
      carried.items.add(new File([bytes], "photo.jpg", { type: "image/jpeg" }));
      const make = (name) => name === "paste"
        ? new ClipboardEvent(name, { clipboardData: carried, bubbles: true, cancelable: true })
        : new DragEvent(name, { dataTransfer: carried, bubbles: true, cancelable: true });
      if (kind === "drop") document.body.dispatchEvent(make("dragenter"));
      const marked = document.body.classList.contains("dragging");
      document.body.dispatchEvent(make(kind));
      return [marked, document.body.classList.contains("dragging")];
    }"""
    for kind, (name, data) in zip(("drop", "paste"), list(collection.photos.items())[3:5], strict=True):
        arguments = [kind, base64.b64encode(data).decode()]
        assert p.search(lambda a=arguments: p.page.evaluate(script, a))[0] == name
    p.close()


def test_in_trouble(browser: Any, http: served.Http, photo: tuple[str, bytes], collection: served.Collection) -> None:
    p = Page(browser, http.url)
    p.page.wait_for_selector(".hit")
    for body, said in (
        (b"no photo at all", "That is not a photo"),
        (photo[1][:2000], "The photo is damaged"),
        (b"%PDF-1.4", "The format is not read here"),
        (bytes(2**20 + 1), "The photo is too large"),
    ):
        p.page.set_input_files("#file", files=[{"name": "x.jpg", "mimeType": "image/jpeg", "buffer": body}])
        p.page.wait_for_selector(f"#trouble strong:text-is('{said}')")
        assert p.page.is_hidden("#progress")
    assert p.upload(photo[1])[0] == photo[0]
    assert p.page.text_content("#trouble") == ""

    # A busy server is asked again; one that is gone is said to be.
    busy = iter([True, True, False])
    p.page.route(
        "**/v1/search*",
        lambda route: (
            route.fulfill(
                status=429, headers={"retry-after": "0.05"}, json={"error": {"type": "busy", "message": "busy"}}
            )
            if next(busy)
            else route.continue_()
        ),
    )
    assert p.search(lambda: p.drag((0.3, 0.2), (0.7, 0.8)))
    p.page.unroute("**/v1/search*")
    p.page.route("**/v1/search*", lambda route: route.abort())
    p.page.click("#whole")
    p.page.wait_for_selector("#trouble strong:text-is('No connection')")
    p.page.unroute("**/v1/search*")
    assert p.search(lambda: p.page.click("#trouble button"))[0] == photo[0]

    for path in ("/?id=999", "/?id=1&box=3,4,5,6&k=x&point=9&split=nothing&rerank=magic", "/?id=x"):
        p.page.goto(http.url + path)
        p.page.wait_for_selector("#trouble strong:text-is('It is not there (any more)')" if "999" in path else ".hit")
    p.close(EXPECTED, "net::ERR_FAILED", "Failed to load resource")


def test_a_token_is_asked_for_and_kept_out_of_the_address(browser: Any, collection: served.Collection) -> None:
    token = "a-token-of-some-length"
    with served.serving(collection, token=token) as (http, _):
        p = Page(browser, http.url, "/?id=3")
        p.page.wait_for_selector("#door[open]")
        p.page.fill("#door-token", "wrong")
        p.page.keyboard.press("Enter")
        p.page.wait_for_selector("#door-wrong:not(:empty)")
        p.page.fill("#door-token", token)
        p.page.keyboard.press("Enter")
        assert p.found()[0] == "landmark_0/view_3"
        assert p.page.is_hidden("#door")
        p.close(EXPECTED)
        p = Page(browser, http.url, f"/#token={token}")
        p.page.wait_for_selector(".hit")
        assert token not in p.page.url
        assert token not in p.page.evaluate(
            "document.cookie + JSON.stringify(localStorage) + JSON.stringify(sessionStorage)"
        )
        p.close()


def test_photos_that_a_browser_cannot_show(browser: Any, http: served.Http, photo: tuple[str, bytes]) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(photo[1])).save(out, "TIFF")
    p = Page(browser, http.url)
    p.page.wait_for_selector(".hit")
    assert p.upload(out.getvalue(), "photo.tif")[0] == photo[0]
    p.page.wait_for_load_state("networkidle")
    assert p.page.evaluate("document.getElementById('photo').naturalWidth") > 0
    p.search(lambda: p.drag((0.3, 0.2), (0.7, 0.8)))
    p.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing(browser: Any, http: served.Http, photo: tuple[str, bytes], width: str, scheme: str) -> None:
    p = Page(browser, http.url, width=width, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    p.page.wait_for_selector(".hit")
    load_axe(p.page)

    def check(where: str) -> None:
        p.page.wait_for_load_state("networkidle")
        assert_accessible(p.page, where)

    check("empty")
    p.upload(photo[1])
    p.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    p.search(lambda: p.drag((0.3, 0.2), (0.7, 0.8)))
    check("found")
    p.page.click(".hit >> nth=1")
    check("compare")
    p.page.keyboard.press("Escape")
    p.page.set_input_files("#file", files=[{"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"}])
    p.page.wait_for_selector("#trouble strong")
    check("trouble")
    p.close(EXPECTED)
