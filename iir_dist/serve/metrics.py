"""What Prometheus reads from one replica."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of an app; in a registry of its own, so that a process may have several apps.

    Args:
        under_way, waiting, rows, reloads: read when Prometheus asks.
    """

    def __init__(
        self,
        under_way: Callable[[], float],
        waiting: Callable[[], float],
        rows: Callable[[], float],
        reloads: Callable[[], float],
    ) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "iir_serve_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.errors = Counter("iir_serve_errors", "Errors by type.", ["type"], registry=self._registry)
        self.seconds = Histogram(
            "iir_serve_request_seconds", "From the head of a request to the end of the answer.", ["route"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self.steps = Histogram(
            "iir_serve_step_seconds", "Steps of a search; a batch counts for each of its queries.", ["step"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        for name, text, function in (
            ("iir_serve_under_way", "Searches under way.", under_way),
            ("iir_serve_waiting", "Queries that wait for the network or the index.", waiting),
            ("iir_serve_index_rows", "Rows that are searched.", rows),
            ("iir_serve_reloads", "Newer versions of the index that took over.", reloads),
        ):
            Gauge(name, text, registry=self._registry).set_function(function)

    def searched(self, steps_ms: dict[str, float]) -> None:
        """Note the steps of one search."""
        for step, ms in steps_ms.items():
            self.steps.labels(step).observe(ms / 1e3)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
