"""The report: what it says of evaluations and benchmarks, what it shows of queries, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pages
import pytest
from PIL import Image

from iir_dist import artifact, report
from iir_dist.config import fingerprint
from iir_dist.data import groundtruth
from iir_dist.errors import CorruptError, InputError, MismatchError
from iir_dist.report import ReportConfig, published
from iir_dist.report import distractors as curve


class Page(HTMLParser):
    """Elements with their attributes, in order; nothing on the page may come from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert tag != "iframe"
        for name in ("src", "href", "xlink:href"):
            value = dict(attrs).get(name) or "#"
            assert value.startswith(("#", "data:")), value

    def classes(self, tag: str) -> list[str]:
        return [a["class"] or "" for t, a in self.tags if t == tag and "class" in a]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: `first`, `other`, and `again`, which re-ranks the lists of `first`; and all photos but one."""
    root = tmp_path_factory.mktemp("runs")
    truth = pages.truth(root)
    pages.evaluated(root / "first", truth, pages.lists(0))
    pages.evaluated(root / "other", truth, pages.lists(1))
    pages.evaluated(root / "again", truth, [row[1::-1] + row[2:] for row in pages.lists(0)], root / "first" / "r")
    pages.photos(root / "photos", pages.IMAGES[1:])
    return root


def made(runs: Path, out: Path, *names: str, **settings: Any) -> str:
    folders = [str(runs / name / "m") for name in names]
    images = [str(runs / "photos")]
    report.run(folders, images, str(out), ReportConfig.model_validate(settings))
    return (out / "index.html").read_text()


@pytest.fixture(scope="module")
def text(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of all three runs."""
    return made(runs, tmp_path_factory.mktemp("page"), "first", "other", "again", depth=5, title="<b>Tests & more</b>")


def test_one_file_that_needs_nothing_else(text: str) -> None:
    page = Page(text)
    assert "&lt;b&gt;Tests &amp; more&lt;/b&gt;" in text
    assert "<b>Tests" not in text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # easy, medium, hard


