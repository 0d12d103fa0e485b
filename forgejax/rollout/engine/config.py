"""Settings of the inference engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forgejax.errors import ConfigError

ATTENTION_BLOCK = 64
"""Keys the cache attention reads at a time; the KV rows are a multiple of it long."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Shape and limits of one engine.

    ``max_context`` counts prompt and sampled tokens together. ``prefix_cache_tokens`` of 0 turns the reuse of pages
    off, ``ready_prompts`` of 0 that of whole prompts; each of the latter takes the memory of one slot.

    ``batch_invariant``: the bits of what is drawn depend on the request, its seed and the weights alone, not on what
    else the engine serves or has served. Every decode step then serves all slots, and no prompt goes on from pages.
    """

    slots: int = 32  # completions decoded at once
    max_context: int = 512
    tokens_per_step: int = 4  # tokens each slot draws per dispatch; stop ids are checked on the device after each
    prefill_buckets: tuple[int, ...] = (16, 64, 256)  # padded chunk lengths; a longer prompt takes several chunks
    prefill_tokens_per_step: int = 512  # prompt tokens computed between two decode steps, so that none waits long
    page_tokens: int = 16  # granularity of prefix reuse
    prefix_cache_tokens: int = 32_768  # bounds the device memory of the prefix cache
    batch_invariant: bool = False
    ready_prompts: int = 8  # whole prompts kept as rows: their repetitions, a group's members, compute nothing
    max_stop_ids: int = 8  # per request
    max_queued: int = 4_096
    request_deadline_s: float = 600.0  # from submission to the last token
    repetition_tokens: int = 3_000  # a generation ends after so many tokens in a row, each above the probability
    repetition_probability: float = 0.99
    seed: int = 0  # of requests that bring none

    def __post_init__(self) -> None:
        for name in ("slots", "tokens_per_step", "prefill_tokens_per_step", "page_tokens", "max_queued"):
            self._at_least(name, 1)
        for name in ("max_stop_ids", "repetition_tokens"):
            self._at_least(name, 1)
        self._at_least("max_context", 2)
        for name in ("prefix_cache_tokens", "ready_prompts", "seed"):
            self._at_least(name, 0)
        if not self.prefill_buckets or list(self.prefill_buckets) != sorted(set(self.prefill_buckets)):
            raise ConfigError(f"engine.prefill_buckets {self.prefill_buckets}: expected increasing chunk lengths")
        if self.prefill_buckets[0] < 1:
            raise ConfigError(f"engine.prefill_buckets {self.prefill_buckets}: expected positive chunk lengths")
        if not self.request_deadline_s > 0:
            raise ConfigError(f"engine.request_deadline_s is {self.request_deadline_s}; expected a positive time")
        if not 0.0 < self.repetition_probability < 1.0:
            raise ConfigError(f"engine.repetition_probability {self.repetition_probability}: expected one in (0, 1)")

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ConfigError(f"engine.{name} is {getattr(self, name)}; expected at least {least}")

    @property
    def row_tokens(self) -> int:
        """Length of one KV row: ``max_context`` rounded up to whole attention blocks and whole pages."""
        unit = math.lcm(ATTENTION_BLOCK, self.page_tokens)
        return -(-self.max_context // unit) * unit

    @property
    def row_pages(self) -> int:
        """Pages in one KV row."""
        return self.row_tokens // self.page_tokens

    @property
    def cache_pages(self) -> int:
        """Pages the prefix cache may hold: none where prompts in other chunks, or decoded, would be other bits."""
        return 0 if self.batch_invariant else self.prefix_cache_tokens // self.page_tokens

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Slot counts a decode program exists for: a few busy slots need not pay for all of them, unless their sums
        must be those of all."""
        if self.batch_invariant:
            return (self.slots,)
        return tuple(sorted({-(-self.slots // 16), -(-self.slots // 4), self.slots}))
