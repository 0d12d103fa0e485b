"""Laws of the engine behind JetStream's contract."""

from __future__ import annotations

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import PolicyEngine
from forgejax.rollout.engine._jetstream import orchestrator
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from tests.rollout import tiny


def test_a_prefix_may_be_continued_by_chunks_of_any_size_and_stays_valid() -> None:
    engine, weights = tiny.engine(), tiny.engine().load_params(tiny.params())
    ids = tiny.prompt(1, 40)
    whole = engine.prefill(params=weights, padded_tokens=np.pad(ids, (0, 8)), true_length=40)
    first = engine.prefill(params=weights, padded_tokens=np.pad(ids[:5], (0, 3)), true_length=5)
    both = engine.prefill(params=weights, existing_prefix=first, padded_tokens=np.pad(ids[5:], (0, 5)), true_length=35)
    assert first.ids.tolist() == ids[:5].tolist() and both.ids.tolist() == ids.tolist()
    drawn = []
    for prefix in (whole, both, first):
        state = engine.insert(prefix, engine.init_decode_state(), 0, SlotSettings(budget=9, seed=1))
        _, result = engine.generate(weights, state, rows=1)
        drawn += list(split_draws(result, [0]))
    np.testing.assert_array_equal(drawn[0].token_ids, drawn[1].token_ids)
    for run, prompt in zip(drawn[1:], (ids, ids[:5]), strict=True):
        expected = tiny.dense_logprobs(tiny.params(), prompt, run.token_ids, SlotSettings(budget=1).law)
        np.testing.assert_allclose(run.logprobs, expected, atol=1e-5)


def test_prefixes_and_slots_hold_their_pages_only_as_long_as_they_are_there() -> None:
    engine = PolicyEngine(tiny.POLICY, tiny.engine(kv_pages=32).config, tiny.LAYOUT)
    weights, state = engine.load_params(tiny.params()), engine.init_decode_state()
    prefix = engine.prefill(params=weights, padded_tokens=tiny.prompt(1, 40), true_length=40)
    assert state.cache.held == 10
    engine.insert(prefix, state, 0, SlotSettings(budget=88))
    assert state.cache.held == 11  # nine whole pages are shared, the last one is copied
    engine.generate(weights, state)
    assert state.cache.held == 12
    del prefix
    engine.insert(engine.prefill(params=weights, padded_tokens=[1, 2], true_length=2), state, 0)
    state.cache.check_integrity()
    with pytest.raises(EngineError, match="no room for 128 tokens; release a prefix"):
        engine.prefill(params=weights, padded_tokens=tiny.prompt(1, 128), true_length=128)
    engine.init_decode_state()
    assert state.cache.held == 0
    state.cache.check_integrity()


def test_a_decode_step_does_not_copy_the_pool() -> None:
    engine = tiny.engine()
    weights, slots = engine.load_params(), engine.make_slots()
    compiled = engine._programs.generate.lower(
        engine._programs,
        engine.config.slots,
        weights.current.params,
        (slots._pool, slots._state),
        (slots._put(slots._tables_SM), None),
        np.int32(0),
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < slots._pool.nbytes / 4
    before = slots._pool.unsafe_buffer_pointer()
    slots.generate(weights.current, 4)
    assert slots._pool.unsafe_buffer_pointer() == before


def test_serving_the_first_slots_leaves_the_others_alone() -> None:
    engine = tiny.engine()
    weights, state = engine.load_params(tiny.params()), engine.init_decode_state()
    prefix = engine.prefill(params=weights, padded_tokens=np.pad(tiny.prompt(2, 6), (0, 2)), true_length=6)
    for slot in (0, 3):
        state = engine.insert(prefix, state, slot, SlotSettings(budget=50, seed=3))
    state, few = engine.generate(weights, state, rows=1)
    assert few.data.shape[0] == 1
    state, every = engine.generate(weights, state)
    low, high = split_draws(every, [0, 3])
    (start,) = split_draws(few, [0])
    np.testing.assert_array_equal(high.token_ids, start.token_ids)
    assert int(every.get_result_at_slot(0).lengths[0]) == 4 and int(every.get_result_at_slot(3).lengths[0]) == 2
    assert len(low.token_ids) == 2


def test_an_engine_with_bfloat16_compute_keeps_two_bytes_a_number() -> None:
    policy = dataclasses.replace(tiny.POLICY, compute_dtype="bfloat16")
    engine = PolicyEngine(policy, tiny.engine().config, tiny.LAYOUT)
    weights, state = engine.load_params(), engine.init_decode_state()
    prefix = engine.prefill(params=weights, padded_tokens=np.pad(tiny.prompt(2, 6), (0, 2)), true_length=6)
    state = engine.insert(prefix, state, 0, SlotSettings(budget=5))
    state, result = engine.generate(weights, state, rows=1)
    (drawn,) = split_draws(result, [0])
    assert state._pool.dtype.itemsize == 2 and state._pool.devices() == {jax.devices()[1]}
    assert np.isfinite(drawn.logprobs).all() and (drawn.logprobs < 0).all()


async def test_the_engine_runs_under_jetstreams_own_driver() -> None:
    """JetStream's orchestrator serves greedy-by-seed tokens from it: prefill, insert, generate are as it expects."""
    engine = tiny.engine()
    weights = engine.load_params(tiny.params())
    driver = orchestrator.Driver([engine], [engine], [weights], [weights], interleaved_mode=True, jax_padding=False)
    channel: orchestrator.async_multifuture.AsyncMultifuture = orchestrator.async_multifuture.AsyncMultifuture()
    ids = tiny.prompt(3, 9)
    driver.place_request_on_prefill_queue(
        orchestrator.ActiveRequest(
            max_tokens=4,
            return_channel=channel,
            history_path="as-is",
            prefill_content=ids,
            is_client_side_tokenization=True,
        )
    )
    tokens: list[int] = []

    async def collect() -> None:
        async for response in channel:
            tokens.extend(response[0].token_ids)

    await asyncio.wait_for(collect(), 30)
    driver.stop()
    state = engine.insert(
        engine.prefill(params=weights, padded_tokens=np.pad(ids, (0, 7)), true_length=9), engine.init_decode_state(), 0
    )
    expected = []
    for _ in range(3):
        state, result = engine.generate(weights, state)
        expected += [int(token) for drawn in split_draws(result, [0]) for token in drawn.token_ids]
    assert tokens == expected[:4]
