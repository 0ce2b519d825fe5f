"""What the downloads of one call share: whether to stop, and the progress."""

from __future__ import annotations

import threading

from iir_dist.progress import Progress

MB = 10**6


class Stopped(Exception):
    """Another download has failed; this one lets go, its part stays."""


class Watch:
    """What the downloads of one call share: whether to stop, and the progress."""

    def __init__(self, progress: Progress) -> None:
        self.stop = threading.Event()
        self._progress, self._lock, self._bytes = progress, threading.Lock(), 0

    def check(self) -> None:
        """Leave by an exception where another download has failed."""
        if self.stop.is_set():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Wait, and leave as `check` does."""
        if self.stop.wait(seconds):
            raise Stopped

    def received(self, count: int) -> None:
        """Count bytes."""
        with self._lock:
            whole, self._bytes = divmod(self._bytes + count, MB)
            if whole:
                self._progress.advance(whole)
