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
    with pytest.raises(ConfigError, match="increasing"):
        EngineConfig(prefill_buckets=(64, 16))
