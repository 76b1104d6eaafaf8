"""What ``/metrics`` says, in the form of Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from melt_runtime.reply import Reply
from melt_runtime.request.result import GenerationResult
from melt_runtime.service import Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class _Load(Collector):
    """How busy the service is when somebody asks."""

    def __init__(self, service: Service, state_bytes: int):
        self._service, self._state_bytes = service, state_bytes

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The figures of now."""
        load = self._service.load
        yield GaugeMetricFamily("melt_slots", "Sequences that are answered side by side.", load.slots)
        yield GaugeMetricFamily("melt_requests_running", "Answers under way.", load.running)
        yield GaugeMetricFamily("melt_requests_waiting", "Answers that wait for a slot.", load.waiting)
        yield GaugeMetricFamily("melt_state_bytes", "Bytes of all slots' state, allocated once.", self._state_bytes)
        yield CounterMetricFamily("melt_passes", "Runs of the loop graph.", load.passes)


class Metrics:
    """Counts what a server did."""

    def __init__(self, service: Service, state_bytes: int):
        self._registry = registry = CollectorRegistry()
        registry.register(_Load(service, state_bytes))
        self.responses = Counter(
            "melt_responses", "Responses, by path and status.", ["path", "status"], registry=registry
        )
        self._answers = Counter("melt_answers", "Answers that ended, by how.", ["end"], registry=registry)
        self._prompt = Counter("melt_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("melt_cached_tokens", "Tokens of prompts that were not computed.", registry=registry)
        self._tokens = Counter("melt_completion_tokens", "Tokens of answers.", registry=registry)
        self._loops = Counter("melt_loops", "Loops after which tokens of answers were chosen.", registry=registry)
        self._first = Histogram(
            "melt_first_token_seconds", "From asking to the first token.", registry=registry, buckets=_SECONDS
        )
        self._whole = Histogram(
            "melt_answer_seconds", "From asking to the last token.", registry=registry, buckets=_SECONDS
        )

    def count(self, reply: Reply, first_token_at: float | None) -> None:
        """Counts one answer that has ended; ``first_token_at`` is of ``time.monotonic()``."""
        result: GenerationResult | None = reply.result
        failed = "CancelledError" if reply.error is None else type(reply.error).__name__
        self._answers.labels(failed if result is None else result.finish_reason).inc()
        if first_token_at is not None:
            self._first.observe(first_token_at - reply.queued_at)
        if result is None:
            return
        self._prompt.inc(result.prompt_tokens)
        self._cached.inc(result.cached_tokens)
        self._tokens.inc(len(result.token_ids))
        self._loops.inc(sum(result.loops_per_token))
        self._whole.observe(time.monotonic() - reply.queued_at)

    def text(self) -> bytes:
        """The whole, as it is sent."""
        return generate_latest(self._registry)
