"""Re-ranking of lists: any method, over any source of vectors.

scores, rows = index.search(xq, 1000)
source = IndexSource(index)
scores, rows = rerank(SuperGlobal(), xq, rows, source.fetch, source.search)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from iir_dist.errors import ConfigError, InputError
from iir_dist.rerank.augmentation import Augmentation
from iir_dist.rerank.diffusion import Diffusion
from iir_dist.rerank.expansion import QueryExpansion
from iir_dist.rerank.method import Method
from iir_dist.rerank.superglobal import SuperGlobal
from iir_dist.vectors import F32, I64

METHODS: tuple[type[Method], ...] = (QueryExpansion, Augmentation, Diffusion, SuperGlobal)
RerankConfig = Annotated[QueryExpansion | Augmentation | Diffusion | SuperGlobal, Field(discriminator="name")]
"""Any method, told by its `name`; for the configs of others."""
Fetch = Callable[[I64], F32]
"""Distinct database rows, ascending (m,) -> their vectors (m, d) float32."""
Search = Callable[[F32, int], tuple[F32, I64]]
"""Queries (nq, d), k -> scores and rows, (nq, at most k), best first, equal scores by row."""
FETCHED = 2**28
"""Bytes of vectors that are held at a time; those of one query, where they are more."""


def rerank(config: Method, xq: F32, rows: I64, fetch: Fetch, search: Search | None = None) -> tuple[F32, I64]:
    """Re-rank the first candidates of each list; what a query gets does not depend on the queries beside it.

    Args:
        xq: (nq, d) queries.
        rows: (nq, depth) database rows, best first, each once in a list; -1 for none.
        fetch: vectors of rows. It is called once for as many queries as `FETCHED` allows.
        search: for query expansion that searches again.

    Returns:
        scores float32 and rows int64, (nq, depth), best first, equal scores by row; row -1 and score -inf at the end where
        there are fewer. Candidates behind `config.n`, and those that the method says nothing of, follow in the order
        that they had; their scores go down in whole steps from below the others and tell no more than that order.

    Raises:
        InputError: shapes do not fit, or a row is among the first twice.
        ConfigError: the method searches again, and there is no `search`.
    """
    xq, rows = np.ascontiguousarray(xq, np.float32), np.asarray(rows, np.int64)
    if xq.ndim != 2 or rows.ndim != 2 or len(xq) != len(rows):
        raise InputError(
            f"queries of shape {xq.shape} and lists of shape {rows.shape}; expected (nq, d) and (nq, depth)"
        )
    if isinstance(config, QueryExpansion) and config.again == "search" and search is None:
        raise ConfigError("qe.again = 'search' needs a database to search in; expected one, or qe.again = 'list'")
    rows = _holes_last(rows)
    scores, out = np.full(rows.shape, -np.inf, np.float32), np.full(rows.shape, -1)
    if isinstance(config, QueryExpansion) and config.again == "search" and search is not None and rows.size:
        found_scores, found = search(expand(config, xq, rows, fetch), rows.shape[1])
        scores[:, : found.shape[1]], out[:, : found.shape[1]] = found_scores, found
        return scores, out
    for q, own, x in _candidates(rows[:, : config.taken], fetch, xq.shape[1]):
        if not len(own):
            continue
        s = config.scores(xq[q], x)
        order = np.argsort(-s, kind="stable")[: int((s > -np.inf).sum())]
        first, listed = own[order], rows[q, : config.taken]
        behind = np.concatenate([listed[~np.isin(listed, first)], rows[q, config.taken :]])
        behind = behind[behind >= 0]
        low = np.floor(s[order].min(initial=0))
        both = slice(0, len(first) + len(behind))
        out[q, both] = np.concatenate([first, behind])
        scores[q, both] = np.concatenate([s[order], low - 1 - np.arange(len(behind))])
    return scores, out


def expand(config: QueryExpansion, xq: F32, rows: I64, fetch: Fetch) -> F32:
    """The expanded queries (nq, d), of unit norm; arguments as of `rerank`."""
    expanded = np.empty_like(xq)
    for q, _, x in _candidates(_holes_last(rows)[:, : config.taken], fetch, xq.shape[1]):
        expanded[q] = config.expanded(xq[q], x)
    return expanded


def _holes_last(rows: I64) -> I64:
    if not (rows < 0).any():
        return rows
    return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)


def _candidates(rows: I64, fetch: Fetch, dim: int) -> Iterator[tuple[int, I64, F32]]:
    """(number of a query, its candidates ascending, their vectors)."""
    step = max(1, FETCHED // max(1, 4 * dim * rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        wanted = np.unique(part[part >= 0])
        x = np.asarray(fetch(wanted) if len(wanted) else np.empty((0, dim)), np.float32)
        if x.shape != (len(wanted), dim):
            raise InputError(f"vectors of shape {x.shape} for {len(wanted)} rows and queries of dimension {dim}")
        for q, listed in enumerate(part, start):
            own = np.sort(listed[listed >= 0])
            twice = own[1:][np.diff(own) == 0]
            if len(twice):
                raise InputError(f"the list of query {q} has row {twice[0]} twice; expected each row once")
            yield q, own, x[np.searchsorted(wanted, own)]
