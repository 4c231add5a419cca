"""What Prometheus reads of a server: requests, tokens, queues, blocks, and seconds by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from opsin.types import Timings, Usage

STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, engines: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(EngineGauges(engines))
        self.requests = Counter(
            "opsin_requests", "Replies by route and status.", ("route", "status"), registry=registry
        )
        self.in_flight = Gauge("opsin_requests_in_flight", "Requests at work.", registry=registry)
        self.disconnects = Counter(
            "opsin_disconnects", "Clients that left before their reply.", registry=registry
        )
        self.loads = Counter(
            "opsin_model_loads", "Models loaded or failed.", ("result",), registry=registry
        )
        self.prompt_tokens = Counter("opsin_prompt_tokens", "Prompt tokens.", registry=registry)
        self.cached_tokens = Counter(
            "opsin_cached_tokens", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self.media_tokens = Counter(
            "opsin_media_tokens", "Prompt tokens that media took.", ("kind",), registry=registry
        )
        self.media = Counter("opsin_media", "Media read.", ("kind",), registry=registry)
        self.generated = Counter("opsin_generated_tokens", "Tokens of answers.", registry=registry)
        self.drafted = Counter(
            "opsin_drafted_tokens", "Guesses at tokens that were computed.", registry=registry
        )
        self.accepted = Counter(
            "opsin_accepted_tokens", "Guesses at tokens that were right.", registry=registry
        )
        self.seconds = Histogram(
            "opsin_request_seconds",
            "Whole requests.",
            ("route",),
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.stages = Histogram(
            "opsin_stage_seconds",
            "Seconds of one request in one stage.",
            ("stage",),
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.first_token = Histogram(
            "opsin_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.token_gap = Histogram(
            "opsin_inter_token_seconds",
            "Between two tokens of an answer.",
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )

    def finished(self, usage: Usage, timings: Timings, media: Mapping[str, int]) -> None:
        """Count one answer that came to its end."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.generated.inc(usage.generation_tokens)
        self.drafted.inc(usage.drafted_tokens)
        self.accepted.inc(usage.accepted_tokens)
        for kind, tokens in usage.media_tokens.items():
            self.media_tokens.labels(kind).inc(tokens)
        for kind, count in media.items():
            self.media.labels(kind).inc(count)
        for stage, seconds in dataclasses.asdict(timings).items():
            if seconds > 0 or stage in ("queue", "prefill", "generate"):
                self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class EngineGauges(Collector):
    """Reads every engine's counts when the page is asked for."""

    def __init__(self, engines: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge for each count that an engine gives, by model."""
        gauges: dict[str, GaugeMetricFamily] = {}
        for model, stats in self._engines().items():
            for name, value in stats.items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                full = f"opsin_engine_{name}"
                if full not in gauges:
                    words = name.replace("_", " ")
                    gauges[full] = GaugeMetricFamily(full, f"Engine: {words}.", labels=["model"])
                gauges[full].add_metric([model], value)
        yield from gauges.values()
