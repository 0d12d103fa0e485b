"""Laws of the figures that a server shows."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from forgejax.rollout.server.metrics import DriverCollector
from tests.rollout import tiny
from tests.rollout.serving import serving_engine


async def test_the_account_of_the_engine_is_shown_by_purpose() -> None:
    registry = CollectorRegistry()
    async with serving_engine(tiny.params(), 3) as engine:
        registry.register(DriverCollector(engine))
        engine.submit(tiny.request("a", [1, 2, 3], 6)).result(30)
        engine.submit(tiny.request("b", [1, 2, 3], 4, purpose="evaluation")).result(30)
        shown = {
            name: registry.get_sample_value(f"forgejax_rollout_{name}")
            for name in ("healthy", "policy_version", "slots", "requests_total", "cached_prompt_tokens_total")
        }
        by_purpose = {
            purpose: registry.get_sample_value("forgejax_rollout_tokens_returned_total", {"purpose": purpose})
            for purpose in ("train", "evaluation", "probe")
        }
    # The second request finds the two fed tokens of the first.
    assert shown == {
        "healthy": 1.0,
        "policy_version": 3.0,
        "slots": 4.0,
        "requests_total": 2.0,
        "cached_prompt_tokens_total": 2.0,
    }
    assert by_purpose == {"train": 6.0, "evaluation": 4.0, "probe": 0.0}
