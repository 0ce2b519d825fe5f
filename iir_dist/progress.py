"""Progress of long work: a bar with rate and remaining time on a terminal, a plain line now and then in a job log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Counts units of work.

    Args:
        what: the stage, shown in front.
        total: units to do, or None where that is not known.
        unit: their name, for the rate (`images/s`).
        done: units that an earlier run has finished; they do not count towards the rate.
        every_sec: distance of two lines where the output is not a terminal.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0, every_sec: float = 10.0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._done = self._start_done = done
        self._every = every_sec
        self._start = self._last = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, desc=f"{what:<10}", unit=f" {unit}", dynamic_ncols=True, smoothing=0.1,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._bar.disable and kind is None:
            self._line("done")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more; `note` (a loss, say) is shown behind."""
        self._done += units
        self._bar.update(units)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        if self._bar.disable and time.monotonic() - self._last >= self._every:
            self._line(note)

    def _line(self, note: str) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._start
        rate = (self._done - self._start_done) / max(seconds, 1e-9)
        remaining = (
            f", {(self.total - self._done) / rate:.0f} s remaining"
            if self.total and rate and self.total > self._done
            else ""
        )
        of = f"/{self.total}" if self.total is not None else ""
        log.info("%s: %d%s %s, %.1f/s, %.0f s%s%s", self.what, self._done, of, self.unit, rate, seconds, remaining,
                 f", {note}" if note else "")  # fmt: skip
