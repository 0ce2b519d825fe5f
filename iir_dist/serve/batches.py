"""One thread that answers together what waits together.

Nothing waits for company: while a batch is computed the next one gathers. A lone query has no delay, and under load
batches grow by themselves.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """A result, and the seconds that it waited and that its batch took."""

    result: R
    waited: float
    worked: float


class Batches(Generic[T, R]):
    """Calls `work` with up to `most` waiting items; a result that is an exception is raised for its item alone."""

    def __init__(self, name: str, work: Callable[[Sequence[T]], Sequence[R | Exception]], most: int) -> None:
        self._work, self._most = work, most
        self._waiting: queue.SimpleQueue[tuple[T, Future[Done[R]], float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"iir-{name}", daemon=True)
        self._thread.start()

    def __call__(self, item: T) -> Done[R]:
        """The result for one item; the caller waits."""
        future: Future[Done[R]] = Future()
        self._waiting.put((item, future, time.perf_counter()))
        return future.result()

    @property
    def waiting(self) -> int:
        """Items that are not begun."""
        return self._waiting.qsize()

    def close(self) -> None:
        """Stop after what waits now."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            while len(batch) < self._most:
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                batch.append(more)
            self._answer(batch)
            if last:
                return

    def _answer(self, batch: list[tuple[T, Future[Done[R]], float]]) -> None:
        start = time.perf_counter()
        results: Sequence[R | Exception]
        try:
            results = self._work([item for item, _, _ in batch])
        except Exception as error:  # of the whole batch: every caller learns it, and the thread goes on
            results = [error] * len(batch)
        worked = time.perf_counter() - start
        for (_, future, came), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(Done(result, start - came, worked))
