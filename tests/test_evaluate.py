"""Evaluation of rankings, ours and foreign."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from iir_dist import artifact, embed, evaluate, ingest, whiten
from iir_dist.data import groundtruth
from iir_dist.errors import CorruptError, GroundTruthError, InputError, MismatchError
from iir_dist.evaluate import EvaluateConfig, numbers_of, read_rankings, score
from iir_dist.evaluate.protocol import differences
from iir_dist.evaluate.score import micro_ap
from iir_dist.index import build, search
from iir_dist.index.plan import IndexConfig
from iir_dist.index.search import SearchConfig
from iir_dist.models import encoder as models
from iir_dist.models.encoder import EncoderConfig
from iir_dist.rerank import stage as rerank
from iir_dist.rerank.expansion import QueryExpansion
from iir_dist.storage import open_folder

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
        ({"q": ["x", "y"]}, r"none of the 3 images that the ground truth labels is in the rankings, which name x, y"),
    ],
)
def test_rankings_that_do_not_fit(tmp_path: Path, lists: dict[str, list[str]], part: str) -> None:
    with pytest.raises(GroundTruthError, match=part):
        run(tmp_path, lists)


GOOD: dict[str, list[Any]] = {"query": ["q", "q"], "rank": [0, 1], "name": ["a", "b"], "score": [0.9, 0.8]}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"name": ["a", "a"]}, r"names an image twice \('a'\)"),
        ({"rank": [0, 2]}, "ranks of query 'q' are not 0, 1, 2"),
        ({"rank": [0, 0]}, "ranks of query 'q' are not 0, 1, 2"),
        ({"rank": [-1, 0]}, "ranks from -1 to 0"),
        ({"rank": [0.0, 1.0]}, "`rank` is double; expected integers"),
        ({"rank": [0, None]}, "`rank` is empty in 1 rows"),
        ({"score": [0.9, float("nan")]}, "1 scores are not finite .first nan of query q at rank 1"),
        ({"score": [float("inf"), 0.8]}, "1 scores are not finite .first inf of query q at rank 0"),
        ({"score": [0.9, None]}, "`score` is empty in 1 rows"),
        ({"score": ["x", "y"]}, "`score` is string; expected floats"),
        ({"name": ["a", None]}, "`name` is empty in 1 rows"),
        ({"name": [1, 2]}, "`name` is int64; expected text"),
        ({"query": ["q", None]}, "`query` is empty in 1 rows"),
        ({"id": [1.5, 2.5]}, "`id` is double; expected integers"),
        ({"rank": None, "name": None}, "no column rank, name"),
    ],
)
def test_broken_rankings_are_refused(tmp_path: Path, changes: dict[str, list[Any] | None], part: str) -> None:
    columns = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    (tmp_path / "r").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "r" / "r.parquet")
    with pytest.raises(InputError, match=part):
        evaluate.run(str(tmp_path / "r"), truth(tmp_path), str(tmp_path / "n"), EvaluateConfig())
    assert not (tmp_path / "n").exists()


def test_rankings_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the output of search or rerank"):
        evaluate.run(str(tmp_path / "nothing"), truth(tmp_path), str(tmp_path / "n"), EvaluateConfig())
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "r.parquet").write_bytes(b"no parquet")
    with pytest.raises(CorruptError, match="is not a Parquet file"):
        evaluate.run(str(tmp_path / "r"), truth(tmp_path), str(tmp_path / "n"), EvaluateConfig())


def test_lists_of_queries_that_nobody_asked_for_are_counted(tmp_path: Path) -> None:
    result = run(tmp_path, {"q": ["a", "c"], "other": ["b"]})
    assert result["protocol"]["lists_beside"] == 1
    assert result["metrics"]["medium"]["num_queries"] == 1


def test_unknown_names_count_as_wrong_and_lists_may_be_short(tmp_path: Path) -> None:
    """d and c are wrong or absent; of a list of one image mP@5 and mP@10 are those of one image."""
    result = run(tmp_path, {"q": ["unknown", "a"]})
    medium = result["metrics"]["medium"]
    assert medium["map"] == pytest.approx((0 + 1 / 2) / 4)
    assert medium["mp@10"] == 0.5
    assert (medium["num_positive"], medium["num_found"]) == (2, 1)
    assert result["protocol"]["ground_truth"]["images_in_lists"] == 1
    assert [d["choice"] for d in result["protocol"]["differences"]] == ["rankings"] == medium["differs_in"]


# ------------------------------------------------------------------------------------------------ reading


def written(folder: Path, table: pa.Table, group: int = 2**20) -> tuple[Any, list[str]]:
    folder.mkdir()
    pq.write_table(table, folder / "r.parquet", row_group_size=group)
    return open_folder(folder), ["r.parquet"]


def as_names(rankings: evaluate.Rankings) -> dict[str, list[str]]:
    return {q: rankings.names.take(pa.array(codes)).to_pylist() for q, codes in rankings.lists.items()}


@pytest.mark.parametrize("group", [3, 7, 1000])
def test_every_way_to_read_gives_the_same(tmp_path: Path, group: int) -> None:
    """By ids, by names, by ids too large for a table, with rows in any order, and with names as categories."""
    rng = np.random.default_rng(group)
    lists = {f"q{i}": rng.permutation(30)[: rng.integers(1, 30)] for i in range(5)}
    rows = [(q, r, int(i), f"s/{i:03d}", 1 - r / 64) for q, ids in lists.items() for r, i in enumerate(ids)]
    table = pa.table(dict(zip(("query", "rank", "id", "name", "score"), zip(*rows, strict=True), strict=True)))
    expected = {q: [f"s/{i:03d}" for i in ids] for q, ids in lists.items()}
    large = table.set_column(2, "id", pa.array(np.array(table["id"]) + 2**40))
    categories = table.set_column(3, "name", table["name"].dictionary_encode())
    categories = categories.set_column(0, "query", table["query"].dictionary_encode())
    shuffled = table.take(pa.array(rng.permutation(len(table))))
    for number, (made, by_id) in enumerate(
        [(table, True), (table, False), (table.drop_columns("id"), True), (large, True), (shuffled, True),
         (shuffled, False), (categories, True), (categories, False)]
    ):  # fmt: skip
        found = read_rankings(*written(tmp_path / str(number), made, group), by_id=by_id)
        assert as_names(found) == expected
        assert {q: s.tolist() for q, s in found.scores.items()} == {
            q: [1 - r / 64 for r in range(len(ids))] for q, ids in lists.items()
        }
        assert found.ties is not None
        assert (found.ties.images, found.ties.lists, found.rising) == (0, 0, ())


@pytest.mark.parametrize(("by_id", "ids"), [(True, True), (False, True), (False, False)])
def test_ties_are_broken_by_id_and_counted(tmp_path: Path, by_id: bool, ids: bool) -> None:
    """One tie of three and one of two in q, none in p; their writer had them in another order."""
    table = pa.table({
        "query": ["q"] * 6 + ["p"] * 2, "rank": [0, 1, 2, 3, 4, 5, 0, 1], "id": [9, 3, 5, 8, 2, 1, 1, 2],
        "name": ["z", "c", "e", "y", "b", "a", "a", "b"], "score": [0.9, 0.9, 0.9, 0.5, 0.5, 0.1, 0.9, 0.8],
    })  # fmt: skip
    found = read_rankings(*written(tmp_path / "r", table if ids else table.drop_columns("id")), by_id=by_id)
    assert as_names(found) == {"q": ["c", "e", "z", "b", "y", "a"], "p": ["a", "b"]}
    assert found.ties is not None
    assert (found.ties.images, found.ties.lists, found.ties.broken_by) == (5, 1, "id" if ids else "name")


def test_ties_are_in_the_protocol(tmp_path: Path) -> None:
    """x, a and c tie, b is junk: whatever the order of their rows, it is a, c, x."""
    for number, names in enumerate((["x", "c", "a", "b"], ["a", "x", "c", "b"])):
        folder = rankings(tmp_path / f"r{number}", {"q": names}, score=[0.5, 0.5, 0.5, 0.1])
        evaluate.run(folder, truth(tmp_path), str(tmp_path / f"m{number}"), EvaluateConfig())
        result = json.loads((tmp_path / f"m{number}" / "metrics.json").read_text())
        assert result["metrics"]["medium"]["map"] == 1.0
        assert result["protocol"]["ties"] == {"images": 3, "lists": 1, "broken_by": "name"}


def test_scores_that_rise_keep_their_ranks_and_are_told(tmp_path: Path) -> None:
    folder = rankings(tmp_path / "r", {"q": ["x", "a", "c"]}, score=[0.1, 0.1, 0.7])
    evaluate.run(folder, truth(tmp_path), str(tmp_path / "m"), EvaluateConfig())
    result = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert result["metrics"]["medium"]["map"] == pytest.approx(((0 + 1 / 2) + (1 / 2 + 2 / 3)) / 4)
    assert "scores" in result["metrics"]["medium"]["differs_in"]


def test_a_labelled_name_that_two_images_have(tmp_path: Path) -> None:
    """By ids these are two images; which of them is labelled nobody knows. One that is not labelled does not matter."""
    table = pa.table({"query": ["q"] * 4, "rank": [0, 1, 2, 3], "id": [1, 2, 3, 4], "name": ["a", "x", "x", "a"]})
    found = read_rankings(*written(tmp_path / "r", table), by_id=True)
    with pytest.raises(GroundTruthError, match=r"1 labelled names stand for several images .*'a'"):
        numbers_of(found, groundtruth.read(truth(tmp_path)))
    two = read_rankings(*written(tmp_path / "s", table[:3]), by_id=True)
    assert len(numbers_of(two, groundtruth.read(truth(tmp_path)))) == 1


# ------------------------------------------------------------------------------------------------ a set of one's own


LINES = """{"query": "p", "positive": ["a", "b"]}
{"query": "q", "positive": ["c", "d", "e"], "ignored": ["x"]}

