"""Two evaluations side by side, and what must not be put side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iir_dist import compare, evaluate, metrics
from iir_dist.errors import CorruptError, InputError, MismatchError
from iir_dist.evaluate import EvaluateConfig

IMAGES = [f"d{i}" for i in range(8)]


def truth(folder: Path, queries: int = 3, name: str = "gt.json") -> str:
    """Query i: easy is image i, hard is image 7; the last query has nothing easy."""
    gnd = [
        {"bbx": [0, 0, 9, 9], "easy": [i] if i < queries - 1 else [], "hard": [7], "junk": []} for i in range(queries)
    ]
    (folder / name).write_text(json.dumps({"imlist": IMAGES, "qimlist": [f"q{i}" for i in range(queries)], "gnd": gnd}))
    return str(folder / name)


def evaluated(folder: Path, lists: list[list[int]], truth_uri: str, **settings: Any) -> str:
    """Metrics of lists of image numbers, one a query."""
    (folder / "r").mkdir(parents=True)
    rows = [(f"q{q}", rank, IMAGES[i]) for q, ranked in enumerate(lists) for rank, i in enumerate(ranked)]
    queries, ranks, names = zip(*rows, strict=True)
    pq.write_table(pa.table({"query": queries, "rank": ranks, "name": names}), folder / "r" / "r.parquet")
    evaluate.run(str(folder / "r"), truth_uri, str(folder / "m"), EvaluateConfig.model_validate(settings))
    return str(folder / "m")


def test_worked_by_hand(tmp_path: Path) -> None:
    """Easy, d7 ignored. a: q0 finds d0 first (1), q1 finds d1 second (1/4). b: both second, so 1/4 and 1/4.

    Hard, the easy one ignored. a: q0 and q1 have d7 first (1), q2 second (1/4). b: first in all.
    """
    t = truth(tmp_path)
    a = evaluated(tmp_path / "a", [[0, 7], [7, 2, 1], [0, 7]], t)
    b = evaluated(tmp_path / "b", [[7, 2, 0], [7, 2, 1], [7, 0]], t)
    found = compare.run(a, b)
    easy, medium, hard = found.levels
    assert (easy.name, medium.name, hard.name) == ("easy", "medium", "hard")
    assert (easy.a, easy.b, easy.difference) == pytest.approx((5 / 8, 1 / 4, -3 / 8))
    assert (easy.better, easy.worse, easy.equal) == (0, 1, 1)  # q2 has nothing easy and is not counted
    assert (hard.a, hard.b, hard.difference) == pytest.approx((3 / 4, 1, 1 / 4))
    assert (hard.better, hard.worse, hard.equal) == (1, 0, 2)
    assert hard.interval == pytest.approx((0, 3 / 4))  # three values 0, 0, 3/4: the mean of three draws
    assert not hard.told_apart
    assert found.figure == "mAP"
    assert found.differs == (("rankings",), ("rankings",))
    assert found.fields == ()


def test_a_run_with_itself(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", [[0, 7], [7, 2, 1], [0, 7]], truth(tmp_path))
    found = compare.run(a, a)
    assert all((v.difference, v.better, v.worse, v.interval) == (0, 0, 0, (0, 0)) for v in found.levels)
    assert found.fields == ()
    assert "protocol: no difference" in found.table()
    assert "not told apart at easy, medium, hard" in found.table()


def test_pairing_narrows_the_interval(tmp_path: Path) -> None:
    """Queries of all difficulties, of which every one is a little better in b: each interval holds the other's mean."""
    rng = np.random.default_rng(2)
    table = {}
    for run, gain in (("a", 0.0), ("b", 0.02)):
        table[run] = np.clip(np.random.default_rng(1).uniform(0, 0.9, 60) + gain + rng.normal(0, 0.01, 60), 0, 1)
    level = compare._level("easy", table["a"], table["b"], 0)
    alone = [metrics.bootstrap_interval(table[run]) for run in "ab"]
    assert alone[0][0] < table["b"].mean() < alone[0][1]
    assert level.told_apart
    assert level.interval is not None
    assert 0.015 < level.interval[0] < 0.02 < level.interval[1] < 0.025
    assert level == compare._level("easy", table["a"], table["b"], 0)
    back = compare._level("easy", table["b"], table["a"], 0)
    assert (back.better, back.worse) == (level.worse, level.better)
    assert back.difference == pytest.approx(-level.difference)


