"""One pool of keys and values on the devices, the sequences in it, and the slots that decode some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.engine._jetstream import engine_api
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.drafts import Drafts
from forgejax.rollout.engine.kv.paged_cache import Begun, PagedCache
from forgejax.rollout.engine.programs import Programs
from forgejax.rollout.engine.settings import SlotSettings
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import TokenIds

# A chunk is padded to the next bucket unless that wastes more than a third of it; then a smaller bucket goes first.
_PADDING = 1.5


class Slots:
    """Sequences by number: those below ``config.slots`` are slots and may decode. Not thread-safe.

    A sequence is held as keys and values of all its tokens but the last, which waits to be fed: so the first
    ``generate`` draws the first token. Its life is ``begin`` or ``fork``, any number of ``extend``, ``start``, any
    number of ``grow`` and ``generate``; ``cache`` shares and releases it.
    """

    def __init__(self, programs: Programs, config: EngineConfig):
        self._programs, self._config = programs, config
        self._cache = PagedCache(config)
        self._pool, self._state = programs.make(config)
        self._tables_SM = np.zeros((config.slots, config.context_pages), np.int32)
        self._put_tables: jax.Array | None = None

    @property
    def cache(self) -> PagedCache:
        """The account of the pool's pages."""
        return self._cache

    def begin(self, key: int, ids: TokenIds, spare: int = 0, session: str = "") -> Begun | None:
        """What of a new sequence of ``ids`` need not be computed; None without room. See ``PagedCache``."""
        return self._enter(self._cache.begin(key, ids, spare, session))

    def fork(self, source: int, key: int, tokens: int, room: int) -> Begun | None:
        """Begins a sequence with the first ``tokens`` of another; None without room. See ``PagedCache``."""
        return self._enter(self._cache.fork(source, key, tokens, room))

    def extend(self, weights: PublishedWeights, key: int, ids: TokenIds, start: int) -> int:
        """Computes the next chunk of ``ids`` from ``start`` on; gives how many tokens that were."""
        bucket = self.pick_bucket(len(ids) - start)
        count = min(bucket, len(ids) - start)
        chunk = np.zeros(bucket, np.int32)
        chunk[:count] = ids[start : start + count]
        row_M = np.zeros(self._config.context_pages, np.int32)
        self._cache.fill_row(key, row_M)
        with self._programs.layout.turn():
            self._pool = self._programs.extend(
                weights.params, self._pool, self._put(chunk), self._put(row_M), (np.int32(start), np.int32(count))
            )
        return count

    def pick_bucket(self, tokens: int) -> int:
        """The padded length of the next chunk of so many tokens."""
        buckets = self._config.prefill_buckets
        fitting = [bucket for bucket in buckets if tokens <= bucket <= max(_PADDING * tokens, buckets[0])]
        return fitting[0] if fitting else max(bucket for bucket in buckets if bucket <= tokens)

    def start(self, slot: int, token: int, position: int, settings: SlotSettings) -> None:
        """The slot decodes from now on; it feeds ``token`` at ``position`` first."""
        self._state = self._programs.insert(
            self._state,
            np.int32(slot),
            np.int32(token),
            np.int32(position),
            settings.to_arrays(self._config),
        )
        self._fill_row(slot)

    def grow(self, slot: int, tokens: int) -> bool:
        """Makes room in a slot for so many tokens in all; False without room."""
        before = self._cache.held
        if not self._cache.grow(slot, tokens):
            return False
        if self._cache.held != before:
            self._fill_row(slot)
        return True

    def generate(
        self, weights: PublishedWeights, rows: int, mask_SW: NDArray[np.uint32] | None = None
    ) -> engine_api.ResultTokens:
        """Draws up to k tokens for every active slot of the first ``rows``, at the cost of those alone.

        Under a mask, of all slots, it is one token. A slot that meets a stop id or its budget freezes at once. Every
        active slot has room for k tokens more, or for its last.
        """
        bucket = self._config.pick_rows(rows)
        state, allowed, version = (self._pool, self._state), self._allow(bucket, mask_SW), np.int32(weights.version)
        with self._programs.layout.turn():
            (self._pool, self._state), data = self._programs.generate(bucket, weights.params, state, allowed, version)
        return _word_result(data, self._config.tokens_per_step if mask_SW is None else 1)

    def check(
        self,
        weights: PublishedWeights,
        rows: int,
        drafts: tuple[NDArray[np.int32], NDArray[np.int32]],
        mask_SW: NDArray[np.uint32] | None = None,
    ) -> engine_api.ResultTokens:
        """Draws for every active slot of the first ``rows`` as many tokens as its draft holds good for, and one more.

        ``drafts``, of all slots: ids [S, D], and how many of them there are [S], none where a mask forbids something.
        Every active slot has room for what its draft adds and one token more, or for its last.
        """
        bucket = self._config.pick_rows(rows)
        ids_SD, count_S = (self._put(x[:bucket]) for x in drafts)
        allowed = (*self._allow(bucket, mask_SW), Drafts(ids_SD=ids_SD, count_S=count_S))
        state, version = (self._pool, self._state), np.int32(weights.version)
        with self._programs.layout.turn():
            (self._pool, self._state), data = self._programs.check(bucket, weights.params, state, allowed, version)
        return _word_result(data, ids_SD.shape[1] + 1)

    def stop(self, slots: Sequence[int]) -> None:
        """Ends the generations of these slots; what they hold stays as it is."""
        if slots:
            kept_S = np.ones(self._config.slots, np.bool_)
            kept_S[list(slots)] = False
            self._state = self._programs.release(self._state, self._put(kept_S))

    def wait(self) -> None:
        """Returns once the device has done all it was asked for."""
        jax.block_until_ready(self._pool)

    def _enter(self, begun: Begun | None) -> Begun | None:
        if begun is not None and begun.copy is not None:
            source, target = begun.copy
            self._pool = self._programs.copy(self._pool, np.int32(source), np.int32(target))
        return begun

    def _allow(self, bucket: int, mask_SW: NDArray[np.uint32] | None) -> tuple[jax.Array, jax.Array | None]:
        """The pages that slots may touch, and the mask of what they may draw."""
        if self._put_tables is None:
            self._put_tables = self._put(self._tables_SM.copy())
        return self._put_tables, None if mask_SW is None else self._put(mask_SW[:bucket])

    def _fill_row(self, slot: int) -> None:
        self._cache.fill_row(slot, self._tables_SM[slot])
        self._put_tables = None

    def _put(self, value: Any) -> jax.Array:
        return jax.device_put(value, self._programs.layout.sharding())


def _word_result(data: jax.Array, tokens: int) -> engine_api.ResultTokens:
    """As ``engine`` says, of so many tokens a slot."""
    k = tokens
    return engine_api.ResultTokens(data, (0, k), (k, 2 * k), (2 * k, 2 * k + 1), 1)
