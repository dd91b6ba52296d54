"""Counters of a server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What a server counts. Each has a registry of its own, so that several may be in one process."""

    def __init__(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("fm9g_requests", "Answered requests", ("path", "status"), registry=self._registry)
        self.prompt_tokens = Counter("fm9g_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.generated_tokens = Counter("fm9g_generated_tokens", "Generated tokens", registry=self._registry)
        self.first_token = Histogram(
            "fm9g_time_to_first_token_seconds", "Seconds to the first token", registry=self._registry, buckets=_SECONDS
        )
        self.duration = Histogram(
            "fm9g_request_duration_seconds", "Seconds of a request", registry=self._registry, buckets=_SECONDS
        )
        running = Gauge("fm9g_running", "Continuations that are generated", registry=self._registry)
        running.set_function(num_running)
        waiting = Gauge("fm9g_waiting", "Continuations that wait", registry=self._registry)
        waiting.set_function(num_waiting)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