def test_fields_that_differ_are_named(tmp_path: Path) -> None:
    t = truth(tmp_path)
    a = evaluated(tmp_path / "a", [[0, 7], [7, 2, 1], [0, 7]], t)
    b = evaluated(tmp_path / "b", [[0, 7, 1], [7, 2, 1], [0, 7, 1]], t)
    fields = {f.key: (f.a, f.b) for f in compare.run(a, b).fields}
    assert fields == {"list_depth.min": (2, 3)}
    text = compare.run(a, b).table()
    assert "protocol, where it differs:\n  list_depth.min  2  |  3" in text
    assert "a is not the published protocol in: rankings" in text


def test_as_json_and_as_text(tmp_path: Path) -> None:
    t = truth(tmp_path)
    a = evaluated(tmp_path / "a", [[0, 7], [7, 2, 1], [0, 7]], t)
    b = evaluated(tmp_path / "b", [[7, 2, 0], [7, 2, 1], [7, 0]], t)
    found = compare.run(a, b)
    value = json.loads(found.to_json())
    assert [v["level"] for v in value["levels"]] == ["easy", "medium", "hard"]
    assert value["levels"][0]["worse"] == 1
    line = next(line for line in found.table().splitlines() if line.startswith("easy"))
    low, high = found.levels[0].interval or (0, 0)
    assert line.split() == [
        "easy", "0.6250", "0.2500", "-0.3750", f"{low:+.4f}", "to", f"{high:+.4f}", "0", "1", "1"
    ]  # fmt: skip


def test_one_query_has_no_interval(tmp_path: Path) -> None:
    t = truth(tmp_path, queries=1)
    a, b = evaluated(tmp_path / "a", [[1, 7]], t), evaluated(tmp_path / "b", [[7, 1]], t)
    found = compare.run(a, b)
    assert [v.name for v in found.levels] == ["medium", "hard"]  # nothing is easy
    assert found.levels[0].interval is None
    assert "  -  " in found.table()


def test_what_does_not_compare_is_refused(tmp_path: Path) -> None:
    lists = [[0, 7], [7, 2, 1], [0, 7]]
    a = evaluated(tmp_path / "a", lists, truth(tmp_path))
    other = json.loads(Path(truth(tmp_path)).read_text())
    other["gnd"][0]["easy"] = [3]
    (tmp_path / "other.json").write_text(json.dumps(other))
    b = evaluated(tmp_path / "b", lists, str(tmp_path / "other.json"))
    with pytest.raises(MismatchError, match=r"with the ground truth .*gt.json .*other.json .*; evaluate both with one"):
        compare.run(a, b)
    fewer = evaluated(tmp_path / "c", lists, truth(tmp_path, queries=2, name="fewer.json"))
    with pytest.raises(MismatchError, match="with the ground truth"):
        compare.run(a, fewer)
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"query": f"q{i}", "positive": ["d7"]}) + "\n" for i in range(3))
    )
    custom = {k: evaluated(tmp_path / f"k{k}", lists, str(tmp_path / "t.jsonl"), k=k) for k in (1, 5)}
    with pytest.raises(MismatchError, match=r"is of the revisited protocol \(mAP\), .* of the custom \(mAP@5\)"):
        compare.run(a, custom[5])
    with pytest.raises(MismatchError, match=r"\(mAP@1\), .* \(mAP@5\)"):
        compare.run(custom[1], custom[5])
    assert compare.run(custom[5], custom[5]).figure == "mAP@5"


def test_what_is_no_finished_evaluation_is_refused(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", [[0, 7], [7, 2, 1], [0, 7]], truth(tmp_path))
    with pytest.raises(InputError, match="expected the output of evaluate"):
        compare.run(a, str(tmp_path / "nothing"))
    path = Path(a) / "per_query.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        compare.run(a, a)


def test_queries_that_count_in_one_only(tmp_path: Path) -> None:
    """Of one ground truth this cannot come from `evaluate`; a manifest that was written by hand is not trusted."""
    a = compare._Evaluation(evaluated(tmp_path / "a", [[0, 7], [7, 2, 1], [0, 7]], truth(tmp_path)))
    b = compare._Evaluation(a.uri)
    del b.ap["hard"]["q1"]
    with pytest.raises(MismatchError, match=r"1 queries count in only one of .* at level hard \(first 'q1'\)"):
        compare._check(a, b)
