"""What Prometheus is told of a service."""

from collections.abc import Callable


class Metrics:
    """Counters and histograms of one service, in a registry of its own. Safe to use from many threads."""

    def __init__(self, backend: str, model: str, batch: int, queue: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("sdedit_service", "What is served.", registry=registry).info({"backend": backend, "model": model})
        sizes = sorted({1, *(2**n for n in range(1, 12) if 2**n < batch), batch})
        self.requests = Counter(
            "sdedit_requests", "Requests by path and status; `left` where the client did.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "sdedit_request_seconds", "From the head of a POST /edit to the end of its answer.", ["status"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.edit_seconds = Histogram(
            "sdedit_edit_seconds", "Time of a batch in the editor.", buckets=_SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "sdedit_batch_size", "Requests that shared a batch.", buckets=sizes, registry=registry
        )
        self.evaluations = Counter("sdedit_network_evaluations", "Network calls, each of a batch.", registry=registry)
        self.in_flight = Gauge("sdedit_in_flight", "Requests to /edit that are not answered yet.", registry=registry)
        Gauge("sdedit_queue_limit", "Requests that may wait.", registry=registry).set(queue)
        self._queue_length = Gauge("sdedit_queue_length", "Requests that wait for the editor.", registry=registry)
        self._ready = Gauge("sdedit_ready", "1 when warm and not stopping.", registry=registry)
        self._memory = Gauge("sdedit_request_bytes", "Bytes that requests hold.", registry=registry)

    def watch(self, queue_length: Callable[[], float], ready: Callable[[], float], memory: Callable[[], float]) -> None:
        """Ask these whenever the metrics are read."""
        self._queue_length.set_function(queue_length)
        self._ready.set_function(ready)
        self._memory.set_function(memory)

    def text(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' text format, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