{"query": "r", "positive": []}
"""
LISTS = {"p": ["a", "y", "b", "p"], "q": ["x", "q", "y", "c", "z", "d"], "r": ["y"]}
SCORES = [0.9, 0.8, 0.7, 0.6, 0.95, 0.9, 0.85, 0.7, 0.6, 0.5, 0.4]


def own(tmp_path: Path, text: str, name: str = "t.jsonl", k: int = 3) -> dict[str, Any]:
    (tmp_path / name).write_text(text)
    folder = rankings(tmp_path / "r", LISTS, score=SCORES)
    out = tmp_path / f"m-{name}"
    evaluate.run(folder, str(tmp_path / name), str(out), EvaluateConfig(protocol="custom", k=k))
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return result


def test_custom_worked_by_hand(tmp_path: Path) -> None:
    """k = 3; p: a y b. q: y c z, without the ignored x and its own photo; r has no positive.

    AP@3 of p: (1/1 + 2/3) / 2, of q: (1/2) / 3. Recall@3: 2/2 and 1/3.
    All pairs by score: a .9, y .85 (q), y .8 (p), then at .7 b (right, p) and c (right, q) together, z .6, y .4 (r):
    (1/1 + 2 * 3/5) / 5.
    """
    result = own(tmp_path, LINES)
    found, protocol = result["metrics"]["custom"], result["protocol"]
    assert found["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 6) / 2, abs=1e-12)
    assert found["recall@3"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["recall@1"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["micro_ap"] == pytest.approx((1 + 2 * 3 / 5) / 5, abs=1e-12)
    assert (found["num_queries"], found["num_positive"]) == (2, 5)
    assert (protocol["name"], protocol["figure"], protocol["k"]) == ("custom", "mAP@3", 3)
    rows = pacsv.read_csv(tmp_path / "m-t.jsonl" / "per_query.csv").to_pylist()
    assert [(r["query"], r["ap"], r["num_positive"]) for r in rows] == [
        ("p", pytest.approx(5 / 6), 2), ("q", pytest.approx(1 / 6), 3), ("r", None, 0)
    ]  # fmt: skip
    top = {(t["query"], t["name"]): t["verdict"] for t in pq.read_table(tmp_path / "m-t.jsonl/top.parquet").to_pylist()}
    assert (top["q", "q"], top["q", "x"], top["q", "c"], top["q", "y"]) == ("ignored", "ignored", "right", "wrong")


def test_custom_without_scores_has_no_micro_ap(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(LINES)
    evaluate.run(rankings(tmp_path / "r", LISTS), str(tmp_path / "t.jsonl"), str(tmp_path / "m"), EvaluateConfig())
    result = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert result["metrics"]["custom"]["micro_ap"] is None
    assert result["protocol"]["ties"] is None


def test_tables_say_the_same(tmp_path: Path) -> None:
    """As pairs, as Google Landmarks writes them, and by label; r, which has no positive, is in no pair."""
    pairs = "query,name,label\np,a,positive\np,b,positive\nq,c,positive\nq,d,positive\nq,e,positive\nq,x,ignored\n"
    google = "id,images,Usage\np,a b,Public\nq,c d e,Private\nr,None,Public\nleft,out,Ignored\n"
    labels = "name,label,split\n" + "".join(
        f"{n},{label},{split}\n"
        for n, label, split in [("p", 1, "query"), ("q", 2, "query"), ("r", 3, "query"), ("y", 4, "db"), ("x", 4, "db")]
        + [(n, 1, "db") for n in "ab"]
        + [(n, 2, "db") for n in "cde"]
    )
    expected = own(tmp_path, LINES)["metrics"]["custom"]
    without_r = own(tmp_path, pairs, "pairs.csv")["metrics"]["custom"]
    assert without_r["map"] == expected["map"]
    assert without_r["micro_ap"] == pytest.approx(expected["micro_ap"])  # r's pair is the last
    lines = LINES.replace(', "ignored": ["x"]', "")
    not_ignored = own(tmp_path, lines, "plain.jsonl")["metrics"]["custom"]
    assert not_ignored["map"] == pytest.approx((5 / 6 + (1 / 3) / 3) / 2)
    assert own(tmp_path, google, "google.csv")["metrics"]["custom"] == not_ignored
    assert own(tmp_path, labels, "labels.csv")["metrics"]["custom"] == not_ignored
    assert groundtruth.read(tmp_path / "t.jsonl").queries == tuple(
        groundtruth.Query(q, q, None, {"ignored": i, "positive": p})
        for q, p, i in (("p", ("a", "b"), ()), ("q", ("c", "d", "e"), ("x",)), ("r", (), ()))
    )


def test_labels_without_a_split_ask_for_each_other(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,label\n007,x\n008,x\n009,y\n")
    found = {q.name: q.labels["positive"] for q in groundtruth.read(tmp_path / "t.csv").queries}
    assert found == {"007": ("008",), "008": ("007",), "009": ()}


def test_a_table_reads_back_as_what_ingest_writes(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"query": "p", "image": "i", "positive": ["a"], "bbx": [0, 1, 2, 3.5]}')
    found = groundtruth.read(tmp_path / "t.jsonl")
    assert (found.queries[0].image, found.queries[0].box) == ("i", (0.0, 1.0, 2.0, 3.5))
    (tmp_path / "groundtruth.json").write_text(found.to_json())
    assert groundtruth.read(tmp_path) == found


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("t.jsonl", "", "holds no query"),
        ("t.jsonl", "{", "line 1: expected"),
        ("t.jsonl", "[1]", "line 1: expected"),
        ("t.jsonl", '{"query": "p"}', r"line 1: expected .*positive"),
        ("t.jsonl", '{"query": "p", "positive": "a"}', "are lists of names"),
        ("t.jsonl", '{"query": 1, "positive": ["a"]}', "query and image are names, got 1"),
        ("t.jsonl", '{"query": "p", "positive": []}\n' * 2, "query 'p' is there twice"),
        ("t.jsonl", '{"query": "p", "positive": [], "bbx": [2, 2, 1, 1]}', "corners, not width"),
        ("t.csv", "", "not a CSV file"),
        ("t.csv", "a,b\n1,2\n", "has the columns a, b; expected query,name"),
        ("t.csv", "query,name,label\np,a,maybe\n", "label 'maybe'; that of a pair is positive or ignored"),
        ("t.csv", "name,label\na,1\na,2\n", "image 'a' has two labels"),
        ("t.csv", "name,label,split\na,1,db\n", "holds no query"),
        ("t.csv", "query,name\np\n", "not a CSV file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(GroundTruthError, match=part):
        groundtruth.read(tmp_path / name)


def test_micro_ap_of_many_lists(tmp_path: Path) -> None:
    """Against one list of all pairs, made by hand for each k."""
    rng = np.random.default_rng(0)
    names = [f"d{i}" for i in range(40)]
    lists = {f"q{i}": rng.permutation(names).tolist() for i in range(6)}
    scores = {q: np.sort(rng.integers(0, 50, 40) / 8)[::-1] for q in lists}
    right = {q: set(rng.choice(names, 5, replace=False)) for q in lists}
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"query": q, "positive": sorted(right[q])}) for q in lists))
    folder = rankings(tmp_path / "r", lists, score=np.concatenate(list(scores.values())))
    found, truth = (
        read_rankings(open_folder(folder), ["r.parquet"], by_id=False),
        groundtruth.read(tmp_path / "t.jsonl"),
    )
    for k in (1, 7, 40):
        scored = score(found, truth, numbers_of(found, truth), k)["custom"]
        ordered = as_names(found)
        pairs = [(s, n in right[q]) for q in lists for s, n in list(zip(scores[q], ordered[q], strict=True))[:k]]
        total = old = 0.0
        for threshold in sorted({s for s, _ in pairs}, reverse=True):
            above = [hit for s, hit in pairs if s >= threshold]
            total += (sum(above) / 30 - old) * sum(above) / len(above)
            old = sum(above) / 30
        assert micro_ap(scored, found.scores, k) == pytest.approx(total, abs=1e-12)


def test_a_protocol_can_be_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(GroundTruthError, match=r"--protocol original: .* is a ground truth of the revisited"):
        evaluate.run(
            rankings(tmp_path / "r", {"q": ["a"]}),
            truth(tmp_path),
            str(tmp_path / "m"),
            EvaluateConfig(protocol="original"),
        )


@pytest.mark.ray
def test_the_protocol_knows_database_and_encoder(images: Path, embeddings: Path, tmp_path: Path) -> None:
    benchmark = str(embeddings / "benchmark")
    for name, database in (("alone", [benchmark]), ("more", [benchmark, str(embeddings / "distractors")])):
        search.run(database, [benchmark], str(tmp_path / "r" / name), SearchConfig())
        evaluate.run(
            str(tmp_path / "r" / name), str(images / "benchmark"), str(tmp_path / "m" / name), EvaluateConfig()
        )
        protocol = artifact.require(tmp_path / "m" / name, "evaluate")[1].info["protocol"]
        assert protocol["complete_lists"]
        assert protocol["encoder"]["size"] == 64
        assert protocol["database_rows"] == (32 + 16 if name == "more" else 32)


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


# ------------------------------------------------------------------------------------------------ other than published


def choices(rankings: Path, truth: Path, out: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What is not as published (choice: what it is here), and the protocol."""
    evaluate.run(str(rankings), str(truth), str(out), EvaluateConfig())
    result = json.loads((out / "metrics.json").read_text())
    for level in result["metrics"].values():
        assert level["differs_in"] == [d["choice"] for d in result["protocol"]["differences"]]
    return {d["choice"]: d["here"] for d in result["protocol"]["differences"]}, result["protocol"]


