"""Evaluation of rankings, ours and foreign, and the report about them."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact, embed, evaluate, report, whiten
from iir_dist.errors import GroundTruthError, InputError, MismatchError
from iir_dist.evaluate import EvaluateConfig
from iir_dist.index import build, search
from iir_dist.index.plan import IndexConfig
from iir_dist.index.search import SearchConfig
from iir_dist.models import encoder as models
from iir_dist.models.encoder import EncoderConfig

GND: dict[str, Any] = {
    "imlist": ["a", "b", "c", "d"],
    "qimlist": ["q"],
    "gnd": [{"bbx": [0, 0, 9, 9], "easy": [0], "hard": [2], "junk": [1]}],
}


def rankings(folder: Path, lists: dict[str, list[str]], **columns: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(q, r, n) for q, names in lists.items() for r, n in enumerate(names)]
    queries, ranks, names = zip(*rows, strict=True)
    pq.write_table(pa.table({"query": queries, "rank": ranks, "name": names, **columns}), folder / "r.parquet")
    return str(folder)


def truth(folder: Path, **changes: Any) -> str:
    path = folder / "gt.json"
    path.write_text(json.dumps({**GND, **changes}))
    return str(path)


def run(tmp_path: Path, lists: dict[str, list[str]], **changes: Any) -> dict[str, Any]:
    out = tmp_path / "m"
    evaluate.run(rankings(tmp_path / "r", lists), truth(tmp_path, **changes), str(out), EvaluateConfig())
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return result


def test_levels_worked_by_hand(tmp_path: Path) -> None:
    """List x, b, a, c, d; b is junk everywhere, c is ignored at Easy, a at Hard.

    Easy: x a d -> a at rank 1: (0/1 + 1/2)/2 = 0.25. Hard: x c d -> the same.
    Medium: x a c d -> ((0/1 + 1/2) + (1/2 + 2/3)) / (2 * 2) = 0.41666...
    """
    result = run(tmp_path, {"q": ["x", "b", "a", "c", "d"]})
    values = {level: m["map"] for level, m in result["metrics"].items()}
    assert values == pytest.approx({"easy": 0.25, "medium": 5 / 12, "hard": 0.25})
    assert result["metrics"]["medium"]["mp@1"] == 0.0
    assert result["metrics"]["medium"]["mp@5"] == pytest.approx(2 / 3)  # the last positive is third
    assert result["protocol"]["name"] == "revisited"
    assert result["protocol"]["list_depth"] == {"min": 5, "max": 5}
    assert not result["protocol"]["verified"]
    top = pq.read_table(tmp_path / "m" / "top.parquet").to_pylist()
    assert [(t["name"], t["verdict"]) for t in top] == [
        ("x", "wrong"), ("b", "ignored"), ("a", "right"), ("c", "right"), ("d", "wrong")
    ]  # fmt: skip
    per_query = pq.read_table(tmp_path / "m" / "per_query.parquet").to_pylist()
    assert [(r["level"], r["num_positive"], r["num_found"]) for r in per_query] == [
        ("easy", 1, 1), ("medium", 2, 2), ("hard", 1, 1)
    ]  # fmt: skip


def test_a_cut_list_is_a_lower_bound(tmp_path: Path) -> None:
    result = run(tmp_path, {"q": ["a"]})
    assert result["metrics"]["medium"]["map"] == 0.5
    assert result["metrics"]["medium"]["num_positive"] == 2
    assert result["metrics"]["medium"]["num_found"] == 1


def test_names_match_by_their_last_component(tmp_path: Path) -> None:
    result = run(tmp_path, {"oxford/q": ["oxford/a", "oxford/c", "oxford/d"]})
    assert result["metrics"]["medium"]["map"] == 1.0


@pytest.mark.parametrize(
    ("lists", "part"),
    [
        ({"other": ["a"]}, r"1 of 1 queries of the ground truth have no list \(first 'q'\)"),
        ({"q": ["a", "q"]}, "keeps out of the database"),
    ],
)
def test_rankings_that_do_not_fit(tmp_path: Path, lists: dict[str, list[str]], part: str) -> None:
    with pytest.raises(GroundTruthError, match=part):
        run(tmp_path, lists)


def test_broken_rankings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names an image twice"):
        run(tmp_path, {"q": ["a", "b", "a"]})
    with pytest.raises(InputError, match="ranks of query 'q' are not 0, 1, 2"):
        evaluate.run(
            rankings(tmp_path / "gap", {"q": ["a", "b"]}, rank=[0, 2]),
            truth(tmp_path),
            str(tmp_path / "n"),
            EvaluateConfig(),
        )
    pq.write_table(pa.table({"query": ["q"]}), tmp_path / "gap" / "r.parquet")
    with pytest.raises(InputError, match="no column rank, name"):
        evaluate.run(str(tmp_path / "gap"), truth(tmp_path), str(tmp_path / "n"), EvaluateConfig())
    with pytest.raises(InputError, match="expected the output of search"):
        evaluate.run(str(tmp_path / "nothing"), truth(tmp_path), str(tmp_path / "n"), EvaluateConfig())


def test_a_protocol_can_be_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(GroundTruthError, match=r"--protocol original: .* is a ground truth of the revisited"):
        evaluate.run(
            rankings(tmp_path / "r", {"q": ["a"]}),
            truth(tmp_path),
            str(tmp_path / "m"),
            EvaluateConfig(protocol="original"),
        )


class Page(HTMLParser):
    """Collects tags, and fails on what a self-contained page must not have."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert tag not in ("script", "link", "iframe"), tag
        for name in ("src", "href"):
            value = dict(attrs).get(name) or "data:"
            assert value.startswith(("data:image/jpeg;base64,", "data:", "#")), value

    def classes(self, tag: str) -> list[str]:
        return [a["class"] or "" for t, a in self.tags if t == tag and "class" in a]


