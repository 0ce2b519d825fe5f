"""Hard negatives: which images a round of mining looks at, and which of them become tuples. Pure functions.

As in the fine-tuning of cirtorch (Radenović et al., arXiv:1711.02512, section 3.2): in every round other queries and
another pool are drawn, all are embedded by the encoder as it is then, and a query's negatives are the nearest images
that are not of its class, one of each class at most, so that they differ from each other too. `iir_dist.mine` runs the
stages between the two.

Images are known by their numbers in `data.cache.Photos`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from iir_dist.config import StageConfig
from iir_dist.data.sampling import classes_of
from iir_dist.errors import InputError
from iir_dist.vectors import I64


class MiningConfig(StageConfig):
    """`finetune.mining`. The defaults are those of cirtorch for retrieval-SfM-120k, for each of its epochs."""

    queries: int = Field(2_000, ge=1)
    """Tuples of a round, drawn from the images whose class has another one."""
    pool: int = Field(22_000, ge=1)
    """Images that are searched beside the queries; of a smaller set, all."""
    negatives: int = Field(5, ge=1)
    """Of each query, each of another class."""
    positive: Literal["random", "hardest"] = "random"
    """A query's positive: any image of its class, or the one that is least like it of those that are searched. The
    hardest is often a wrong label, where labels are not clean."""
    exact_rows: int = Field(500_000, ge=0)
    """Up to so many images the search is exact; beyond, an index is built for it."""
    seed: int = 0
    execution: ClassVar[frozenset[str]] = frozenset()


class Miner(Protocol):
    """What fine-tuning asks for, and `iir_dist.mine.mine` does."""

    def __call__(
        self,
        images: Sequence[str],
        encoder: str,
        work: str,
        round_number: int,
        config: MiningConfig,
        *,
        without: Collection[str] = (),
    ) -> str:
        """Images artifacts, an encoder, a folder of this round and classes to leave out -> Parquet file of tuples."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one round looks at: numbers, ascending; the queries are searched too. `classes` (images of the set,) int64: a
    number for each class, -1 where there is no label."""

    queries: I64
    searched: I64
    classes: I64


def draw(names: Sequence[str], labels: Sequence[str | None], round_number: int, config: MiningConfig) -> Drawn:
    """Queries and pool of a round, by a hash of (seed, round, name): the shards and the order of the images do not count.

    Args:
        names, labels: of all images by number; images without a label are not used.

    Raises:
        InputError: fewer than two classes have two images, or there are too few classes for the negatives.
    """
    groups = classes_of(labels)
    classes = np.full(len(labels), -1, np.int64)
    for number, group in enumerate(groups.values()):
        classes[list(group)] = number
    key = f"{config.seed}:{round_number}".encode()
    order = np.argsort(np.array([_hash(name, key) for name in names], np.uint64), kind="stable")
    order = order[classes[order] >= 0]
    alone = np.bincount(classes[order])[classes[order]] == 1
    queries = order[~alone][: config.queries]
    others = order[~np.isin(order, queries)][: config.pool]
    searched = np.sort(np.concatenate([queries, others]))
    count = len(np.unique(classes[searched]))
    if count <= config.negatives:
        raise InputError(
            f"mining.negatives = {config.negatives}, each of another class, but the {len(searched)} images of a round "
            f"have {count} classes; ask for at most {count - 1}, or for a larger mining.pool"
        )
    return Drawn(np.sort(queries), searched, classes)


def _hash(name: str, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest(), "little")


def depth(drawn: Drawn, negatives: int) -> int:
    """How long a list of neighbours must be to hold that many other classes, whatever the order.

    The worst list begins with all images of the query's class and of `negatives` - 1 others, the largest there are.
    """
    sizes = np.sort(np.bincount(drawn.classes[drawn.searched]))[::-1]
    return min(len(drawn.searched), int(sizes[:negatives].sum()) + 1)


def nearest_of_other_classes(classes: I64, own: int, count: int) -> I64:
    """Positions of the first image of each of the first `count` other classes of a list of neighbours.

    Args:
        classes: (k,) class of each neighbour, nearest first.
        own: class of the query.

    >>> nearest_of_other_classes(np.array([7, 3, 3, 7, 5, 3, 9]), own=7, count=2)
    array([1, 4])
    """
    others = np.flatnonzero(classes != own)
    _, first = np.unique(classes[others], return_index=True)
    return others[np.sort(first)[:count]]


def random_positives(drawn: Drawn, round_number: int, seed: int) -> I64:
    """(queries,) any other image of each query's class, whether it is searched or not."""
    order = np.argsort(drawn.classes, kind="stable")
    sizes = np.bincount(drawn.classes + 1)  # the first are those without a label
    starts = np.cumsum(sizes) - sizes
    found = []
    for query in drawn.queries:
        own = drawn.classes[query] + 1
        members = order[starts[own] : starts[own] + sizes[own]]
        found.append(np.random.default_rng([seed, round_number, query]).choice(members[members != query]))
    return np.array(found, np.int64)