@pytest.mark.ray
def test_the_published_protocol_and_distractors(images: Path, embeddings: Path, tmp_path: Path) -> None:
    t, benchmark = tmp_path, str(embeddings / "benchmark")
    both = [benchmark, str(embeddings / "distractors")]
    search.run([benchmark], [benchmark], str(t / "alone"), SearchConfig())
    search.run(both, [benchmark], str(t / "among"), SearchConfig())
    found, protocol = choices(t / "alone", images / "benchmark", t / "m1")
    assert found == {}
    assert (protocol["title"], protocol["distractors"], protocol["query_crop"]) == (
        "revisited", 0, "to the ground truth's box"
    )  # fmt: skip
    found, protocol = choices(t / "among", images / "benchmark", t / "m2")
    assert found == {"distractors": "16"}
    assert protocol["title"] == "revisited among 16 distractors"
    search.run(both, [benchmark], str(t / "part"), SearchConfig(splits=("db",)))
    found, protocol = choices(t / "part", images / "benchmark", t / "m3")
    assert found == {"searched": "only rows of split db"}
    assert protocol["distractors"] is None


@pytest.mark.ray
def test_an_index_and_reranking_are_shown(images: Path, embeddings: Path, tmp_path: Path) -> None:
    t, benchmark = tmp_path, str(embeddings / "benchmark")
    build.run([benchmark], str(t / "index"), IndexConfig(factory="IVF2,Flat", shards=2))
    search.run([str(t / "index")], [benchmark], str(t / "r"), SearchConfig(nprobe=1, refine=2, k=5))
    found, _ = choices(t / "r", images / "benchmark", t / "m1")
    assert found == {
        "list depth": "the first 5 of 32, so that figures are lower bounds",
        "search": "an index, nprobe 1, refine 2, recall not recorded",
    }  # fmt: skip
    rerank.run(str(t / "r"), [str(t / "index")], [benchmark], str(t / "again"), QueryExpansion(k=2, again="list", n=5))
    found, protocol = choices(t / "again", images / "benchmark", t / "m2")
    assert found.keys() == {"list depth", "search", "re-ranking"}
    assert found["re-ranking"].startswith("qe (")
    assert "k 2" in found["re-ranking"]
    assert (protocol["query_crop"], protocol["rerank"]["k"]) == ("to the ground truth's box", 2)
    for lost in (t / "index").glob("shard-00001*"):
        lost.unlink()
    search.run([str(t / "index")], [benchmark], str(t / "p"), SearchConfig(nprobe=2, k=32, allow_partial=True))
    found, protocol = choices(t / "p", images / "benchmark", t / "m3")
    assert found["missing"] == f"{protocol['missing_rows']} rows were lost and not searched"
    assert protocol["missing_rows"] == 16


