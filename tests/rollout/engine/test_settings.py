"""Laws of what a slot is asked for and gives back."""

from __future__ import annotations

from forgejax.rollout import EngineConfig
from forgejax.rollout.engine.settings import SlotSettings
from forgejax.types import SamplingLaw


def test_a_negative_seed_is_a_key_of_its_own() -> None:
    assert SlotSettings(budget=1, law=SamplingLaw(), seed=-1).to_arrays(EngineConfig())["key"].tolist() == [
        2**32 - 1,
        2**32 - 1,
    ]
