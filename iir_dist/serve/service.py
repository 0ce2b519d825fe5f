"""From a query to an answer; needs no HTTP, and is what the benchmark calls in process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np

from iir_dist import session
from iir_dist.data.images import Box
from iir_dist.errors import ConfigError, InputError, NotFoundError
from iir_dist.index.points import K
from iir_dist.rerank.interface import METHODS, rerank
from iir_dist.rerank.method import Method
from iir_dist.serve.batches import Batches
from iir_dist.serve.config import ServeConfig
from iir_dist.serve.embedding import Embedding
from iir_dist.serve.photos import read_heic
from iir_dist.serve.schema import Answer, Asked, Hit, IndexInfo, Limits, PointInfo, Reference, Settings, Used
from iir_dist.serve.version import Live, Mask, Version
from iir_dist.vectors import F32, I64, normalize

RERANKERS: dict[str, type[Method]] = {str(method.model_fields["name"].default): method for method in METHODS}
STEPS = ("queue", "decode", "embed", "coarse", "scan", "refine", "rerank")
SEARCHES = 64
"""Queries that are searched for together, at most."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one search does: settings of `Index.search`, resolved."""

    nprobe: int
    refine: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """One query that waits to be searched for; those of equal `group` are searched together."""

    version: Version
    xq: F32
    k: int
    point: Point
    mask: Mask | None

    @property
    def group(self) -> tuple[int, int, Point, int]:
        """Equal for what one call of `Index.search` can answer."""
        return id(self.version), self.k, self.point, id(self.mask)


Found = tuple[F32, I64, dict[str, float]]
"""Scores (1, k), rows (1, k), and seconds by step."""


