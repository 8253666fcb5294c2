"""What ``/metrics`` tells: one registry an application, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("multihead_requests", "Requests answered", ["path", "method", "status"], registry=r)
        self.seconds = Histogram(
            "multihead_request_seconds", "Time from a request's first byte to its answer's last", ["path"],
            buckets=SECONDS, registry=r,
        )
        self.first = Histogram(
            "multihead_first_token_seconds", "Time from a request to its first text", ["model"],
            buckets=SECONDS, registry=r,
        )
        self.tokens = Counter("multihead_tokens", "Tokens read and written", ["model", "kind"], registry=r)
        self.batch = Histogram("multihead_batch_rows", "Rows worked on at once", ["model"], buckets=ROWS, registry=r)
        self.slots = Gauge("multihead_slots", "Texts that can be generated side by side", ["model"], registry=r)
        self.active = Gauge("multihead_slots_in_use", "Texts being generated", ["model"], registry=r)
        self.waiting = Gauge("multihead_queue", "Requests that wait", ["model"], registry=r)
        self.under_way = Gauge("multihead_requests_under_way", "Requests being answered", registry=r)

    def watch(self, model: str, waiting: Callable[[], int], active: Callable[[], int] | None, slots: int) -> None:
        """Read a model's queue and slots whenever somebody asks."""
        self.waiting.labels(model).set_function(waiting)
        if active is not None:
            self.active.labels(model).set_function(active)
            self.slots.labels(model).set(slots)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
