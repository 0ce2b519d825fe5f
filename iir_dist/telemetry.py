"""What a run tells while it goes: metrics for Prometheus, log lines for people or for machines, and the run's id in both.

Metrics go through Ray, which exports those of all processes on every node's metrics port; a process that is connected to no
Ray has none. Names, tags and units are listed in docs/metrics.md and do not change without a note in the changelog. They
are counted where the driver learns of the work, so that a worker which dies takes no count with it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

RUN = "IIR_RUN"
"""Variable with the id of the run. A submitted job gets that of its submission, other runs make their own."""
TAGS = ("run", "stage")
METRICS = {
    "iir_rows_total": ("Counter", "Units of work done; which unit, says the tag.", ("unit",)),
    "iir_seconds_total": ("Counter", "Seconds that the stage has been at work.", ()),
    "iir_in_flight": ("Gauge", "Pieces of work that are begun and not done; 0 where the stage does not run.", ()),
    "iir_bytes_total": ("Counter", "Bytes of the files that finished stages wrote.", ()),
    "iir_errors_total": (
        "Counter",
        "What was refused (kind rejected), and stages that failed (kind is the error).",
        ("kind",),
    ),
}
"""Kind, description and further tags of every metric. Ray puts `ray_` in front of the name."""


def run_id() -> str:
    """The id of this run, the same in all processes that it starts: time and six random digits, sortable by time."""
    if not os.environ.get(RUN):
        os.environ[RUN] = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    return os.environ[RUN]


# ---------------------------------------------------------------------------------------------------------- metrics


def count(name: str, value: float, stage: str, **tags: str) -> None:
    """Add to a counter, or set a gauge; nothing where no Ray is connected."""
    ray = sys.modules.get("ray")  # a process that never loaded it is not connected
    if ray is None or not ray.is_initialized():
        return
    metric = _metric(name)
    tags = {"run": run_id(), "stage": stage, **tags}
    if METRICS[name][0] == "Gauge":
        metric.set(value, tags)
    elif value > 0:  # Ray refuses to add nothing
        metric.inc(value, tags)


@functools.cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, description, tags = METRICS[name]
    return getattr(metrics, kind)(name, description, (*TAGS, *tags))


# -------------------------------------------------------------------------------------------------------------- log


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, run, message, what a record carries as `fields`, and an error."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "run": run_id(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(style: str, level: int) -> None:
    """Set the log of this process up.

    Args:
        style: `text`, the bare message, or `json`, an object a line.
        level: of the messages of this program; others are shown from warnings on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("iir_dist").setLevel(level)


def is_json() -> bool:
    """Whether log lines of this process are JSON; then nothing else may write between them."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)
