"""What /metrics tells: requests, latencies, tokens, queue and engine, in a registry of the application's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.request import EngineStats

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

MAX_FIELD_NAMES = 64
"""Names of ignored fields that get a series of their own: callers choose them, so their number must be bounded."""

VLLM_PREFIX = "vllm:"
"""How the names of vLLM's metrics begin."""

_ENGINE_GAUGES = {
    "num_running": "Requests being computed",
    "num_waiting": "Requests waiting inside the engine",
    "num_blocks": "KV blocks",
    "num_free_blocks": "KV blocks that can be reused now",
}
_ENGINE_COUNTERS = {
    "num_steps": ("steps", "Steps computed"),
    "num_prompt_tokens": ("prompt_tokens", "Prompt tokens computed, cached ones not among them"),
    "num_cached_tokens": ("cached_tokens", "Prompt tokens found in the prefix cache"),
    "num_output_tokens": ("output_tokens", "Tokens chosen"),
    "num_draft_tokens": ("draft_tokens", "Tokens guessed by prompt lookup"),
    "num_accepted_tokens": ("accepted_draft_tokens", "Guessed tokens that were right"),
    "num_preemptions": ("preemptions", "Requests preempted"),
    "num_masks": ("masks", "Grammar masks made, one for each token that a grammar refused"),
    "grammar_seconds": ("grammar_seconds", "Seconds of a processor for grammars: tokens checked, masks made"),
    "num_requests_finished": ("requests_finished", "Requests finished"),
    "step_seconds": ("step_seconds", "Seconds inside kernels"),
    "num_encoded_texts": ("encoded_texts", "Texts made vectors"),
    "num_encoded_tokens": ("encoded_tokens", "Tokens of texts made vectors"),
    "encoder_seconds": ("encoder_seconds", "Seconds inside the encoder's kernels"),
    "num_restarts": ("restarts", "Restarts of the engine process"),
}


class _EngineCollector:
    """The latest EngineStats of each model as metric families."""

    def __init__(self) -> None:
        self.stats: Mapping[str, EngineStats] = MappingProxyType({})

    def collect(self) -> Iterable[Metric]:
        values = {model: msgspec.structs.asdict(stats) for model, stats in self.stats.items()}
        for name, help in _ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(f"seraph_engine_{name}", help, labels=["model"])
            for model, of_model in values.items():
                gauge.add_metric([model], of_model[name])
            yield gauge
        for name, (label, help) in _ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(f"seraph_engine_{label}", help, labels=["model"])
            for model, of_model in values.items():
                counter.add_metric([model], of_model[name])
            yield counter


class _VllmCollector:
    """vLLM's own families, as they are. It keeps them in its library's registry, and makes them anew at each start."""

    def __init__(self) -> None:
        self.shown = False

    def collect(self) -> Iterable[Metric]:
        if self.shown:
            yield from (family for family in REGISTRY.collect() if family.name.startswith(VLLM_PREFIX))


class Metrics:
    """The server's metrics. Durations are seconds."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._engine, self._vllm = _EngineCollector(), _VllmCollector()
        registry.register(self._engine)
        registry.register(self._vllm)
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "seraph_http_requests", "HTTP requests answered", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "seraph_http_request_seconds",
            "From a request's first byte to its answer's last",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "seraph_time_to_first_token_seconds",
            "From a request's arrival to the first token of a choice",
            ["model"],
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "seraph_inter_token_latency_seconds",
            "Between consecutive tokens of a choice; tokens that arrive together share their gap",
            ["model"],
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "seraph_time_per_output_token_seconds",
            "Mean time per token of a choice after its first",
            ["model"],
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("seraph_prompt_tokens", "Prompt tokens read", ["model"], registry=registry)
        self.cached_tokens = Counter(
            "seraph_cached_tokens", "Prompt tokens the prefix cache held", ["model"], registry=registry
        )
        self.completion_tokens = Counter("seraph_completion_tokens", "Tokens delivered", ["model"], registry=registry)
        self.choices_finished = Counter(
            "seraph_choices_finished", "Choices ended, by reason", ["model", "reason"], registry=registry
        )
        self.sequences = Gauge("seraph_sequences", "Sequences admitted and not finished", ["model"], registry=registry)
        self.refusals = Counter(
            "seraph_refused_requests", "Requests turned away for lack of room", ["model"], registry=registry
        )
        self._fields = Counter(
            "seraph_ignored_fields",
            "Request fields without effect: hints, and names no API knows",
            ["class", "field"],
            registry=registry,
        )
        self._field_names: set[str] = set()

    def count_field(self, kind: str, name: str) -> None:
        """Count a field without effect. Beyond MAX_FIELD_NAMES distinct names they are counted as "other"."""
        if name not in self._field_names:
            if len(self._field_names) >= MAX_FIELD_NAMES:
                name = "other"
            else:
                self._field_names.add(name)
        self._fields.labels(kind, name).inc()

    def of(self, model: str) -> ModelMetrics:
        """What is counted of one model; from now on its counters are there, at zero."""
        return ModelMetrics(self, model)

    def render(self, stats: Mapping[str, EngineStats], *, vllm: bool = False) -> bytes:
        """The text exposition, with a fresh snapshot of each model's engine; `vllm`: with vLLM's own families too."""
        self._engine.stats, self._vllm.shown = stats, vllm
        return generate_latest(self.registry)


class ModelMetrics:
    """The metrics that are kept for each model, as one model's requests see them."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self.time_to_first_token = metrics.time_to_first_token.labels(model)
        self.inter_token_latency = metrics.inter_token_latency.labels(model)
        self.time_per_output_token = metrics.time_per_output_token.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.completion_tokens = metrics.completion_tokens.labels(model)
        self.sequences = metrics.sequences.labels(model)
        self.refusals = metrics.refusals.labels(model)

    def count_finished(self, reason: str) -> None:
        """Count the end of a choice."""
        self._metrics.choices_finished.labels(self._model, reason).inc()

    def forget(self) -> None:
        """The model is gone: what is true only of a moment is told no longer. Counters stay, as they only grow."""
        self._metrics.sequences.remove(self._model)
