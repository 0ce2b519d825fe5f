"""One published version of an index, opened and checked; and `Live`, which holds the newest."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from iir_dist import artifact
from iir_dist.artifact import Manifest, read_manifest
from iir_dist.errors import ConfigError, IirError, InputError, MismatchError, NotFoundError, UnreachableError
from iir_dist.evaluate.lineage import ancestors
from iir_dist.index.engine import Index, Shards
from iir_dist.index.engine import Live as Counts
from iir_dist.index.merge import Lists
from iir_dist.index.points import OperatingPoints, read_points, stale
from iir_dist.index.search import allowed_rows
from iir_dist.index.shard import Bits, Visit, shards_of
from iir_dist.rerank.sources import IndexSource
from iir_dist.serve.photos import Photos
from iir_dist.storage import Folder, open_folder
from iir_dist.vectors import F32, I64

log = logging.getLogger(__name__)

FILTERS = 16
"""Sets of allowed rows that are kept."""
Mask = npt.NDArray[np.bool_]


class Clocked:
    """Shards that say how long they were scanned and rescored.

    A search uses several threads: what counts is the one that was at it longest, which is about what a clock shows.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards, self.threads = shards, shards.threads
        self._spent: dict[str, dict[int, float]] = {}
        self._lock = threading.Lock()

    def lap(self) -> dict[str, float]:
        """Seconds by step since the last call."""
        with self._lock:
            spent, self._spent = self._spent, {}
        return {step: max(by_thread.values()) for step, by_thread in spent.items()}

    def open(self, numbers: Iterable[int], vectors: bool) -> None:
        """As `engine.Backend`."""
        self._shards.open(numbers, vectors)

    def scan(self, visit: Visit, k: int, live: Counts, allowed: Bits, alone: bool) -> Lists:
        """As `engine.Backend`."""
        with self._clock("scan"):
            return self._shards.scan(visit, k, live, allowed, alone)

    def rescore(self, xq: F32, rows: I64, numbers: Iterable[int]) -> F32:
        """As `engine.Backend`."""
        with self._clock("refine"):
            return self._shards.rescore(xq, rows, numbers)

    def close(self) -> None:
        """As `engine.Backend`."""
        self._shards.close()

    @contextlib.contextmanager
    def _clock(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent, thread = time.perf_counter() - start, threading.get_ident()
            with self._lock:
                by_thread = self._spent.setdefault(step, {})
                by_thread[thread] = by_thread.get(thread, 0.0) + spent


class Version:
    """An index as one manifest describes it: shards mapped, names, operating points, photos.

    Every file was checked when it was opened, and stays mapped; what is done to the folder later changes nothing here.

    Args:
        encoder: fingerprint of the encoder that queries are embedded with; None where none is.

    Raises:
        MismatchError: the index was made by another encoder.
        CorruptError: a file is missing or not the one that was written.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        encoder: str | None,
        images: Sequence[str],
        threads: int,
        thumbnail_bytes: int,
    ) -> None:
        made_by = manifest.info.get("encoder_fingerprint")
        if encoder is not None and made_by is not None and encoder != made_by:
            raise MismatchError(
                f"{folder.uri} holds vectors of encoder {made_by[:12]}, photos would be embedded with {encoder[:12]}; give "
                "the encoder that the index was made with"
            )
        self.folder, self.manifest = folder, manifest
        infos = shards_of(folder, manifest)
        self.clock = Clocked(Shards(folder, infos, int(manifest.info["dim"]), manifest.files, threads))
        self.index = Index(folder, manifest, self.clock, verify=True)
        with contextlib.ExitStack() as failed:
            failed.callback(self.index.close)
            self.names = self.index.names
            self.alive = self.index.alive
            self.ids: I64 = self.names["id"].to_numpy()
            self._order: I64 = np.argsort(self.ids, kind="stable")
            self.vectors = IndexSource(self.index)
            self.vectors.open(codes=False)
            self.points: OperatingPoints | None = None
            with contextlib.suppress(ConfigError):  # never measured
                self.points = read_points(folder, manifest)
            self.stale = stale(manifest)
            sources = [artifact.require(uri, "ingest") for uri in images]
            _check_origin(manifest, sources)
            self.photos = Photos(sources, self.names, thumbnail_bytes, threads)
            counts = pc.value_counts(self.names["split"].filter(self.alive)).to_pylist()
            self.splits = {str(c["values"]): int(c["counts"]) for c in counts if c["values"] is not None}
            failed.pop_all()
        self.rows = int(self.alive.sum())
        self._filters: OrderedDict[tuple[tuple[str, ...], str], tuple[Mask, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.users, self.retired = 0, False

    @property
    def fingerprint(self) -> str:
        """Of the manifest."""
        return self.manifest.fingerprint

    def row(self, image: int | str) -> int:
        """The row of an id or a name. Raises `NotFoundError`."""
        rows: list[int]
        if isinstance(image, int):
            at = np.searchsorted(self.ids, image, sorter=self._order)
            rows = [int(self._order[at])] if at < len(self.ids) and self.ids[self._order[at]] == image else []
        else:
            rows = np.flatnonzero(pc.equal(self.names["name"], image).to_numpy() & self.alive).tolist()
        if not rows or not self.alive[rows[0]]:
            what = f"id {image}" if isinstance(image, int) else f"name {image[:100]!r}"
            raise NotFoundError(f"the index has no {what}")
        return rows[0]

    def vector(self, row: int) -> F32:
        """(1, d) of a row."""
        return self.vectors.fetch(np.array([row]))

    def allowed(self, splits: Sequence[str], prefix: str) -> tuple[Mask | None, int]:
        """The rows to search in, None for all, and how many they are.

        Raises:
            InputError: there is no such split, or no row is left.
        """
        if not splits and not prefix:
            return None, self.rows
        key = (tuple(sorted(set(splits))), prefix)
        with self._lock:
            if key in self._filters:
                self._filters.move_to_end(key)
                return self._filters[key]
        mask = allowed_rows(self.names, key[0], None, "the index")
        mask = self.alive if mask is None else mask & self.alive
        if prefix:
            mask = mask & pc.starts_with(self.names["name"], prefix).to_numpy(zero_copy_only=False)
        count = int(mask.sum())
        if not count:
            raise InputError(f"no row of the index has a name that begins with {prefix!r} and is of these splits")
        with self._lock:
            self._filters[key] = (mask, count)
            while len(self._filters) > FILTERS:
                self._filters.popitem(last=False)
        return mask, count

    def close(self) -> None:
        """Let go of threads; maps close when nothing refers to them any more."""
        self.index.close()


def _check_origin(index: Manifest, sources: Sequence[tuple[Folder, Manifest]]) -> None:
    """Say so where photos are not those that were embedded, as far as that is known; they are matched by name alone."""
    known, gone = ancestors(index)
    for folder, manifest in sources:
        if not gone and manifest.fingerprint not in known:
            log.warning(
                "serve: the index was not made from %s as it is now; names that both have are taken for the same photo",
                folder.uri,
            )


class Live:
    """The newest version of an index that can be opened; a search keeps the one that it began with.

    Args:
        encoder, images, threads, thumbnail_bytes: as of `Version`.
        poll_sec: after which the manifest is read again.
    """

    def __init__(
        self, uri: str, encoder: str | None, images: Sequence[str], threads: int, thumbnail_bytes: int, poll_sec: float
    ) -> None:
        self.folder = open_folder(uri)
        self._arguments = (encoder, list(images), threads, thumbnail_bytes)
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self.trouble: str | None = None
        """Why the version that is there now could not be opened."""
        self.reloads = 0
        self.current = self._open()
        self._refused: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(poll_sec,), name="iir-reload", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def using(self) -> Iterator[Version]:
        """The newest version; it stays open for the length of the block."""
        with self._lock:
            version = self.current
            version.users += 1
        try:
            yield version
        finally:
            with self._lock:
                version.users -= 1
                over = version.retired and not version.users
            if over:
                version.close()

    def refresh(self) -> bool:
        """Open what is published now, if it is another version; whether it took over."""
        with self._loading:
            try:
                manifest = read_manifest(self.folder)
                if manifest is None or manifest == self.current.manifest:
                    self._refused = self.trouble = None
                    return False
                if manifest.model_dump_json() == self._refused:
                    return False
                self._refused = manifest.model_dump_json()  # not tried again until it is another one
                version = self._open()
            except IirError as error:
                if isinstance(error, UnreachableError):  # of the store, not of the version
                    self._refused = None
                self.trouble = str(error)
                log.warning("serve: the version of before goes on: %s", error)
                return False
            self._refused, self.trouble = None, None
            with self._lock:
                before, self.current = self.current, version
                before.retired = True
                over = not before.users
            if over:
                before.close()
            self.reloads += 1
            log.info("serve: index %s, %d rows, took over", version.fingerprint[:12], version.rows)
            return True

    def close(self) -> None:
        """Stop watching, and close."""
        self._stop.set()
        self._thread.join()
        self.current.close()

    def _open(self) -> Version:
        folder, manifest = artifact.require(self.folder.uri, "index")
        return Version(folder, manifest, *self._arguments)

    def _watch(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                self.refresh()
            except Exception:  # the watcher must outlive whatever a file system comes up with
                log.exception("serve: the index could not be looked at")