@pytest.mark.ray
def test_queries_that_were_not_cropped(
    world: Path, images: Path, encoder: Path, embeddings: Path, tmp_path: Path
) -> None:
    t = tmp_path
    ingest.run([str(world / "benchmark.tar")], str(t / "i"), ingest.IngestConfig(split="query"))
    embed.run(str(t / "i"), str(encoder), str(t / "e"), embed.EmbedConfig())
    search.run([str(embeddings / "benchmark")], [str(t / "e")], str(t / "r"), SearchConfig())
    found, protocol = choices(t / "r", images / "benchmark", t / "m")
    assert found == {"query crop": "not cropped"}
    assert protocol["lists_beside"] == 32  # each database photo asked as well
    shutil.rmtree(t / "e")
    assert choices(t / "r", images / "benchmark", t / "n")[0] == {"query crop": "unknown"}


@pytest.mark.ray
def test_the_original_protocol_among_distractors(world: Path, encoder: Path, embeddings: Path, tmp_path: Path) -> None:
    """As Oxford105k has it: distractors beside the images of the annotation, the query's own photo among the good ones."""
    t = tmp_path
    revisited = groundtruth.read(world / "groundtruth.json")
    (t / "gt").mkdir()
    for q in revisited.queries:
        box = " ".join(map(str, q.box or ()))
        (t / "gt" / f"{q.name}_query.txt").write_text(f"oxc1_{q.image} {box}")
        for label, names in {
            "good": (*q.labels["easy"], q.image),
            "ok": q.labels["hard"],
            "junk": q.labels["junk"],
        }.items():
            (t / "gt" / f"{q.name}_{label}.txt").write_text("\n".join(names))
    ingest.run([str(world / "benchmark.tar")], str(t / "i"), ingest.IngestConfig(), groundtruth_uri=str(t / "gt"))
    embed.run(str(t / "i"), str(encoder), str(t / "e"), embed.EmbedConfig())
    search.run([str(t / "e"), str(embeddings / "distractors")], [str(t / "e")], str(t / "r"), SearchConfig())
    found, protocol = choices(t / "r", t / "gt", t / "m")
    assert found == {"distractors": "16"}
    assert (protocol["name"], protocol["title"]) == ("original", "original among 16 distractors")
    assert (protocol["database_rows"], protocol["query_crop"]) == (40 + 16, "to the ground truth's box")
    rows = pq.read_table(t / "r" / "shard-00000.parquet").to_pylist()
    for row in pq.read_table(t / "m" / "per_query.parquet").to_pylist():
        q = next(q for q in revisited.queries if q.name == row["query"])
        right, junk = {*q.labels["easy"], *q.labels["hard"], q.image}, set(q.labels["junk"])
        ranked = [r["name"] for r in rows if r["query"] == row["query"] and r["name"] not in junk]
        hits, ap, last = 0, 0.0, 1.0
        for seen, name in enumerate(ranked):
            hits += name in right
            ap += (name in right) / len(right) * (last + hits / (seen + 1)) / 2
            last = hits / (seen + 1)
        assert row["ap"] == pytest.approx(ap, abs=1e-12)
        assert row["num_positive"] == len(right)


