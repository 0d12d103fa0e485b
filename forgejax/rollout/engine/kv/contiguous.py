"""Today's layout: a row of ``max_context`` tokens per slot, and pages beside the rows, copied in and out, to share.

No token is computed twice under the same weights: whole prompts come first, then cached pages.
"""

from __future__ import annotations

import jax

from forgejax.models import PolicyConfig
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.kv.base import ExtendedPrompt, KVMemory, Prefiller
from forgejax.rollout.engine.kv.pages import PagePool
from forgejax.rollout.engine.kv.prefix_cache import PrefixCache
from forgejax.rollout.engine.kv.ready_prompts import ReadyPrompts
from forgejax.rollout.engine.kv.rows import KVRows
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import TokenIds


class ContiguousCache:
    """``KVCache`` over ``KVRows``: each slot has its row, so that there is room wherever a slot is free."""

    def __init__(self, policy: PolicyConfig, config: EngineConfig, device: jax.Device, prefiller: Prefiller):
        self._context, self._slots, self._prefiller = config.max_context, config.slots, prefiller
        self._cache = PrefixCache(page_tokens=config.page_tokens, capacity_pages=config.cache_pages)
        self._pool = PagePool(policy, config, device)
        self._ready = ReadyPrompts(config.ready_prompts)
        self._reserved: dict[int, int] = {}  # tokens of each slot's request, at most

    def use(self, weights: PublishedWeights) -> None:
        self._weights = weights
        self._cache.reset(weights.version)
        self._ready.reset()

    def reserve(self, slot: int, ids: TokenIds, budget: int) -> bool:
        tokens = len(ids) + budget
        if slot in self._reserved:
            raise ValueError(f"slot {slot} is reserved already; release it first")
        if tokens > self._context:
            raise ValueError(f"slot {slot}: {tokens} tokens were asked for and a row holds {self._context}")
        self._reserved[slot] = tokens
        return True

    def extend(self, slot: int, ids: TokenIds) -> ExtendedPrompt:
        if slot not in self._reserved:
            raise ValueError(f"slot {slot} is not reserved")
        ready = self._ready.find(ids)
        if ready is not None:
            return ExtendedPrompt(sequence=ready, cached_tokens=len(ids) - 1)  # the last one is fed by the decode step
        match = self._cache.match(ids, self._weights.version)
        if match.length:
            known = self._prefiller.resume_sequence(self._pool.load(match.pages), match.length, int(ids[match.length]))
        else:
            known = self._prefiller.begin_sequence(int(ids[0]))
        sequence = self._prefiller.append(self._weights, known, ids[match.length + 1 :])
        self._save(sequence.kv, 0, ids[:-1])
        self._ready.keep(ids, sequence)
        return ExtendedPrompt(sequence=sequence, cached_tokens=match.length)

    def share(self, memory: KVMemory, slot: int, ids: TokenIds) -> None:
        self._save(memory, slot, ids)

    def release(self, slot: int) -> None:
        if self._reserved.pop(slot, None) is None:
            raise ValueError(f"slot {slot} is not reserved")

    def check_integrity(self) -> None:
        self._cache.check_integrity()
        for slot, tokens in self._reserved.items():
            if not (0 <= slot < self._slots and tokens <= self._context):
                raise AssertionError(f"KV rows: {tokens} tokens are promised to slot {slot}")

    def _save(self, memory: KVMemory, row: int, ids: TokenIds) -> None:
        assert isinstance(memory, KVRows)
        self._pool.save(memory, row, self._cache.store(ids, self._weights.version))