@pytest.mark.ray
def test_the_report_shows_right_and_wrong(images: Path, embeddings: Path, tmp_path: Path) -> None:
    benchmark = str(embeddings / "benchmark")
    for name, database in (("alone", [benchmark]), ("more", [benchmark, str(embeddings / "distractors")])):
        search.run(database, [benchmark], str(tmp_path / "r" / name), SearchConfig())
        evaluate.run(
            str(tmp_path / "r" / name), str(images / "benchmark"), str(tmp_path / "m" / name), EvaluateConfig()
        )
    metrics = [str(tmp_path / "m" / name) for name in ("alone", "more")]
    photos = [str(images / "benchmark"), str(images / "distractors")]
    config = report.ReportConfig(title="<b>Tests & more</b>", queries=3, depth=5)
    report.run(metrics, photos, str(tmp_path / "report"), config)
    assert [p.name for p in (tmp_path / "report").iterdir() if p.suffix == ".html"] == ["index.html"]
    text = (tmp_path / "report" / "index.html").read_text()
    page = Page(text)
    assert "&lt;b&gt;Tests &amp; more&lt;/b&gt;" in text
    assert "<b>Tests" not in text
    assert page.classes("img").count("query") == 6  # three queries, two runs
    top = [
        row
        for name in ("alone", "more")
        for row in pq.read_table(tmp_path / "m" / name / "top.parquet").to_pylist()
        if row["rank"] < 5 and f"<strong>{row['query']}</strong>" in text
    ]
    assert len(top) == 30
    for verdict in ("right", "wrong", "ignored"):
        assert page.classes("img").count(verdict) == sum(row["verdict"] == verdict for row in top)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # easy, medium, hard
    for name in ("alone", "more"):
        _, manifest = artifact.require(tmp_path / "m" / name, "evaluate")
        for m in manifest.info["metrics"].values():
            assert f"{m['map']:.3f}" in text
        assert manifest.info["protocol"]["complete_lists"]
        assert manifest.info["protocol"]["encoder"]["size"] == 64
    more = artifact.require(tmp_path / "m" / "more", "evaluate")[1].info
    assert more["protocol"]["database_rows"] == 32 + 16


def test_a_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluation given"):
        report.run([], [], str(tmp_path), report.ReportConfig())
    with pytest.raises(InputError, match="has 1 names for 2 evaluations"):
        report.run(["a", "b"], [], str(tmp_path), report.ReportConfig(labels=("x",)))


# ------------------------------------------------------------------------------------------------ what whitening saw


def whitened(embeddings: Path, encoder: Path, out: Path, learnt_on: str, **settings: Any) -> dict[str, str]:
    """Whitening learnt on one set; benchmark and distractors through it; their folders."""
    config = whiten.WhitenConfig.model_validate({"dim": 4, **settings})
    whiten.run(str(embeddings / learnt_on), str(encoder), str(out / "white"), config)
    for name in ("benchmark", "distractors"):
        embed.run(str(embeddings / name), str(out / "white"), str(out / name), embed.EmbedConfig())
    return {name: str(out / name) for name in ("benchmark", "distractors")}


def whitening_of(rankings: Path, truth: Path | str, out: Path, *, allow: bool = False) -> str:
    evaluate.run(str(rankings), str(truth), str(out), EvaluateConfig(allow_whitening_on_test=allow))
    found: str = json.loads((out / "metrics.json").read_text())["protocol"]["whitening_set"]
    return found


