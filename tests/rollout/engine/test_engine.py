"""Laws of the engine behind JetStream's contract."""

from __future__ import annotations

import asyncio
import dataclasses

import jax
import numpy as np

from forgejax.rollout import PolicyEngine
from forgejax.rollout.engine._jetstream import orchestrator
from forgejax.rollout.engine.kv.rows import KVRows
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from tests.rollout import tiny


def test_a_prefix_may_be_continued_by_chunks_of_any_size() -> None:
    engine, weights = tiny.engine(), tiny.engine().load_params(tiny.params())
    ids = tiny.prompt(1, 40)
    whole = engine.prefill(params=weights, padded_tokens=np.pad(ids, (0, 8)), true_length=40)
    first = engine.prefill(params=weights, padded_tokens=np.pad(ids[:5], (0, 3)), true_length=5)
    both = engine.prefill(params=weights, existing_prefix=first, padded_tokens=np.pad(ids[5:], (0, 5)), true_length=35)
    assert (int(first.length), int(both.length), int(both.last)) == (4, 39, ids[-1])
    for name in ("k_LBKTC", "v_LBKTC"):
        one, other = (np.asarray(getattr(p.kv, name))[:, :, :, :39] for p in (whole, both))
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_decode_step_does_not_copy_the_cache() -> None:
    engine = tiny.engine()
    weights, state = engine.load_params(), engine.init_decode_state()
    compiled = engine._programs.generate.lower(
        engine._programs, engine.config.slots, weights.current.params, state, np.int32(0)
    ).compile()
    assert isinstance(state.kv, KVRows)
    rows = state.kv.k_LBKTC.nbytes
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < rows
    before = state.kv.k_LBKTC.unsafe_buffer_pointer()
    state, _ = engine.generate(weights, state)
    assert isinstance(state.kv, KVRows) and state.kv.k_LBKTC.unsafe_buffer_pointer() == before


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
    engine = PolicyEngine(policy, tiny.engine().config, jax.devices()[2])
    weights, state = engine.load_params(), engine.init_decode_state()
    prefix = engine.prefill(params=weights, padded_tokens=np.pad(tiny.prompt(2, 6), (0, 2)), true_length=6)
    state = engine.insert(prefix, state, 0, SlotSettings(budget=5))
    state, result = engine.generate(weights, state, rows=1)
    (drawn,) = split_draws(result, [0])
    assert isinstance(state.kv, KVRows)
    assert state.kv.k_LBKTC.dtype.itemsize == 2 and state.kv.k_LBKTC.devices() == {jax.devices()[2]}
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
