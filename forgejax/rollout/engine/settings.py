"""What a request asks of the slot it decodes in, and what a decode step gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.engine._jetstream import engine_api
from forgejax.rollout.engine.config import EngineConfig
from forgejax.types import SamplingLaw


@dataclass(frozen=True, kw_only=True)
class SlotSettings:
    """How one slot draws: at most ``budget`` tokens under ``law``, ending at a stop id, randomness from ``seed``."""

    budget: int
    law: SamplingLaw = field(default_factory=SamplingLaw)
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0

    def to_arrays(self, config: EngineConfig) -> dict[str, Any]:
        """The settings as the device program takes them; the caller has checked how many stop ids and biases."""
        stop_ids = np.full(config.max_stop_ids, -1, np.int32)
        stop_ids[: len(self.stop_ids)] = sorted(self.stop_ids)
        biased, bias = np.full(config.max_biased_ids, -1, np.int32), np.zeros(config.max_biased_ids, np.float32)
        for at, (id_, value) in enumerate(self.law.logit_bias):
            biased[at], bias[at] = id_, value
        seed = self.seed % 2**64
        return {
            "budget": np.int32(self.budget),
            "temperature": np.float32(self.law.temperature),
            "top_p": np.float32(self.law.top_p),
            "top_k": np.int32(min(self.law.top_k, np.iinfo(np.int32).max)),
            "min_p": np.float32(self.law.min_p),
            "biased": biased,
            "bias": bias,
            "key": np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
            "stop_ids": stop_ids,
        }


@dataclass(frozen=True, kw_only=True)
class SlotDraw:
    """The tokens one slot drew in one decode step."""

    slot: int
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def cut(self, tokens: int) -> SlotDraw:
        """The first ones alone."""
        return SlotDraw(slot=self.slot, token_ids=self.token_ids[:tokens], logprobs=self.logprobs[:tokens])


def split_draws(result: engine_api.ResultTokens, slots: list[int]) -> Iterator[SlotDraw]:
    """Unpacks a decode step (see ``engine``) for the given slots; waits for the device."""
    data = np.asarray(result.data)
    first = result.length_idx[1]
    bits = data[:, first : first + result.tokens_idx[1]].copy().view(np.float32)
    for slot in slots:
        count = int(data[slot, result.valid_idx[0] : result.valid_idx[1]].sum())
        yield SlotDraw(slot=slot, token_ids=data[slot, :count].copy(), logprobs=bits[slot, :count].copy())