@pytest.mark.ray
def test_images_of_the_ground_truth_that_are_not_there(images: Path, embeddings: Path, tmp_path: Path) -> None:
    """Of a complete search, they count as never found, and that is shown."""
    benchmark = str(embeddings / "benchmark")
    search.run([benchmark], [benchmark], str(tmp_path / "r"), SearchConfig())
    value = json.loads((images / "benchmark" / "groundtruth.json").read_text())
    value["imlist"].append("gone")
    value["queries"][0]["easy"].append("gone")
    (tmp_path / "more.json").write_text(json.dumps(value))
    found, _ = choices(tmp_path / "r", tmp_path / "more.json", tmp_path / "m")
    assert found["database"] == "1 of them are not there and count as never found"


def test_differences_of_choices_that_others_made() -> None:
    """The published sizes are no difference; synthetic vectors, whitening on the set and an index's recall are."""
    protocol: dict[str, Any] = {
        "name": "revisited", "verified": True, "query_crop": "to the ground truth's box", "database_rows": 1_006_000,
        "list_depth": {"min": 1_006_000, "max": 1_006_000}, "lists_with_rising_scores": 0, "search": {"exact": True},
        "missing_rows": 0, "searched_part": False, "rerank": None, "whitening_set": "none", "distractors": 1_001_001,
        "synthetic_distractors": 0, "complete_lists": True, "ground_truth": {"images": 1, "images_in_lists": 1},
    }  # fmt: skip
    assert differences(protocol) == []
    changed = {
        **protocol, "synthetic_distractors": 9, "whitening_set": "the evaluated set", "searched_part": True,
        "search": {"exact": False, "nprobe": 4, "refine": 0, "recall": {"queries": 0.95, "rows": 0.9}},
    }  # fmt: skip
    assert {d["choice"]: d["here"] for d in differences(changed)} == {
        "search": "an index, nprobe 4, refine 0, recall@10 0.900", "searched": "only rows of a list",
        "whitening": "learnt on the evaluated set", "synthetic": "9 distractors are synthetic vectors",
    }  # fmt: skip
    assert differences({**protocol, "name": "original", "distractors": 100_071}) == []
    assert [d["choice"] for d in differences({**protocol, "distractors": 100_071})] == ["distractors"]
