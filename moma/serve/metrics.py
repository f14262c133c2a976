"""Metrics of the server for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moma.serve.answer import Answer
from moma.serve.engine import Engine
from moma.serve.errors import HUNG_UP

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self._engine
        yield GaugeMetricFamily("moma_active_requests", "Being generated.", engine.active)
        yield GaugeMetricFamily("moma_queued_requests", "Waiting in the queue.", engine.queued)
        yield CounterMetricFamily("moma_generated_tokens", "New tokens.", engine.total_tokens)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "moma_requests", "Requests by status.", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            "moma_time_to_first_token_seconds",
            "From the request to its first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._whole = Histogram(
            "moma_answer_seconds",
            "From the request to the end of its answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )

    def observe(self, answer: Answer) -> None:
        """Count an answer that has ended."""
        if answer.first is not None:
            self._first.observe(answer.first - answer.submitted)
        if answer.ended is not None:
            self._whole.observe(answer.ended - answer.submitted)

    def count(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class CountRequests:
    """Counts the requests to the paths of some routes by status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Iterable[str]):
        self._app, self._metrics = app, metrics
        self._paths = {path: compile_path(path)[0] for path in paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer and count a request."""
        matching = [path for path, each in self._paths.items() if each.match(scope.get("path", ""))]
        if scope["type"] != "http" or not matching:
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except Exception:
            status = status or 500  # what answers it is outside
            raise
        finally:
            self._metrics.count(matching[0], status or HUNG_UP)
