"""The server's figures for Prometheus. No label holds what a client wrote, so their number is bounded."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from loragen_agents.server.steps import Finish

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms of one server."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._answers = Counter("loragen_http_requests", "Requests answered.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "loragen_http_seconds", "Time until the answer was sent.", ["path"], buckets=_SECONDS, registry=registry
        )
        self._wait = Histogram(
            "loragen_queue_seconds", "Time that requests waited for a worker.", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "loragen_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter(
            "loragen_tokens", "Tokens of prompts (cached: not read anew), and generated.", ["kind"], registry=registry
        )
        self._specialized = Counter(
            "loragen_specializations", "Where specialised models came from.", ["source"], registry=registry
        )
        self.cancelled = Counter("loragen_cancelled", "Requests whose client went away.", registry=registry)
        self.waiting = Gauge("loragen_queue_waiting", "Requests that wait for a worker.", registry=registry)
        self.kept = Gauge("loragen_specializations_kept", "Specialised models in memory.", registry=registry)
        self.kept_bytes = Gauge("loragen_specializations_bytes", "Their own memory.", registry=registry)
        self.running = Gauge("loragen_queue_running", "Requests that are worked on.", registry=registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def finished(self, finish: Finish, wait_seconds: float) -> None:
        """Count a chat request that was answered to its end."""
        self._wait.observe(wait_seconds)
        self._first.observe(finish.facts.get("first_token_ms", 0) / 1000)
        self._tokens.labels("prompt").inc(finish.prompt_tokens)
        self._tokens.labels("cached").inc(finish.cached_tokens)
        self._tokens.labels("generated").inc(finish.completion_tokens)
        if "specialization" in finish.facts:
            self._specialized.labels(finish.facts["specialization"]).inc()

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
