"""The account of a served engine as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from forgejax.rollout.server.served import ServedEngine


class DriverCollector:
    """A Prometheus collector over one engine; every name begins with ``forgejax_rollout_``."""

    def __init__(self, served: ServedEngine):
        self._served = served

    def collect(self) -> Iterable[Metric]:
        metrics = self._served.metrics()
        for name, figure in (
            ("healthy", float(metrics.healthy)),
            ("policy_version", metrics.version),
            ("slots", metrics.slots),
            ("active_requests", metrics.active),
            ("waiting_requests", metrics.waiting),
            ("kv_pages", metrics.pages),
            ("held_kv_pages", metrics.held_pages),
            ("kept_kv_pages", metrics.kept_pages),
            ("draft_hit_rate", metrics.draft_hit_rate),
            ("draft_speedup", metrics.draft_speedup),
        ):
            yield GaugeMetricFamily(f"forgejax_rollout_{name}", name.replace("_", " "), value=figure)
        for name, figure in (
            ("requests", metrics.requests),
            ("decode_steps", metrics.steps),
            ("prompt_tokens", metrics.prompt_tokens),
            ("cached_prompt_tokens", metrics.cached_tokens),
            ("carried_prompt_tokens", metrics.carried_tokens),
            ("computed_prompt_tokens", metrics.computed_tokens),
            ("preemptions", metrics.preemptions),
            ("drafted_tokens", metrics.drafted_tokens),
            ("accepted_draft_tokens", metrics.accepted_tokens),
            ("checked_steps", metrics.checked_steps),
            ("restarts", metrics.restarts),
            ("busy_seconds", metrics.busy_s),
        ):
            yield CounterMetricFamily(f"forgejax_rollout_{name}", name.replace("_", " "), value=figure)
        for name, by_purpose in (
            ("sampled", metrics.tokens_sampled),
            ("returned", metrics.tokens_returned),
            ("cancelled", metrics.tokens_cancelled),
            ("failed", metrics.tokens_failed),
        ):
            family = CounterMetricFamily(f"forgejax_rollout_tokens_{name}", f"tokens {name}", labels=["purpose"])
            for purpose, count in by_purpose.items():
                family.add_metric([purpose], count)
            yield family
