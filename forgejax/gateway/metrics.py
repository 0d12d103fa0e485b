"""What the gateway counts, as Prometheus metrics in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from forgejax.types import Completion

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class GatewayMetrics:
    """Every gateway has its own, so several in one process do not add up."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"forgejax_gateway_{name}", help_, labels, registry=self.registry)

        def histogram(name: str, help_: str) -> Histogram:
            return Histogram(f"forgejax_gateway_{name}", help_, buckets=_SECONDS, registry=self.registry)

        self.requests = counter("requests", "Requests by wire format and HTTP status.", "dialect", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of completions.")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens the engine had in its prefix cache.")
        self.completion_tokens = counter("completion_tokens", "Tokens sampled.")
        self.turns = counter("turns", "Turns recorded, by why they end.", "finish_reason")
        self.bound = counter("grammar_turns", "Turns whose reply was bound to a schema: they are not trained.")
        self.ignored = counter("ignored_fields", "Fields of requests that have no effect.", "dialect", "field")
        self.limited = counter("limited", "Requests refused for a limit of gateway.limits.", "limit")
        self.retries = counter("retries", "Requests that got the answer recorded for them before.")
        self.undelivered = counter("undelivered", "Answers that were complete and never read.")
        self.cancelled = counter("cancelled", "Requests whose agent went away, or whose session or time ended.")
        self.branches = counter("branches", "Prompts that could not go on from an earlier turn.", "reason")
        self.tool_calls = counter("tool_calls", "Tool calls found in replies.", "result")
        self.side_calls = counter("side_calls", "Requests that a rule for side calls answered.", "rule", "answer")
        self.record_errors = counter("record_errors", "Sessions whose record ends early, for it could not be written.")
        self.sessions = Gauge("forgejax_gateway_sessions", "Open sessions.", registry=self.registry)
        self.in_flight = Gauge("forgejax_gateway_in_flight", "Requests in the engine.", registry=self.registry)
        self.request_s = histogram("request_seconds", "Seconds from a request's arrival to its answer.")
        self.queued_s = histogram("queued_seconds", "Seconds a request waited for the engine.")

    def count_turn(self, completion: Completion, well_formed: int, malformed: int) -> None:
        """Counts what the engine returned for one request, and the calls found in it."""
        self.turns.labels(completion.finish_reason.value).inc()
        self.prompt_tokens.inc(len(completion.prompt_ids))
        self.cached_tokens.inc(completion.cached_tokens)
        self.completion_tokens.inc(len(completion.token_ids))
        self.queued_s.observe(completion.queued_s)
        self.tool_calls.labels("well_formed").inc(well_formed)
        self.tool_calls.labels("malformed").inc(malformed)

    def counts(self) -> dict[str, float]:
        """Every counter, by name and labels: ``branches_history``, ``tool_calls_malformed``, ``prompt_tokens``."""
        return {
            "_".join([metric.name.removeprefix("forgejax_gateway_"), *sample.labels.values()]): sample.value
            for metric in self.registry.collect()
            if metric.type == "counter"
            for sample in metric.samples
            if sample.name.endswith("_total")
        }

    def text(self) -> bytes:
        return generate_latest(self.registry)