class Service:
    """A live index, and the encoder that made it where there is one.

    Raises:
        MismatchError: the encoder is not the index's.
        InputError, CorruptError: something is not there, or not as it was written.
    """

    def __init__(self, index: str, config: ServeConfig, images: Sequence[str] = (), encoder: str | None = None) -> None:
        read_heic()
        self.config = config
        self.threads = config.threads or session.cpu_count()
        self.embedding = None
        if encoder is not None:
            self.embedding = Embedding(encoder, self.threads, config.batch, config.max_megapixels)
        fingerprint = self.embedding.fingerprint if self.embedding else None
        small = int(config.thumbnails_mb * 2**20)
        self.live = Live(index, fingerprint, images, self.threads, small, config.poll_sec)
        self._searching: Batches[Wanted, Found] = Batches("search", _search, SEARCHES)

    @property
    def waiting(self) -> int:
        """Queries that wait for the network or for the index."""
        return self._searching.waiting + (self.embedding.waiting if self.embedding else 0)

    def close(self) -> None:
        """Stop all threads."""
        self._searching.close()
        if self.embedding:
            self.embedding.close()
        self.live.close()

    # -------------------------------------------------------------------------------------------- search

    def by_photo(self, data: bytes, settings: Settings) -> Answer:
        """Search with a photo.

        Raises:
            ImageError: it cannot be used. ConfigError, InputError: the settings do not fit the index.
        """
        start = time.perf_counter()
        with self.live.using() as version:
            point, (mask, rows) = (
                _point(version, settings, self.config),
                version.allowed(settings.splits, settings.prefix),
            )
            embedded = self._embedding()(data, _box(settings))
            asked = Asked(kind="photo", width=embedded.size[0], height=embedded.size[1], box=settings.box)
            return self._answer(version, embedded.vector, settings, point, mask, rows, asked, embedded.seconds, start)

    def by_reference(self, query: Reference) -> Answer:
        """Search with a stored photo or a vector. Raises as `by_photo`, and `NotFoundError`."""
        start = time.perf_counter()
        with self.live.using() as version:
            point, (mask, rows) = _point(version, query, self.config), version.allowed(query.splits, query.prefix)
            seconds: dict[str, float] = {}
            if query.vector is not None:
                xq = np.array([query.vector], np.float32)
                norm = float(np.linalg.norm(xq.astype(np.float64)))
                if xq.shape[1] != version.index.dim or not np.isfinite(norm) or norm < 1e-6:
                    raise InputError(
                        f"a vector of {xq.shape[1]} numbers and norm {norm:.3g}; expected {version.index.dim} finite ones "
                        "that are not all 0"
                    )
                xq, asked = normalize(xq), Asked(kind="vector")
            else:
                row = version.row(cast(int | str, query.id if query.name is None else query.name))
                width, height = version.photos.size(row) or (None, None)
                asked = Asked(
                    kind="stored", id=int(version.ids[row]), name=str(version.names["name"][row]), width=width,
                    height=height, box=query.box,
                )  # fmt: skip
                if query.box is None:
                    xq = version.vector(row)
                else:
                    embedded = self._embedding()(version.photos.read(row), _box(query))
                    xq, seconds = embedded.vector, embedded.seconds
            return self._answer(version, xq, query, point, mask, rows, asked, seconds, start)

    def _embedding(self) -> Embedding:
        if self.embedding is None:
            raise InputError(
                "photos cannot be embedded here; start with --encoder ENCODER, the one that made the index"
            )
        return self.embedding

    def _answer(
        self, version: Version, xq: F32, settings: Settings, point: Point, mask: Mask | None, rows: int, asked: Asked,
        seconds: dict[str, float], start: float,
    ) -> Answer:  # fmt: skip
        method = settings.rerank and RERANKERS[settings.rerank](n=settings.depth)
        depth = max(1, min(max(settings.k, settings.depth if method else 0), rows))

        def search(queries: F32, k: int) -> tuple[F32, I64]:
            done = self._searching(Wanted(version, queries, k, point, mask))
            scores, found, steps = done.result
            for step, spent in {"queue": done.waited, **steps}.items():
                seconds[step] = seconds.get(step, 0.0) + spent
            return scores, found

        scores, found = search(xq, depth)
        if method:
            began, before = time.perf_counter(), sum(seconds.values())
            scores, found = rerank(method, xq, found, version.vectors.fetch, search)
            seconds["rerank"] = time.perf_counter() - began - (sum(seconds.values()) - before)  # without its search
        kept = found[0] >= 0
        hits = [
            _hit(version, rank, row, score)
            for rank, (row, score) in enumerate(
                zip(found[0][kept][: settings.k].tolist(), scores[0][kept][: settings.k].tolist(), strict=True)
            )
        ]
        measured = {} if mask is not None or method or version.stale else _recall(version, point)
        used = Used(
            nprobe=None if point.exact else point.nprobe, refine=None if point.exact else point.refine,
            exact=point.exact, rerank=settings.rerank, rows=rows, recall=measured,
        )  # fmt: skip
        steps = {step: round(1e3 * seconds[step], 3) for step in STEPS if step in seconds}
        total = round(1e3 * (time.perf_counter() - start), 3)
        return Answer(index=version.fingerprint, query=asked, used=used, steps_ms=steps, total_ms=total, hits=hits)

    # -------------------------------------------------------------------------------------------- what is there

    def info(self) -> IndexInfo:
        """The version that is searched now."""
        with self.live.using() as version:
            manifest, points = version.manifest, version.points
            return IndexInfo(
                name=PurePosixPath(self.live.folder.uri.rstrip("/")).name, fingerprint=version.fingerprint,
                created=manifest.created, rows=version.rows, dim=version.index.dim, factory=manifest.info["factory"],
                shards=len(version.index.shards), splits=version.splits,
                encoder=self.embedding.spec.backbone if self.embedding else None, photos=version.photos.count,
                exact=version.rows <= self.config.exact_rows,
                default={"nprobe": int(manifest.info["nprobe"]), "refine": int(manifest.info["refine"])},
                points=[
                    PointInfo(
                        nprobe=p.nprobe, refine=p.refine, latency_ms=p.latency_ms.p50,
                        recall={kind: recall[K] for kind, recall in p.recall.items()},
                    )
                    for p in (points.points if points else [])
                ],
                points_stale=version.stale, rerankers=list(RERANKERS),
                limits=Limits(
                    upload_bytes=int(self.config.upload_mb * 2**20), max_megapixels=self.config.max_megapixels,
                    exact_rows=self.config.exact_rows,
                ),
                trouble=self.live.trouble,
            )  # fmt: skip

    def sample(self, count: int, seed: int) -> list[Hit]:
        """Stored photos to begin with, another choice for each seed; rows without photos where none is stored."""
        with self.live.using() as version:
            rows = version.photos.rows
            rows = rows[version.alive[rows]] if len(rows) else np.flatnonzero(version.alive)
            chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
            return [_hit(version, rank, row, 0.0) for rank, row in enumerate(chosen.tolist())]

    def hit(self, image: int) -> Hit:
        """What is known of a stored photo. Raises `NotFoundError`."""
        with self.live.using() as version:
            return _hit(version, 0, version.row(image), 0.0)

    def original(self, image: int) -> tuple[bytes, str]:
        """The stored file of an id, and the version. Raises `NotFoundError`, `CorruptError`."""
        with self.live.using() as version:
            return version.photos.read(version.row(image)), version.fingerprint

    def thumbnail(self, image: int, side: int) -> tuple[bytes, str]:
        """A small JPEG of an id, and the version. Raises as `original`, and `ImageError`."""
        with self.live.using() as version:
            return version.photos.small(version.row(image), side), version.fingerprint


