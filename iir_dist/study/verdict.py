"""What may be said of two arms: a paired interval of the difference of their mean AP, and one sentence that follows from it.

Two things are sampled: queries, and the seeds that networks were trained with. Both are drawn anew, each draw of one crossed
with each of the other, because AP of one query under one seed shares its luck with that query under other seeds and with
other queries under that seed. (The "pigeonhole" bootstrap of Owen, Annals of Applied Statistics 2007, arXiv:0712.1111, who
shows that it errs on the wide side; averaging over seeds first would leave out that another training gives another network.)
With two or three seeds that part is too small (a half, two thirds of the variance), and with one it is not there at all,
which the sentence then says. Queries count as independent; those of one landmark are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iir_dist.errors import MismatchError
from iir_dist.metrics import Floats

DRAWS = 10_000

AP = Mapping[int, Mapping[str, float]]
"""Average precision by seed and query."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Is `a` better than `b`? `difference` is a - b of mAP, with its 95 % interval; None with fewer than two queries."""

    question: str
    a: str
    b: str
    test: str
    level: str
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float] | None
    queries: int
    seeds: int
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def paired(a: AP, b: AP) -> Floats:
    """Differences (seeds, queries) of AP; an arm without seeds of its own (one, whatever the other has) stands beside each.

    Raises:
        MismatchError: they are not over the same queries, or over seeds that do not pair.
    """
    seeds = sorted(a.keys() | b.keys())
    one, two = (
        {s: arm.get(s, next(iter(arm.values()))) if len(arm) == 1 else arm.get(s) for s in seeds} for arm in (a, b)
    )
    queries = sorted(next(iter(a.values())))
    rows = []
    for seed in seeds:
        left, right = one[seed], two[seed]
        if left is None or right is None:
            raise MismatchError(f"seed {seed} was run for one of two arms that are compared; run it for both")
        if sorted(left) != queries or sorted(right) != queries:
            raise MismatchError("arms that are compared were evaluated over different queries; evaluate both alike")
        rows.append([left[q] - right[q] for q in queries])
    return np.array(rows)


def interval(differences: Floats, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float] | None:
    """Percentile interval (95 %) of the mean of differences (seeds, queries), both drawn with replacement."""
    seeds, queries = differences.shape
    if queries < 2:
        return None
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_queries = rng.multinomial(queries, np.full(queries, 1 / queries), draws) / queries
    means = np.einsum("ds,sq,dq->d", of_seeds, differences, of_queries, optimize=True)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def judge(question: str, a: tuple[str, AP], b: tuple[str, AP], test: str, level: str) -> Verdict:
    """The verdict of one question at one level of one test."""
    differences = paired(a[1], b[1])
    between = interval(differences)
    means = [float(np.mean([v for values in arm.values() for v in values.values()])) for arm in (a[1], b[1])]
    mean = float(differences.mean())
    said = sentence(a[0], b[0], f"{test}, {level}", mean, between, len(differences))
    return Verdict(
        question,
        a[0],
        b[0],
        test,
        level,
        means[0],
        means[1],
        mean,
        between,
        differences.shape[1],
        len(differences),
        said,
    )


def sentence(a: str, b: str, where: str, difference: float, between: tuple[float, float] | None, seeds: int) -> str:
    """What follows from the interval, and no more.

    >>> sentence("CL-FT", "CL-OTS", "wonders11, easy", 0.05, (0.02, 0.08), 3)
    'On wonders11, easy, CL-FT is better than CL-OTS by 5.0 points of mAP (95 % interval 2.0 to 8.0).'
    """
    if between is None:
        return f"On {where}, one query is too few to compare {a} with {b}."
    told = between[0] > 0 or between[1] < 0
    if told and difference > 0:
        said = f"On {where}, {a} is better than {b} by {_points(difference)} points of mAP ({_span(*between)})."
    elif told:
        low, high = -between[1], -between[0]
        said = f"On {where}, {a} is worse than {b} by {_points(-difference)} points of mAP ({_span(low, high)})."
    else:
        said = (
            f"On {where}, {a} and {b} cannot be told apart at this scale: the difference is {100 * difference:+.1f} points of "
            f"mAP, and its {_span(*between)} holds 0."
        )
    return said + (" One seed: what another training would give is not in the interval." if seeds == 1 else "")


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _span(low: float, high: float) -> str:
    return f"95 % interval {_points(low)} to {_points(high)}"
