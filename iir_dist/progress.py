"""Progress of long work: a bar with rate and remaining time on a terminal, a plain line now and then in a job log.

What is counted here is also what a stage exports as metrics while it runs (`iir_dist.telemetry`).
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from iir_dist import telemetry

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
        self._start = self._last = self._counted = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, desc=f"{what:<10}", unit=f" {unit}", dynamic_ncols=True, smoothing=0.1,
            disable=not sys.stderr.isatty() or telemetry.is_json(),
        )  # fmt: skip

    @property
    def done(self) -> int:
        """Units that are done, those of earlier runs included."""
        return self._done

    def __enter__(self) -> Self:
        self.in_flight(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        self._count(0)
        self.in_flight(0)
        if kind is not None:
            telemetry.count("iir_errors_total", 1, self.what, kind=kind.__name__)
        if self._bar.disable and kind is None:
            self._line("done")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more; `note` (a loss, say) is shown behind."""
        self._done += units
        self._count(units)
        self._bar.update(units)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        if self._bar.disable and time.monotonic() - self._last >= self._every:
            self._line(note)

    def in_flight(self, pieces: int) -> None:
        """Say how many pieces of work are under way now; 1 where a stage never says."""
        telemetry.count("iir_in_flight", pieces, self.what)

    def _count(self, units: int) -> None:
        now = time.monotonic()
        telemetry.count("iir_rows_total", units, self.what, unit=self.unit)
        telemetry.count("iir_seconds_total", now - self._counted, self.what)
        self._counted = now

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
        fields = {
            "stage": self.what, "done": self._done, "total": self.total, "unit": self.unit, "rate": round(rate, 3),
            "seconds": round(seconds, 3),
        }  # fmt: skip
        log.info("%s: %d%s %s, %.1f/s, %.0f s%s%s", self.what, self._done, of, self.unit, rate, seconds, remaining,
                 f", {note}" if note else "", extra={"fields": fields})  # fmt: skip