def test_strips_are_the_lists_with_their_verdicts(runs: Path, text: str) -> None:
    top = [
        row
        for name in ("first", "again", "other")
        for row in report.Evaluation(name, *_opened(runs / name / "m")).table("top.parquet")
    ]
    shown = [row for row in top if row["rank"] < 5]
    items = [c for c in Page(text).classes("li") if c in ("right", "wrong", "ignored")]
    assert len(items) == len(shown) == 3 * 4 * 5
    for verdict in ("right", "wrong", "ignored"):
        assert items.count(verdict) == sum(row["verdict"] == verdict for row in shown)
    # Medium has most positives, so it is the level of the verdicts: 4q to 4q + 3 right, 16 + q ignored.
    for row in shown:
        q, i = int(row["query"][-1]), int(row["name"][-2:])
        assert row["verdict"] == ("right" if i // 4 == q else "ignored" if i == 16 + q else "wrong")
    one = re.search(r'<details class="query" data-name="tower_2".*?</details>', text, re.S)
    assert one is not None
    titles = re.findall(r'title="(\d+)\. (\w+) \((\w+)\)"', one[0])
    assert titles == [(str(r["rank"] + 1), r["name"], r["verdict"]) for r in shown if r["query"] == "tower_2"]


def _opened(uri: Path) -> tuple[Any, dict[str, Any]]:
    folder, _ = artifact.require(uri, "evaluate")
    return folder, json.loads(folder.read("metrics.json"))


def test_photos_are_held_once_and_are_the_right_ones(text: str) -> None:
    found = re.search(r'id="photos">(.*?)</script>', text)
    assert found is not None
    data = json.loads(found[1])
    assert len(data) == len(set(data)) <= len(pages.IMAGES) - 1 + len(pages.QUERIES)
    number = re.search(r'<img data-photo="(\d+)" alt="view_05">', text)
    assert number is not None
    with Image.open(io.BytesIO(base64.b64decode(data[int(number[1])]))) as photo:
        assert photo.size == (64, 48)
    query = re.search(r'data-name="tower_1".*?<img data-photo="(\d+)" alt="">', text, re.S)
    assert query is not None
    with Image.open(io.BytesIO(base64.b64decode(data[int(query[1])]))) as photo:
        assert photo.size == (56, 40)  # cut to its box
    assert '<div class="name">view_00</div>' in text
    assert "1 images have no photo in the folders given (first: view_00)" in text


def test_queries_are_best_and_worst_in_turn(runs: Path, text: str, tmp_path: Path) -> None:
    names = re.findall(r'data-name="(\w+)"', text)
    aps = report.Evaluation("first", *_opened(runs / "first" / "m")).average_precisions("medium")
    ranked = sorted(aps, key=lambda q: (-aps[q], q))
    assert names == [ranked[0], ranked[3], ranked[1], ranked[2]]
    for name, values in re.findall(r'data-name="(\w+)" data-aps="([^"]+)"', text):
        assert float(values.split(",")[0]) == pytest.approx(aps[name], abs=1e-6)
    few = made(runs, tmp_path / "few", "first", queries=2)
    assert re.findall(r'data-name="(\w+)"', few) == [ranked[0], ranked[3]]
    assert "2 of 4 queries are here" in few


def test_what_was_re_ranked_stands_below_what_it_was_made_from(runs: Path, text: str, tmp_path: Path) -> None:
    """`again` exchanges the first two of every list of `first`."""
    one = re.search(r'<details class="query" data-name="tower_0".*?</details>', text, re.S)
    assert one is not None
    blocks = one[0].split('<div class="run">')[1:]
    assert [re.search(r"<p>(\S+?)[ <]", b)[1] for b in blocks] == ["first/m", "again/m", "other/m"]  # type: ignore[index]
    assert "re-ranked from first/m" in blocks[1]
    assert [re.findall(r"[▲▼]\d+", b) for b in blocks] == [[], ["▲1", "▼1"], []]
    alone = made(runs, tmp_path / "alone", "other", "again", queries=1)
    assert "re-ranked from" not in alone
    assert "▲1" not in alone


def test_the_table_has_every_figure_with_its_interval(runs: Path, text: str) -> None:
    for name in ("first", "other"):
        _, result = _opened(runs / name / "m")
        for m in result["metrics"].values():
            assert f"{m['map']:.3f}" in text
            for low, high in (m["map_interval"], *m["intervals"].values()):
                assert f"{low:.3f} \u2013 {high:.3f}" in text
    rows = report.table_rows([report.Evaluation(n, *_opened(runs / n / "m")) for n in ("first", "other")])
    for row in rows[3:]:
        assert row["gain"]["mean"] == pytest.approx(row["scores"]["mAP"] - rows[rows.index(row) - 3]["scores"]["mAP"])
        low, high = row["gain"]["interval"]
        assert low <= row["gain"]["mean"] <= high
    assert "published" not in text.partition("<nav")[2].partition("</nav>")[0]


def test_protocol_and_manifest_are_there(runs: Path, text: str) -> None:
    _, manifest = artifact.require(runs / "first" / "m", "evaluate")
    assert manifest.fingerprint in text
    assert manifest.files["metrics.json"].sha256 in text
    assert "&#34;average_precision&#34;: &#34;trapezoids" in text


def test_custom_figures(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        "".join(
            json.dumps({"query": q, "positive": pages.IMAGES[4 * i : 4 * i + 4]}) + "\n"
            for i, q in enumerate(pages.QUERIES)
        )
    )
    pages.evaluated(tmp_path / "a", str(tmp_path / "t.jsonl"), pages.lists(0), k=10)
    report.run([str(tmp_path / "a" / "m")], [], str(tmp_path / "o"), ReportConfig())
    text = (tmp_path / "o" / "index.html").read_text()
    m = _opened(tmp_path / "a" / "m")[1]["metrics"]["custom"]
    assert m["intervals"]["micro_ap"][0] < m["micro_ap"] < m["intervals"]["micro_ap"][1]
    for name in ("µAP", "recall@10", "mAP@10"):
        assert name in text
    assert "{:.3f} \u2013 {:.3f}".format(*m["intervals"]["micro_ap"]) in text


# ------------------------------------------------------------------------------------------------ published figures


def protocol(fingerprint: str, distractors: int | None = 0, *differs: str) -> dict[str, Any]:
    return {
        "ground_truth": {"fingerprint": fingerprint}, "distractors": distractors,
        "differences": [{"choice": choice} for choice in differs],
    }  # fmt: skip


OXFORD = next(print_ for print_, name in published.SETS.items() if name == "roxford5k")


def test_published_figures_stand_beside_equal_ones_only() -> None:
    found = {(p.method, p.descriptor): p.map for p in published.beside(protocol(OXFORD), "hard")}
    assert found["DOLG", "ResNet-101"] == pytest.approx(0.649)
    assert ("GeM + CSA", "ResNet-101") not in found  # it re-ranks
    million = {(p.method, p.descriptor): p.map for p in published.beside(protocol(OXFORD, published.MILLION), "hard")}
    assert million["DOLG", "ResNet-101"] == pytest.approx(0.516)
    assert ("GeM + Lw", "VGG-16") not in million  # it was not published
    again = published.beside(protocol(OXFORD, 0, "re-ranking"), "medium")
    assert {p.stages for p in again} == {2}
    assert published.beside(protocol(OXFORD), "easy") == []
    for other in (
        protocol("0" * 64), protocol(OXFORD, None), protocol(OXFORD, 2_000, "distractors"),
        protocol(OXFORD, 0, "query crop"), protocol(OXFORD, 0, "re-ranking", "search"),
    ):  # fmt: skip
        assert published.beside(other, "hard") == []


def test_published_sets_are_known_by_their_ground_truth(shared: Path) -> None:
    files = {
        "revisitop/gnd_roxford5k.pkl": "roxford5k", "revisitop/gnd_rparis6k.pkl": "rparis6k",
        "oxford5k_gt_files": "oxford5k", "paris6k_gt_files": "paris6k",
    }  # fmt: skip
    for file, name in files.items():
        truth = groundtruth.read(shared / "groundtruth" / file)
        assert published.SETS[fingerprint(truth.to_json())] == name
        for level in truth.levels():
            if level != "easy":
                assert len(published.beside(protocol(fingerprint(truth.to_json())), level)) >= 5
    wonders = groundtruth.read(shared / "groundtruth" / "wonders11" / "gnd_wonders11.pkl")
    assert fingerprint(wonders.to_json()) not in published.SETS


def test_published_figures_on_the_page(runs: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the made-up set were ROxford: ours is sorted in among the published ones. As itself it has none beside it."""
    assert "SOLAR" not in text
    _, result = _opened(runs / "first" / "m")
    monkeypatch.setitem(published.SETS, result["protocol"]["ground_truth"]["fingerprint"], "roxford5k")
    evaluation = report.Evaluation("ours", *_opened(runs / "first" / "m"))
    evaluation.protocol.update(differences=[], distractors=0)
    groups = {g["title"]: g["rows"] for g in report.evaluations.beside_published([evaluation])}
    assert list(groups) == ["ROxford5k, medium", "ROxford5k, hard"]
    for rows in groups.values():
        assert [r["map"] for r in rows] == sorted((r["map"] for r in rows), reverse=True)
        assert [r["name"] for r in rows if r["ours"]] == ["ours"]
        assert all(r["source"] for r in rows)


# ------------------------------------------------------------------------------------------------ distractors


def test_a_benchmark_has_its_curves_and_says_what_is_synthetic(tmp_path: Path) -> None:
    found = pages.benchmarked()
    text = curve.page(found)
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 6  # of one level, and the similarities
    assert "<strong>* with synthetic distractors</strong>" in text
    rows = re.findall(r'<tr><th scope="row">([\d,]+\*?)</th>', text)
    assert {r for r in rows if r.endswith("*")} == {"10,000*", "1,000,000*"}
    assert {r for r in rows if not r.endswith("*")} == {"0", "1,000"}
    assert "<td>998,000</td>" in text
    assert "not reached, the best there is" in text
    for step in found["steps"]:
        assert f"{step['exact']['medium']['mean']:.4f}" in text


def test_a_benchmark_beside_evaluations(runs: Path, tmp_path: Path) -> None:
    """One without synthetic distractors."""
    bench = pages.bench_folder(tmp_path / "curve", pages.benchmarked((0, 1_000)))
    report.run(
        [str(runs / "first" / "m"), str(bench)],
        [],
        str(tmp_path / "o"),
        ReportConfig(labels=("one", "among"), queries=0),
    )
    text = (tmp_path / "o" / "index.html").read_text()
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 5
    assert "synthetic distractors" not in text
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert "Among distractors: among" in text
    assert artifact.require(bench, "bench")[1].fingerprint in text


# ------------------------------------------------------------------------------------------------ refusals


def test_what_is_refused(runs: Path, tmp_path: Path) -> None:
    def refused(
        error: type[Exception], match: str, *folders: Path, images: tuple[Path, ...] = (), **settings: Any
    ) -> None:
        with pytest.raises(error, match=match):
            report.run(
                [str(f) for f in folders], [str(i) for i in images], str(tmp_path / "o"), ReportConfig(**settings)
            )

    first = runs / "first" / "m"
    refused(InputError, "no folder given; expected what iir evaluate or iir bench distractors wrote")
    refused(InputError, "has 1 names for 2 folders", first, first, labels=("x",))
    refused(InputError, "names two folders alike: x, x", first, runs / "other" / "m", labels=("x", "x"))
    refused(InputError, "a folder is given twice", first, first)
    refused(InputError, "was written by 'search'; expected evaluate or bench", runs / "first" / "r")
    refused(InputError, "was written by 'ingest'; expected evaluate or bench", runs / "photos")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.html").write_text("mine")
    refused(InputError, "has no manifest.json; expected the output of evaluate or bench", tmp_path / "foreign")
    refused(InputError, "was written by 'evaluate'; expected ingest", first, images=(first,))
    others = pages.photos(tmp_path / "others", ["elsewhere"], [])
    refused(
        InputError,
        r"none of the \d+ photos of the rankings .* is in .*others; expected the images that were",
        first,
        images=(others,),
    )


def test_runs_over_other_queries_are_refused(runs: Path, tmp_path: Path) -> None:
    other = json.loads(Path(pages.truth(tmp_path)).read_text())
    other["gnd"][0]["easy"] = [0]
    (tmp_path / "other.json").write_text(json.dumps(other))
    pages.evaluated(tmp_path / "a", str(tmp_path / "other.json"), pages.lists(0))
    with pytest.raises(MismatchError, match=r"with different ground truths .*so make one report for each"):
        report.run([str(runs / "first" / "m"), str(tmp_path / "a" / "m")], [], str(tmp_path / "o"), ReportConfig())
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"query": q, "positive": ["view_00"]}) + "\n" for q in pages.QUERIES)
    )
    pages.evaluated(tmp_path / "c", str(tmp_path / "t.jsonl"), pages.lists(0))
    with pytest.raises(MismatchError, match=r"of the revisited protocol \(mAP\), .* of the custom \(mAP@100\)"):
        report.run([str(runs / "first" / "m"), str(tmp_path / "c" / "m")], [], str(tmp_path / "o"), ReportConfig())


def test_what_was_changed_is_refused(tmp_path: Path) -> None:
    truth = pages.truth(tmp_path)
    metrics = pages.evaluated(tmp_path / "a", truth, pages.lists(0))
    photos = pages.photos(tmp_path / "photos")
    bench = pages.bench_folder(tmp_path / "bench", pages.benchmarked())
    for path in (metrics / "top.parquet", photos / "shard-00000.parquet", bench / "bench.json"):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + b"x" + content[-8:])
        with pytest.raises(CorruptError, match=path.name):
            report.run([str(metrics), str(bench)], [str(photos)], str(tmp_path / "o"), ReportConfig())
        path.write_bytes(content)
    report.run([str(metrics), str(bench)], [str(photos)], str(tmp_path / "o"), ReportConfig())
