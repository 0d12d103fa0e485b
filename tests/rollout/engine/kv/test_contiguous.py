"""Laws of the KV cache over contiguous rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forgejax.rollout.engine.kv.contiguous import ContiguousCache
from forgejax.rollout.engine.kv.rows import KVRows
from forgejax.rollout.engine.settings import SlotSettings
from forgejax.rollout.engine.weights import PublishedWeights
from tests.rollout import tiny


def _cache(seed: int = 0, **settings: Any) -> ContiguousCache:
    engine = tiny.engine(**settings)
    cache = ContiguousCache(tiny.POLICY, engine.config, engine.device, engine)
    cache.use(engine.load_params(tiny.params(seed)).current)
    return cache


def _rows(memory: object, tokens: int) -> np.ndarray:
    assert isinstance(memory, KVRows)
    return np.stack([np.asarray(x)[:, 0, :, :tokens] for x in (memory.k_LBKTC, memory.v_LBKTC)])


def test_what_is_reused_of_a_prompt_is_what_would_be_computed() -> None:
    shared, cache, plain = tiny.prompt(1, 20), _cache(), _cache(prefix_cache_tokens=0, ready_prompts=0)
    cached = []
    for slot, end in enumerate(([1, 2], [3, 4, 5], [1, 2])):
        ids = np.array([*shared, *end], np.int32)
        for each in (cache, plain):
            assert each.reserve(slot, ids, 10)
        found, computed = cache.extend(slot, ids), plain.extend(slot, ids)
        assert computed.cached_tokens == 0
        cached.append(found.cached_tokens)
        one, other = found.sequence, computed.sequence
        assert (int(one.length), int(one.last)) == (int(other.length), int(other.last)) == (len(ids) - 1, ids[-1])
        np.testing.assert_allclose(_rows(one.kv, len(ids) - 1), _rows(other.kv, len(ids) - 1), atol=1e-5)
        cache.check_integrity()
    # Nothing; the five pages of four tokens that both share; all but the last token of a prompt seen before.
    assert cached == [0, 20, 21]


def test_what_was_drawn_in_a_slot_is_found_by_the_next_turn() -> None:
    engine, cache = tiny.engine(), _cache()
    ids = tiny.prompt(2, 6)
    assert cache.reserve(2, ids, 4)
    state = engine.insert(cache.extend(2, ids).sequence, engine.init_decode_state(), 2, SlotSettings(budget=4))
    drawn = []
    for _ in range(2):
        state, result = engine.generate(engine.load_params(tiny.params()), state)
        drawn += np.asarray(result.data)[2, :2].tolist()
    turn = np.array([*ids, *drawn], np.int32)
    cache.share(state.kv, 2, turn[:-1])
    cache.release(2)
    following = np.array([*turn, 7, 8, 9], np.int32)
    assert cache.reserve(0, following, 4)
    found = cache.extend(0, following)
    assert found.cached_tokens == 8  # two whole pages of the nine tokens that were fed
    plain = _cache(prefix_cache_tokens=0)
    assert plain.reserve(0, following, 4)
    expected = plain.extend(0, following).sequence
    np.testing.assert_allclose(_rows(found.sequence.kv, 12), _rows(expected.kv, 12), atol=1e-5)


def test_new_weights_share_nothing_of_the_old_and_leave_slots_reserved() -> None:
    cache, ids = _cache(), tiny.prompt(3, 12)
    assert cache.reserve(0, ids, 4) and cache.extend(0, ids).cached_tokens == 0
    cache.use(PublishedWeights(params=tiny.engine().load_params(tiny.params(1)).current.params, version=0))
    assert cache.reserve(1, ids, 4) and cache.extend(1, ids).cached_tokens == 0
    with pytest.raises(ValueError, match="slot 0 is reserved already"):
        cache.reserve(0, ids, 4)


def test_a_slot_is_reserved_once_within_the_context_and_extended_and_released_only_then() -> None:
    cache, ids = _cache(), tiny.prompt(3, 12)
    for call in (lambda: cache.release(1), lambda: cache.extend(1, ids)):
        with pytest.raises(ValueError, match="slot 1 is not reserved"):
            call()
    with pytest.raises(ValueError, match="129 tokens were asked for and a row holds 128"):
        cache.reserve(1, ids, 117)
    assert cache.reserve(1, ids, 116)
    cache.release(1)
    assert cache.reserve(1, ids, 1)


def test_the_account_of_room_holds_through_any_order_of_calls() -> None:
    rng, cache = np.random.default_rng(0), _cache(prefix_cache_tokens=24, ready_prompts=2)
    state, taken = tiny.engine().init_decode_state(), set[int]()
    for turn in range(60):
        slot, ids = int(rng.integers(4)), rng.integers(0, 3, rng.integers(1, 20)).astype(np.int32)
        if slot in taken:
            cache.share(state.kv, slot, ids)
            cache.release(slot)
            taken.remove(slot)
        else:
            assert cache.reserve(slot, ids, 5) and cache.extend(slot, ids).cached_tokens < len(ids)
            taken.add(slot)
        if turn % 20 == 19:
            cache.use(tiny.engine().load_params(tiny.params(turn)).current)
        cache.check_integrity()
    cache._reserved[9] = 1
    with pytest.raises(AssertionError, match="1 tokens are promised to slot 9"):
        cache.check_integrity()
