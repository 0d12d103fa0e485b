"""Laws of the engine behind JetStream's contract."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys

import jax
import numpy as np
import pytest

from forgejax.errors import ConfigError, EngineError
from forgejax.rollout import EngineConfig, PolicyEngine
from forgejax.rollout.engine._jetstream import orchestrator
from forgejax.rollout.engine.settings import SlotSettings, runs
from forgejax.types import SamplingLaw
from tests.rollout import tiny


def test_importing_jetstream_leaves_no_stub_no_tensorflow_and_the_root_logger_as_it_was() -> None:
    script = (
        "import warnings, logging, sys; warnings.simplefilter('error'); import orbax.checkpoint; "
        "logging.getLogger().setLevel(logging.ERROR); handlers = list(logging.getLogger().handlers); "
        "import forgejax.rollout; root = logging.getLogger(); "
        "assert root.level == logging.ERROR and root.handlers == handlers; "
        "bad = [name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'seqio')]; assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert logging.getLogger().level != logging.DEBUG


def test_a_prefix_may_be_continued_by_chunks_of_any_size() -> None:
    engine, weights = tiny.engine(), tiny.engine().load_params(tiny.params())
    ids = tiny.prompt(1, 40)
    whole = engine.prefill(params=weights, padded_tokens=np.pad(ids, (0, 8)), true_length=40)
    first = engine.prefill(params=weights, padded_tokens=np.pad(ids[:5], (0, 3)), true_length=5)
    both = engine.prefill(params=weights, existing_prefix=first, padded_tokens=np.pad(ids[5:], (0, 5)), true_length=35)
    assert (int(first.length), int(both.length), int(both.last)) == (4, 39, ids[-1])
    for name in ("k_LBKTC", "v_LBKTC"):
        one, other = (np.asarray(getattr(p.rows, name))[:, :, :, :39] for p in (whole, both))
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_decode_step_does_not_copy_the_cache() -> None:
    engine = tiny.engine()
    weights, state = engine.load_params(), engine.init_decode_state()
    compiled = engine._programs.generate.lower(
        engine._programs, engine.config.slots, weights.current.params, state, np.int32(0)
    ).compile()
    rows = state.rows.k_LBKTC.nbytes
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < rows
    before = state.rows.k_LBKTC.unsafe_buffer_pointer()
    state, _ = engine.generate(weights, state)
    assert state.rows.k_LBKTC.unsafe_buffer_pointer() == before


def test_serving_the_first_slots_leaves_the_others_alone() -> None:
    engine = tiny.engine()
    weights, state = engine.load_params(tiny.params()), engine.init_decode_state()
    prefix = engine.prefill(params=weights, padded_tokens=np.pad(tiny.prompt(2, 6), (0, 2)), true_length=6)
    for slot in (0, 3):
        state = engine.insert(prefix, state, slot, SlotSettings(budget=50, seed=3))
    state, few = engine.generate(weights, state, rows=1)
    assert few.data.shape[0] == 1
    state, every = engine.generate(weights, state)
    low, high = runs(every, [0, 3])
    (start,) = runs(few, [0])
    np.testing.assert_array_equal(high.token_ids, start.token_ids)
    assert int(every.get_result_at_slot(0).lengths[0]) == 4 and int(every.get_result_at_slot(3).lengths[0]) == 2
    assert len(low.token_ids) == 2


def test_an_engine_with_bfloat16_compute_keeps_its_cache_in_bfloat16() -> None:
    policy = dataclasses.replace(tiny.POLICY, compute_dtype="bfloat16")
    engine = PolicyEngine(policy, tiny.engine().config, jax.devices()[2])
    weights, state = engine.load_params(), engine.init_decode_state()
    prefix = engine.prefill(params=weights, padded_tokens=np.pad(tiny.prompt(2, 6), (0, 2)), true_length=6)
    state = engine.insert(prefix, state, 0, SlotSettings(budget=5))
    state, result = engine.generate(weights, state, rows=1)
    (run,) = runs(result, [0])
    assert state.rows.k_LBKTC.dtype == "bfloat16" and state.rows.k_LBKTC.devices() == {jax.devices()[2]}
    assert np.isfinite(run.logprobs).all() and (run.logprobs < 0).all()


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
        expected += [int(token) for run in runs(result, [0]) for token in run.token_ids]
    assert tokens == expected[:4]


def test_published_weights_survive_the_donation_of_the_learners_buffers() -> None:
    engine = tiny.engine()
    given = jax.device_put(tiny.params(1), engine.device)
    expected = jax.tree.map(np.asarray, given)
    box = engine.load_params(tiny.params(0))
    box.publish(given, 7)
    jax.tree.map(lambda x: x.delete(), given)
    assert box.current.version == 7
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, box.current.params), expected)


def test_weights_sharded_over_a_mesh_are_gathered_on_the_engines_device() -> None:
    engine = tiny.engine()
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    given = jax.tree.map(lambda x: jax.device_put(x, sharding), tiny.params(1))
    box = engine.load_params(tiny.params(0))
    box.publish(given, 1)
    for leaf, expected in zip(jax.tree.leaves(box.current.params), jax.tree.leaves(tiny.params(1)), strict=True):
        assert leaf.devices() == {engine.device}
        np.testing.assert_array_equal(leaf, expected)


def test_weights_of_another_model_are_refused_by_name() -> None:
    box = tiny.engine().load_params()
    other = jax.tree.map(lambda x: x[..., :1], tiny.params())
    with pytest.raises(EngineError, match=r"another model: at .*blocks.*given .* expected"):
        box.publish(other, 1)
    with pytest.raises(EngineError, match="version 2147483648: expected 0 to 2147483647"):
        box.publish(tiny.params(), 2**31)


def test_impossible_settings_are_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"engine.slots is 0; expected at least 1"):
        EngineConfig(slots=0)
    with pytest.raises(ConfigError, match=r"engine.seed is -1; expected at least 0"):
        EngineConfig(seed=-1)
    with pytest.raises(ConfigError, match="increasing"):
        EngineConfig(prefill_buckets=(64, 16))
    assert SlotSettings(budget=1, law=SamplingLaw(), seed=-1).arrays(2)["key"].tolist() == [2**32 - 1, 2**32 - 1]
