"""Prompts into prefixes, with no token computed twice under the same weights: whole prompts and cached pages first."""

from __future__ import annotations

from dataclasses import dataclass

from forgejax.rollout.driver.ready_prompts import ReadyPrompts
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.kv.pages import PagePool
from forgejax.rollout.engine.kv.prefix_cache import PrefixCache
from forgejax.rollout.engine.kv.rows import KVRows
from forgejax.rollout.engine.programs import Prefix
from forgejax.rollout.engine.weights import Weights
from forgejax.types import TokenIds


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A prompt ready to be inserted, and how many of its tokens were not computed for it."""

    prefix: Prefix
    cached_tokens: int


class Prompts:
    """What one engine keeps of prompts, and of what was drawn after them, for the weights in use.

    Belongs to the driver's thread; ``use`` comes first.
    """

    def __init__(self, engine: PolicyEngine):
        config = engine.config
        self._engine = engine
        self._cache = PrefixCache(page_tokens=config.page_tokens, capacity_pages=config.cache_pages)
        self._pool = PagePool(engine.policy, config, engine.device)
        self._ready = ReadyPrompts(config.ready_prompts)

    def use(self, weights: Weights) -> None:
        """From now on these weights compute; all that others computed is forgotten."""
        self._weights = weights
        self._cache.reset(weights.version)
        self._ready.reset()

    def prefill(self, ids: TokenIds) -> Prefilled:
        """The prompt's prefix; what is computed for it is kept at once, so that a group's members share it."""
        ready = self._ready.find(ids)
        if ready is not None:
            return Prefilled(prefix=ready, cached_tokens=len(ids) - 1)  # the last one is fed by the decode step
        match = self._cache.match(ids, self._weights.version)
        if match.length:
            prefix = self._engine.prefix_of(self._pool.load(match.pages), match.length, int(ids[match.length]))
        else:
            prefix = self._engine.first_prefix(int(ids[0]))
        prefix = self._engine.append(self._weights, prefix, ids[match.length + 1 :])
        self.keep(prefix.rows, 0, ids[:-1])
        self._ready.keep(ids, prefix)
        return Prefilled(prefix=prefix, cached_tokens=match.length)

    def keep(self, rows: KVRows, row: int, ids: TokenIds) -> None:
        """Keeps the keys and values of ``ids``, which lie in a row and were computed by the weights in use alone."""
        self._pool.save(rows, row, self._cache.store(ids, self._weights.version))
