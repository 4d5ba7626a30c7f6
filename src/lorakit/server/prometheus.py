"""What a server counts, in Prometheus' form, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from lorakit.engine.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_TO_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The figures of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lorakit_requests",
            "Requests that were answered.",
            ["route", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "lorakit_prompt_tokens", "Tokens of prompts that were handed in.", registry=registry
        )
        self.generated_tokens = Counter(
            "lorakit_generated_tokens", "Tokens that were written.", registry=registry
        )
        self.to_first_token = Histogram(
            "lorakit_time_to_first_token_seconds",
            "From a prompt's handing in to its answer's first token.",
            buckets=_TO_FIRST,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "lorakit_time_between_tokens_seconds",
            "Between the tokens of an answer.",
            buckets=_BETWEEN,
            registry=registry,
        )
        # As vLLM's vllm:prefix_cache_queries and vllm:prefix_cache_hits, which count tokens too.
        kept = engine.prefixes
        counts = {
            "lorakit_prefix_cache_queries": (
                "Tokens of prompts that were looked for in the prefix cache.",
                lambda: kept.queries if kept else 0,
            ),
            "lorakit_prefix_cache_hits": (
                "Tokens of prompts that were not computed again.",
                lambda: kept.hits if kept else 0,
            ),
        }
        if (drafts := engine.drafts) is not None:
            counts["lorakit_spec_decode_draft_tokens"] = (
                "Tokens of drafts.",
                lambda: drafts.proposed,
            )
            counts["lorakit_spec_decode_accepted_tokens"] = (
                "Tokens of drafts that were right.",
                lambda: drafts.accepted,
            )
        registry.register(_Counts(counts))
        gauges = {
            "lorakit_prefix_cache_bytes": (
                "Bytes that the prefix cache takes.",
                lambda: kept.size if kept else 0,
            ),
            "lorakit_answers_running": ("Answers that are being written.", engine.running),
            "lorakit_answers_waiting": ("Answers that wait for a row.", engine.waiting),
            "lorakit_adapters": ("Adapters that are served.", lambda: len(engine.pool.infos())),
            "lorakit_adapters_loaded": (
                "Adapters that are in memory.",
                lambda: sum(info.loaded for info in engine.pool.infos()),
            ),
        }
        for name, (meaning, value) in gauges.items():
            Gauge(name, meaning, registry=registry).set_function(value)

    def page(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)


class _Counts(Collector):
    """Counters whose values are somebody else's, by their names, with their meanings."""

    def __init__(self, counts: Mapping[str, tuple[str, Callable[[], int]]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        for name, (meaning, value) in self._counts.items():
            yield CounterMetricFamily(name, meaning, value())
