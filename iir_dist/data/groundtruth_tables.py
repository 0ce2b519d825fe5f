"""Ground truth of a set of one's own as a table: positives by query, by pair, or by label.

`.jsonl`, a query a line: {"query": "q1", "positive": ["a", "b"], "ignored": ["c"], "image": "q1", "bbx": [x1, y1, x2, y2]};
all but `query` and `positive` may be left out.

`.csv`, known by its header:

    query,name[,label]      a pair a line; label is positive (also where there is no such column) or ignored
    name,label[,split]      the positives of a query are the images of its label; split `query` marks the queries, which
                            are then not in the database, any other value a database image. Without that column
                            every image asks for the others of its label
    id,images[,Usage]       as Google Landmarks has it: images are parted by spaces, `None` is none, Usage `Ignored`
                            leaves the line out
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pacsv

from iir_dist.errors import GroundTruthError

ENDINGS = (".csv", ".jsonl")
HEADERS = "query,name[,label], name,label[,split] or id,images[,Usage]"


class Line(NamedTuple):
    """One query as a table says it."""

    query: str
    image: str
    positive: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    box: Any = None


def parse(data: bytes, where: str) -> list[Line]:
    """The queries of a `.csv` or `.jsonl` file.

    Raises:
        GroundTruthError: it is none of these, a query is there twice, or nothing asks.
    """
    lines = _from_jsonl(data, where) if where.endswith(".jsonl") else _from_csv(data, where)
    if not lines:
        raise GroundTruthError(f"{where} holds no query; expected one or more")
    names = set()
    for line in lines:
        if line.query in names:
            raise GroundTruthError(f"{where}: query {line.query!r} is there twice; expected all of it in one place")
        names.add(line.query)
    return lines


def _from_jsonl(data: bytes, where: str) -> list[Line]:
    lines = []
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
            query, positive, ignored = value["query"], value["positive"], value.get("ignored", [])
            image = value.get("image", query)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GroundTruthError(
                f'{where}, line {number}: expected {{"query": "…", "positive": ["…"]}} ({error!r})'
            ) from error
        if not all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v in (positive, ignored)):
            raise GroundTruthError(f"{where}, line {number}: positive and ignored are lists of names")
        if not (isinstance(query, str) and isinstance(image, str)):
            raise GroundTruthError(f"{where}, line {number}: query and image are names, got {query!r} and {image!r}")
        lines.append(Line(query, image, tuple(positive), tuple(ignored), value.get("bbx")))
    return lines


def _from_csv(data: bytes, where: str) -> list[Line]:
    # Every column is text, or a name like 0012 would become the number 12.
    header = data.split(b"\n", 1)[0].decode("utf-8-sig", "replace").strip().replace('"', "").split(",")
    options = pacsv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
    try:
        table = pacsv.read_csv(io.BytesIO(data), convert_options=options)
    except pa.ArrowInvalid as error:
        raise GroundTruthError(f"{where} is not a CSV file with a header ({error})") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if {"query", "name"} <= columns.keys():
        return _pairs(columns, where)
    if {"name", "label"} <= columns.keys():
        return _labels(columns, where)
    if {"id", "images"} <= columns.keys():
        usage = columns.get("Usage") or [""] * len(table)
        lists = zip(columns["id"], columns["images"], usage, strict=True)
        return [Line(q, q, tuple(n for n in names.split() if n != "None")) for q, names, u in lists if u != "Ignored"]
    raise GroundTruthError(f"{where} has the columns {', '.join(columns)}; expected {HEADERS}")


def _pairs(columns: Mapping[str, Sequence[str]], where: str) -> list[Line]:
    labels = columns.get("label") or ["positive"] * len(columns["query"])
    unknown = sorted(set(labels) - {"positive", "ignored"})
    if unknown:
        raise GroundTruthError(f"{where}: label {unknown[0]!r}; that of a pair is positive or ignored")
    found: dict[str, dict[str, list[str]]] = {}
    for query, name, label in zip(columns["query"], columns["name"], labels, strict=True):
        found.setdefault(query, {"positive": [], "ignored": []})[label].append(name)
    return [Line(q, q, tuple(names["positive"]), tuple(names["ignored"])) for q, names in found.items()]


def _labels(columns: Mapping[str, Sequence[str]], where: str) -> list[Line]:
    names, labels, splits = columns["name"], columns["label"], columns.get("split")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise GroundTruthError(f"{where}: image {twice!r} has two labels; expected each image once")
    by_label: dict[str, list[str]] = {}
    for name, label, split in zip(names, labels, splits or [""] * len(names), strict=True):
        if split != "query":
            by_label.setdefault(label, []).append(name)
    if splits is not None:
        groups = {label: tuple(members) for label, members in by_label.items()}
        asking = (t for t in zip(names, labels, splits, strict=True) if t[2] == "query")
        return [Line(name, name, groups.get(label, ())) for name, label, _ in asking]
    return [Line(name, name, _others(by_label[label], name)) for name, label in zip(names, labels, strict=True)]


def _others(names: Iterable[str], own: str) -> tuple[str, ...]:
    return tuple(n for n in names if n != own)