def _search(batch: Sequence[Wanted]) -> list[Found | Exception]:
    """One call of the index for each group of queries; runs in one thread, so that the clock is its own."""
    out: list[Found | Exception] = [NotFoundError("not searched")] * len(batch)
    groups: dict[Any, list[int]] = {}
    for number, wanted in enumerate(batch):
        groups.setdefault(wanted.group, []).append(number)
    for numbers in groups.values():
        first = batch[numbers[0]]
        version, point, mask = first.version, first.point, first.mask
        refine = point.refine
        if point.exact:  # few enough allowed rows are compared exactly, wherever they lie
            mask = version.alive if mask is None else mask
            refine = -(-version.index.num_rows // first.k)
        try:
            version.clock.lap()
            start = time.perf_counter()
            xq = np.concatenate([batch[n].xq for n in numbers])
            scores, rows = version.index.search(xq, first.k, point.nprobe, refine, mask)
            spent = time.perf_counter() - start
            steps = version.clock.lap()
            steps["coarse"] = max(0.0, spent - sum(steps.values()))  # and the choice of the best
            for place, number in enumerate(numbers):
                out[number] = scores[place : place + 1], rows[place : place + 1], dict(steps)
        except Exception as error:  # of this group alone
            for number in numbers:
                out[number] = error
    return out


def _point(version: Version, settings: Settings, config: ServeConfig) -> Point:
    """Raises `ConfigError`: there is no such point, or too many rows for an exact search."""
    info = version.manifest.info
    if settings.exact:
        if version.rows > config.exact_rows:
            raise ConfigError(f"exact: the index has {version.rows} rows; expected at most {config.exact_rows}")
        return Point(1, 0, True)
    if settings.recall is not None:
        if version.points is None:
            raise ConfigError("recall: the operating points of the index were never measured; give nprobe and refine")
        reached = version.points.reaching(settings.recall)
        return Point(reached.nprobe, reached.refine, False)
    nprobe = int(info["nprobe"]) if settings.nprobe is None else settings.nprobe
    if nprobe > version.index.nlist:
        raise ConfigError(f"nprobe = {nprobe}: the index has {version.index.nlist} lists; expected at most that")
    return Point(nprobe, int(info["refine"]) if settings.refine is None else settings.refine, False)


def _recall(version: Version, point: Point) -> dict[str, float]:
    if point.exact:
        return {}
    points = version.points.points if version.points else []
    return next(
        (
            {kind: r[K] for kind, r in p.recall.items()}
            for p in points
            if (p.nprobe, p.refine) == (point.nprobe, point.refine)
        ),
        {},
    )


def _box(settings: Settings) -> Box | None:
    return None if settings.box is None else cast(Box, tuple(settings.box))


def _hit(version: Version, rank: int, row: int, score: float) -> Hit:
    width, height = version.photos.size(row) or (None, None)
    split = version.names["split"][row].as_py()
    name = version.names["name"][row].as_py()
    return Hit(rank=rank, id=int(version.ids[row]), name=name, split=split, score=score, width=width, height=height)