@pytest.mark.ray
def test_whitening_learnt_on_the_evaluated_set(images: Path, encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    """Refused with the ground truth in the images or apart, and also when the vectors are indexed."""
    t = tmp_path
    vectors = whitened(embeddings, encoder, t / "e", "benchmark", allow_benchmark=True)
    both = [vectors["benchmark"], vectors["distractors"]]
    build.run(both, str(t / "index"), IndexConfig(factory="IVF2,Flat"))
    search.run(both, [vectors["benchmark"]], str(t / "exact"), SearchConfig())
    search.run([str(t / "index")], [vectors["benchmark"]], str(t / "indexed"), SearchConfig(nprobe=2))
    shutil.copy(images / "benchmark" / "groundtruth.json", t / "truth.json")
    for rankings in ("exact", "indexed"):
        for number, truth in enumerate((images / "benchmark", t / "truth.json")):
            out = t / f"m-{rankings}-{number}"
            with pytest.raises(MismatchError, match="learnt on the images that are evaluated"):
                whitening_of(t / rankings, truth, out)
            assert not out.exists()
            assert whitening_of(t / rankings, truth, out, allow=True) == "the evaluated set"
    # The folders in between are gone: the ground truth's own images are still known, those of a file are not.
    shutil.rmtree(t / "e")
    with pytest.raises(MismatchError, match="learnt on the images that are evaluated"):
        whitening_of(t / "exact", images / "benchmark", t / "m")
    assert "not known whether these are evaluated" in whitening_of(t / "exact", t / "truth.json", t / "m")


@pytest.mark.ray
def test_whitening_learnt_elsewhere_is_named(images: Path, encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    t, truth = tmp_path, images / "benchmark"
    vectors = whitened(embeddings, encoder, t / "e", "distractors")
    benchmark, distractors = vectors["benchmark"], vectors["distractors"]
    search.run([benchmark], [benchmark], str(t / "alone"), SearchConfig())
    search.run([benchmark, distractors], [benchmark], str(t / "among"), SearchConfig())
    name = artifact.require(images / "distractors", "ingest")[1].fingerprint[:12]
    expected = f"16 of split distractor, images {name}; none of them is evaluated"
    assert whitening_of(t / "alone", truth, t / "m1") == expected
    # No query asks for a distractor: allowed, but said.
    assert whitening_of(t / "among", truth, t / "m2") == "distractors of the evaluated database"
    # A folder that holds other vectors now says nothing about those that were searched.
    manifest = json.loads((t / "e" / "benchmark" / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (t / "e" / "benchmark" / "manifest.json").write_text(json.dumps(manifest))
    found = whitening_of(t / "alone", truth, t / "m3")
    assert f"not known whether these are evaluated, because {benchmark}" in found


@pytest.mark.ray
def test_whitening_of_regions_counts_as_well(images: Path, tmp_path: Path) -> None:
    """Alone, and together with a whitening that was learnt elsewhere."""
    t, benchmark = tmp_path, str(images / "benchmark")
    settings = {"backbone": "resnet18", "weights": "random", "size": 64, "pooling": "rmac"}
    models.run(str(t / "rmac"), EncoderConfig.model_validate(settings))
    config = whiten.WhitenConfig(method="regions", dim=4, allow_benchmark=True)
    whiten.run(benchmark, str(t / "rmac"), str(t / "white"), config)
    embed.run(benchmark, str(t / "white"), str(t / "e"), embed.EmbedConfig(workers=1))
    search.run([str(t / "e")], [str(t / "e")], str(t / "r"), SearchConfig())
    with pytest.raises(MismatchError, match="learnt on the images that are evaluated"):
        whitening_of(t / "r", benchmark, t / "m")
    assert whitening_of(t / "r", benchmark, t / "m", allow=True) == "the evaluated set"

    manifest = artifact.require(t / "r", "search")[1]
    regions = manifest.info["encoder"]["region_whitening"]
    elsewhere = {**regions, "learnt_on": "b" * 64, "images": "a" * 64, "splits": {"train": 30}}
    whole = {**elsewhere, "method": "pca", "images": "c" * 64, "splits": {"train": 40}}

    def seen(**changes: Any) -> str:
        encoder = {**manifest.info["encoder"], **changes}
        return evaluate.whitening_set(manifest.model_copy(update={"info": {"encoder": encoder}}), None)

    assert seen(whitening=whole) == "the evaluated set"
    assert seen(region_whitening=elsewhere, whitening={**whole, "images": regions["images"]}) == "the evaluated set"
    distractors = {**regions, "splits": {"distractor": 16}}
    assert seen(region_whitening=distractors, whitening=whole) == "distractors of the evaluated database"
    assert seen(region_whitening=distractors, whitening={**regions, "splits": {"db": 1}}) == "the evaluated set"
    both = "regions of 30 of split train, images aaaaaaaaaaaa and 40 of split train, images cccccccccccc"
    assert seen(region_whitening=elsewhere, whitening=whole) == f"{both}; none of them is evaluated"
    old = {k: v for k, v in manifest.info["encoder"].items() if k != "region_whitening"}
    assert evaluate.whitening_set(manifest.model_copy(update={"info": {"encoder": old}}), None).startswith("none, ")


@pytest.mark.ray
def test_no_whitening_is_said_too(images: Path, embeddings: Path, tmp_path: Path) -> None:
    benchmark = str(embeddings / "benchmark")
    search.run([benchmark], [benchmark], str(tmp_path / "r"), SearchConfig())
    assert whitening_of(tmp_path / "r", images / "benchmark", tmp_path / "m") == "none, the vectors are not whitened"


def test_whitening_of_foreign_rankings_is_unknown(tmp_path: Path) -> None:
    assert run(tmp_path, {"q": ["a", "b"]})["protocol"]["whitening_set"] == "unknown"
