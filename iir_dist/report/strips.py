"""The first images of each query's list, with their verdicts, the runs under each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from iir_dist.report.evaluations import Evaluation
from iir_dist.report.photos import Photos

MARKS = {"right": "✓", "wrong": "✗", "ignored": "○"}


def strips(evaluations: Sequence[Evaluation], photos: Photos, queries: int, depth: int) -> list[dict[str, Any]]:
    """Queries with the strip of each run: the best and the worst in turn, by AP of the first run.

    Args:
        queries: that are shown at most; spread evenly from the best to the worst where there are more.
        depth: images of a strip.
    """
    if not queries:
        return []
    tops = [_by_query(e.table("top.parquet")) for e in evaluations]
    levels = [next(iter(top.values()))[0]["level"] for top in tops]
    aps = [e.average_precisions(level) for e, level in zip(evaluations, levels, strict=True)]
    ranked = sorted(aps[0], key=lambda q: (-aps[0][q], q))
    picks = np.unique(np.linspace(0, len(ranked) - 1, min(queries, len(ranked))).round().astype(int))
    chosen = _in_turn([ranked[i] for i in picks])
    lists = {(i, q): top.get(q, [])[:depth] for i, top in enumerate(tops) for q in chosen}
    photos.load([(q, True) for q in chosen] + [(item["name"], False) for items in lists.values() for item in items])
    source_of = {e.label: i for i, e in enumerate(evaluations)}
    found = []
    for query in chosen:
        runs = []
        for i, e in enumerate(evaluations):
            before = None if e.source is None else tops[source_of[e.source]].get(query, [])
            places = None if before is None else {item["name"]: item["rank"] for item in before}
            runs.append(
                {
                    "label": e.label, "source": e.source, "ap": aps[i].get(query),
                    "items": [_item(item, photos, places) for item in lists[i, query]],
                }
            )  # fmt: skip
        found.append({"query": query, "photo": photos.numbers.get((query, True)), "level": levels[0], "runs": runs})
    return found


def _item(item: Mapping[str, Any], photos: Photos, before: Mapping[str, int] | None) -> dict[str, Any]:
    """An image of a strip; `moved` says how many places it came up (down where negative), "new" from behind what is kept."""
    moved: int | str | None = None
    if before is not None:
        moved = before[item["name"]] - item["rank"] if item["name"] in before else "new"
    photo = photos.numbers.get((item["name"], False))
    return {**item, "mark": MARKS[item["verdict"]], "photo": photo, "moved": moved}


def _in_turn(ranked: Sequence[str]) -> list[str]:
    """First, last, second, last but one, …

    >>> _in_turn(["a", "b", "c", "d", "e"])
    ['a', 'e', 'b', 'd', 'c']
    """
    half = (len(ranked) + 1) // 2
    pairs = zip(ranked[:half], [*ranked[: half - 1 : -1], None], strict=False)
    return [q for pair in pairs for q in pair if q is not None]


def _by_query(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["query"], []).append(dict(row))
    return found
