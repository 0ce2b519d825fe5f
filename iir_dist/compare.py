"""Two evaluations side by side: the difference of each figure over the same queries, and what else was different.

Queries are paired, because a hard query is hard for both runs: the interval of the mean difference is far narrower than
two intervals side by side would suggest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from iir_dist import artifact, metrics
from iir_dist.artifact import InputRef
from iir_dist.errors import MismatchError
from iir_dist.metrics import Floats

EQUAL = 1e-9
"""Average precisions that are this close are equal."""
SHOWN = 48
"""Characters of a value in the table."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level: mAP of both, mean difference b - a with its 95 % interval, and for how many queries b is better."""

    name: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None
    better: int
    worse: int
    equal: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, slots=True)
class Field:
    """A dotted key of the protocol that is not the same in both; None where one has no such key."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """Evaluations `a` and `b`. `differs` says for each of the two which choices are not those of the published protocol."""

    a: str
    b: str
    figure: str
    levels: tuple[Level, ...]
    fields: tuple[Field, ...]
    differs: tuple[tuple[str, ...], tuple[str, ...]]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(
            {
                "a": self.a, "b": self.b, "figure": self.figure,
                "levels": [
                    {
                        "level": v.name, "a": v.a, "b": v.b, "difference": v.difference, "interval": v.interval,
                        "better": v.better, "worse": v.worse, "equal": v.equal,
                    }
                    for v in self.levels
                ],
                "fields": [{"key": f.key, "a": f.a, "b": f.b} for f in self.fields],
                "not_as_published": {"a": self.differs[0], "b": self.differs[1]},
            },
            indent=2,
        )  # fmt: skip

    def table(self) -> str:
        """For a terminal: the levels, then the fields of the protocol that differ."""
        lines = [f"a: {self.a}", f"b: {self.b}", ""]
        lines.append(
            f"{'level':<9} {self.figure + ' a':>10} {self.figure + ' b':>10} {'b - a':>8}  {'95 % interval':<19} "
            f"{'better':>6} {'worse':>6} {'equal':>6}"
        )
        for v in self.levels:
            between = "-" if v.interval is None else f"{v.interval[0]:+.4f} to {v.interval[1]:+.4f}"
            lines.append(
                f"{v.name:<9} {v.a:>10.4f} {v.b:>10.4f} {v.difference:>+8.4f}  {between:<19} {v.better:>6} {v.worse:>6} "
                f"{v.equal:>6}"
            )
        unclear = [v.name for v in self.levels if not v.told_apart]
        if unclear:
            lines.append(f"not told apart at {', '.join(unclear)}: the interval holds 0")
        for name, choices in zip("ab", self.differs, strict=True):
            if choices:
                lines.append(f"{name} is not the published protocol in: {', '.join(choices)}")
        lines += ["", "protocol: no difference" if not self.fields else "protocol, where it differs:"]
        width = max((len(f.key) for f in self.fields), default=0)
        lines += [f"  {f.key:<{width}}  {_short(f.a)}  |  {_short(f.b)}" for f in self.fields]
        return "\n".join(lines)


def run(a: str, b: str, *, seed: int = 0) -> Comparison:
    """Compare two metrics folders.

    Args:
        a, b: addresses of what `evaluate` wrote.
        seed: of the bootstrap over queries.

    Raises:
        InputError: one is not a finished evaluation.
        MismatchError: they are of different ground truths, protocols, figures or queries.
        CorruptError: a file is not the one that was written.
    """
    one, two = _Evaluation(a), _Evaluation(b)
    _check(one, two)
    levels = []
    for level, ap in one.ap.items():
        if not ap:  # no query has a positive at this level
            continue
        left, right = (np.array([e.ap[level][q] for q in ap]) for e in (one, two))
        levels.append(_level(level, left, right, seed))
    fields = tuple(_fields(one.protocol, two.protocol))
    published = [tuple(d["choice"] for d in e.protocol["differences"]) for e in (one, two)]
    return Comparison(a, b, one.protocol["figure"], tuple(levels), fields, (published[0], published[1]))


def _level(name: str, a: Floats, b: Floats, seed: int) -> Level:
    difference = b - a
    low, high = metrics.bootstrap_interval(difference, seed=seed)
    better, worse = int((difference > EQUAL).sum()), int((difference < -EQUAL).sum())
    return Level(
        name, float(a.mean()), float(b.mean()), float(difference.mean()), None if np.isnan(low) else (low, high),
        better, worse, len(a) - better - worse,
    )  # fmt: skip


class _Evaluation:
    """One metrics folder: its protocol, its ground truth, and the AP of the queries that count, by level and name."""

    def __init__(self, uri: str) -> None:
        folder, manifest = artifact.require(uri, "evaluate")
        for name in ("metrics.json", "per_query.parquet"):
            artifact.check_file(folder, name, manifest.files[name])
        self.uri = uri
        self.truth: InputRef = manifest.inputs["groundtruth"]
        self.protocol: dict[str, Any] = json.loads(folder.read("metrics.json"))["protocol"]
        table = pq.read_table(io.BytesIO(folder.read("per_query.parquet")), columns=["query", "level", "ap"])
        self.ap: dict[str, dict[str, float]] = {level: {} for level in self.protocol["levels"]}
        for row in table.to_pylist():
            if row["ap"] is not None:
                self.ap[row["level"]][row["query"]] = row["ap"]


def _check(a: _Evaluation, b: _Evaluation) -> None:
    remedy = "evaluate both with one ground truth and one protocol"
    for what in ("name", "figure"):
        if a.protocol[what] != b.protocol[what]:
            raise MismatchError(
                f"{a.uri} is of the {a.protocol['name']} protocol ({a.protocol['figure']}), {b.uri} of the "
                f"{b.protocol['name']} ({b.protocol['figure']}); {remedy}"
            )
    if a.truth.fingerprint != b.truth.fingerprint:
        raise MismatchError(
            f"{a.uri} was evaluated with the ground truth {a.truth.uri} ({a.truth.fingerprint[:12]}), {b.uri} with "
            f"{b.truth.uri} ({b.truth.fingerprint[:12]}); {remedy}"
        )
    for level, ap in a.ap.items():
        alone = sorted(ap.keys() ^ b.ap.get(level, {}).keys())
        if alone:
            raise MismatchError(
                f"{len(alone)} queries count in only one of {a.uri} and {b.uri} at level {level} (first {alone[0]!r}); "
                f"{remedy}"
            )


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Field]:
    left, right = _flat(a), _flat(b)
    for key in dict.fromkeys([*left, *right]):
        # Said in words what other fields say, and shown apart.
        if left.get(key) != right.get(key) and key not in ("differences", "title"):
            yield Field(key, left.get(key), right.get(key))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {prefix + key: inner}
    return found


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
