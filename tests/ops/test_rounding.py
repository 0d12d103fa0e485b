"""What is rounded to bf16 is the same bits on both sides: of single products and sums, and of whole policies."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner import Learner, PackConfig, StepConfig, pack
from forgejax.learner.gap import GapFigures, count_by_depth, find_fresh
from forgejax.learner.packing.samples import make_turn_sample
from forgejax.models import MoEConfig, PolicyConfig, abstract_policy, init_params
from forgejax.models.dense import rms_norm
from forgejax.models.policy import DType
from forgejax.ops.rounding import AS_WRITTEN, narrow, outer_products, precision_of, product
from forgejax.rollout import Driver, EngineConfig, PolicyEngine
from forgejax.types import Completion, SampleRequest, SamplingLaw, Turn


def _bf16(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_a_row_has_the_same_product_and_norm_among_any_others(rows: int) -> None:
    x_TD, w_DF, scale_D = _bf16(0, 256, 192), _bf16(1, 192, 96), _bf16(2, 192)

    def layer(x_TD: jax.Array) -> jax.Array:
        return product(rms_norm(x_TD, scale_D, 1e-6), w_DF)

    run = jax.jit(layer, compiler_options=AS_WRITTEN)
    alone = np.concatenate([run(x_TD[at : at + rows]) for at in range(0, 48, rows)])
    np.testing.assert_array_equal(alone, np.asarray(run(x_TD))[: len(alone)])


def test_products_are_those_of_fp64_to_fp32_rounding() -> None:
    x, w, y = _bf16(0, 5, 7, 4), _bf16(1, 7, 4, 6), _bf16(2, 5, 6)
    wide = [np.asarray(each, np.float64) for each in (x, w, y)]
    np.testing.assert_allclose(product(x, w, 2), np.tensordot(wide[0], wide[1], 2), rtol=1e-5, atol=1e-5)
    assert product(x, w, 2).dtype == outer_products(x, y).dtype == jnp.float32
    outer = np.tensordot(wide[0], wide[2], axes=((0,), (0,)))
    np.testing.assert_allclose(outer_products(x, y), outer, rtol=1e-5, atol=1e-5)


def test_wide_operands_are_multiplied_at_full_precision() -> None:
    """On a TPU or GPU the default would be bf16 or TF32."""
    assert precision_of("float32") == precision_of(jnp.float64) == jax.lax.Precision.HIGHEST
    assert precision_of(jnp.bfloat16) == jax.lax.Precision.DEFAULT


@pytest.mark.parametrize("dtype", get_args(DType)[:2])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_product_of_the_sampler_names_its_precision(platform: str, dtype: DType) -> None:
    """Operands of FP32 are multiplied as such; narrow ones into FP32."""
    policy = dataclasses.replace(_SMALL["mixture"], param_dtype=dtype, compute_dtype=dtype)
    engine = PolicyEngine(policy, _ENGINE)
    slots, weights = engine.make_slots(), engine.load_params()
    traced = engine._programs.generate.trace(
        engine._programs, 4, weights.current.params, (slots._pool, slots._state), (slots._tables_SM, None), np.int32(0)
    )
    lowered = str(traced.lower(lowering_platforms=(platform,)).as_text())
    products = [line for line in lowered.splitlines() if "dot_general" in line or "ragged_dot" in line]
    assert len(products) > 10
    for line in products:
        results = line.rpartition("->")[2]
        assert "f64" not in line
        if "bf16" in line.rpartition(":")[2].partition("->")[0]:
            assert "f32" in results, line
        elif "dot_general" in line:
            assert line.count("HIGHEST") == 2, line


@pytest.mark.parametrize("direction", [1, -1])
def test_narrowing_keeps_what_bf16_holds_and_loses_nothing_on_average(direction: int) -> None:
    held = _bf16(0, 3, 512, 512).astype(jnp.float32)
    np.testing.assert_array_equal(narrow(held, jnp.bfloat16).astype(jnp.float32), held)
    moved = held + direction * 1e-5 * jnp.abs(held)  # about a five-hundredth of the gap to the next number
    change = (narrow(moved, jnp.bfloat16).astype(jnp.float32) - held) / (moved - held)
    assert abs(float(change.mean()) - 1) < 0.1  # about 1,500 elements are moved, by all of their gap
    odd = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0, 3.4e38, 1e-40])
    found = np.asarray(narrow(odd, jnp.bfloat16).astype(jnp.float32))
    assert np.isinf(found[:2]).all() and np.isnan(found[2]) and (found[3:5] == 0).all()


# -- Whole policies ----------------------------------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {"vocab_size": 128, "num_layers": 2, "d_model": 64, "d_ff": 96, "tied_embeddings": False}
_SMALL = {
    "heads of 64": PolicyConfig(num_heads=2, num_kv_heads=1, head_dim=64, **_SHAPE),
    "heads of 128": PolicyConfig(num_heads=2, num_kv_heads=2, head_dim=128, qk_norm="head", **_SHAPE),
    "mixture": PolicyConfig(
        num_heads=4, num_kv_heads=2, moe=MoEConfig(num_experts=8, experts_per_token=2, d_ff=32), **_SHAPE
    ),
}
_BOUNDS = {"heads of 64": 2e-4, "heads of 128": 2e-4, "mixture": 1e-3}
_ENGINE = EngineConfig(slots=4, max_context=256, tokens_per_step=2, prefill_buckets=(8, 32), page_tokens=4, kv_pages=72)
_PACKING = PackConfig(row_length=512, rows=1, block_size=32, trunks=False)
_ASKED = st.tuples(st.integers(0, 2), st.integers(1, 90), st.integers(1, 24), st.integers(0, 3))


def _serve(driver: Driver, asked: list[tuple[int, int, int, int]], params: Any, swap_after: int) -> list[Completion]:
    """Requests of shared prefixes, all at once; some are cancelled, and new weights come in between."""
    texts = np.random.default_rng(7).integers(0, 128, (3, 96)).astype(np.int32)
    futures = []
    for number, (text, length, tokens, fate) in enumerate(asked):
        request = SampleRequest(
            request_id=str(number), prompt_ids=texts[text, :length], max_tokens=tokens, seed=number, law=SamplingLaw()
        )
        futures.append((driver.submit(request), fate == 3))
        if number == swap_after:
            driver.publish(params, 1)
    for future, cancelled in futures:
        if cancelled:
            future.cancel()
    return [future.result(60) for future, cancelled in futures if not cancelled]


def _gap(learner: Learner, completions: list[Completion], version: int) -> dict[str, GapFigures]:
    law = SamplingLaw()
    turns = [
        Turn(index=0, completion=each, parent=None, requested_at=0.0, finished_at=0.0, requested_law=law)
        for each in completions
    ]
    packed = pack([[make_turn_sample(turn, 1.0) for turn in turns]], _PACKING)
    scored = [np.asarray(scores) for scores in learner.score(packed)]
    return count_by_depth({}, *find_fresh(scored, packed, version))


@pytest.mark.parametrize("kind", list(_SMALL))
def test_in_bf16_the_trainer_says_what_the_sampler_said_whatever_the_schedule(kind: str) -> None:
    policy = dataclasses.replace(_SMALL[kind], param_dtype="bfloat16", compute_dtype="bfloat16")
    weights = [init_params(policy, seed=seed) for seed in (0, 1)]
    learners = [Learner(abstract_policy(policy)[0], each, StepConfig(vocab_chunk=512)) for each in weights]
    engine = PolicyEngine(policy, _ENGINE)

    @given(st.lists(_ASKED, min_size=1, max_size=8), st.integers(0, 7))
    @settings(max_examples=4, deadline=None)
    def hold(asked: list[tuple[int, int, int, int]], swap_after: int) -> None:
        with Driver(engine, weights[0]) as driver:
            completions = _serve(driver, [*asked, (0, 60, 24, 0)], weights[1], swap_after)
        for version, learner in enumerate(learners):
            for band in _gap(learner, completions, version).values():
                assert band.mean <= _BOUNDS[kind]
                assert band.ess >= 0.9999

    hold()
