"""Laws of the engine's settings."""

from __future__ import annotations

import pytest

from forgejax.errors import ConfigError
from forgejax.rollout import EngineConfig


def test_impossible_settings_are_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"engine.slots is 0; expected at least 1"):
        EngineConfig(slots=0)
    with pytest.raises(ConfigError, match=r"engine.seed is -1; expected at least 0"):
        EngineConfig(seed=-1)
    with pytest.raises(ConfigError, match=r"engine.kv_pages is 15; a request of engine.max_context 512 takes 16 pages"):
        EngineConfig(kv_pages=15)
    with pytest.raises(ConfigError, match="increasing"):
        EngineConfig(prefill_buckets=(64, 16))


def test_the_pool_holds_full_slots_and_what_is_kept_unless_told_otherwise() -> None:
    derived = EngineConfig(slots=3, max_context=100, page_tokens=32)
    assert (derived.context_pages, derived.pool_pages) == (4, 3 * 4 + 1024 + 1)
    assert EngineConfig(slots=3, max_context=100, page_tokens=32, kv_pages=4).pool_pages == 5
