"""Laws of the decoder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from forgejax.errors import ConfigError
from forgejax.models import Kept, Policy, PolicyConfig, abstract_policy, count_params
from forgejax.models.dense import rms_norm
from forgejax.models.moe import MoEConfig
from forgejax.models.rope import RopeConfig, rotate, rotation_of
from tests.models.reference import causal, decoder_logits, weights_of

SMALL = PolicyConfig(
    vocab_size=23, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, param_dtype="float64"
)
SMALL = dataclasses.replace(SMALL, compute_dtype="float64")


def drawn(config: PolicyConfig) -> Any:
    """Weights where no norm is one, no bias zero and nothing small, so that a forgotten term shows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(0.1, 0.3, w.shape), w.dtype), abstract_policy(config)[1])


def positions_of(tokens_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)


@functools.partial(jax.jit, static_argnames=("config", "keep"))
def logits_of(config: PolicyConfig, params: Any, tokens_BT: jax.Array, shift: int = 0, keep: Kept = "all") -> jax.Array:
    policy = nnx.merge(abstract_policy(config)[0], params)
    return policy.logits(policy(tokens_BT, positions_of(tokens_BT) + shift, causal, keep=keep)[0])


def tokens_of(config: PolicyConfig, rows: int, length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)), jnp.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False},
        {"qk_norm": "head"},
        {"attention_bias": True},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "head_dim": 6, "rope": RopeConfig(theta=500.0), "norm_eps": 1e-2},
        {"tied_embeddings": False, "qk_norm": "head", "attention_bias": True, "num_layers": 1},
        {"qk_norm": "full", "rope": RopeConfig(rotary_dim=2)},
        {"rope": RopeConfig(scaling="yarn", factor=4.0, original_positions=32, theta=50.0)},
        {"moe": MoEConfig(num_experts=6, experts_per_token=2, d_ff=10)},
        {"moe": MoEConfig(num_experts=5, experts_per_token=3, normalize=False, scale=0.5), "qk_norm": "head"},
        {
            "moe": MoEConfig(num_experts=6, experts_per_token=2, router="sigmoid", correction_bias=True),
            "qk_norm": "full",
            "rope": RopeConfig(rotary_dim=2),
        },
    ],
)
def test_logits_are_those_of_the_decoder_written_out_in_numpy(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **changes)
    with jax.enable_x64(True):
        params = drawn(config)
        tokens = tokens_of(config, 2, 9)
        ours = np.asarray(logits_of(config, params, tokens))
        for row in range(2):
            np.testing.assert_allclose(
                ours[row], decoder_logits(config, weights_of(params), tokens[row].tolist()), rtol=0, atol=1e-10
            )


def test_scores_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8))) for _ in range(2))

        def score(at: int, distance: int) -> float:
            turned_q, turned_k = (
                rotate(x, rotation_of(RopeConfig(), 8, jnp.full((1, 1), p, jnp.int32), x.dtype))
                for x, p in ((q, at + distance), (k, at))
            )
            return float(jnp.sum(turned_q * turned_k))

        assert score(5, 3) == pytest.approx(score(40_000, 3), abs=1e-9)
        assert abs(score(5, 3) - score(5, 4)) > 1e-3
        assert score(7, 0) == pytest.approx(float(jnp.sum(q * k)), abs=1e-12)


def test_shifting_all_positions_of_a_sequence_changes_nothing() -> None:
    with jax.enable_x64(True):
        params, tokens = drawn(SMALL), tokens_of(SMALL, 1, 7)
        here, there = (logits_of(SMALL, params, tokens, shift) for shift in (0, 1000))
        np.testing.assert_allclose(here, there, atol=1e-9)


def test_rms_norm_of_bf16_accumulates_in_fp32() -> None:
    x = np.random.default_rng(0).normal(3.0, 1.0, (4, 4096)).astype(jnp.bfloat16)
    scale = np.full(4096, 1.5, np.float32)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * 1.5
    ours = rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-6)
    assert ours.dtype == jnp.bfloat16
    # Only ties of the last bit may fall the other way; a norm summed in bf16 is off by a bit in one of two places.
    assert np.mean(np.asarray(ours) == exact.astype(jnp.bfloat16)) > 0.999


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_logits_of_a_bf16_policy_are_fp32_products_of_its_hidden_states(param_dtype: Any) -> None:
    config = PolicyConfig(num_layers=1, d_model=256, param_dtype=param_dtype, compute_dtype="bfloat16")
    policy = nnx.merge(abstract_policy(config)[0], drawn(config))
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(16, 256)), jnp.bfloat16)
    logits = policy.logits(hidden)
    assert logits.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(policy.embedding[...], np.float64).T
    assert np.max(np.abs(np.asarray(logits, np.float64) - exact)) < 1e-5 * np.max(np.abs(exact))


def test_gradients_of_a_repeated_token_add_up_in_the_dtype_of_the_parameters() -> None:
    """Of 4,096 gradients of one kind a bf16 sum would keep no more than the first few hundred."""
    wide = PolicyConfig(vocab_size=4, num_layers=1, d_model=8, num_heads=2, tied_embeddings=False)
    params, tokens = drawn(wide), jnp.zeros((1, 4096), jnp.int32)

    def gradient(config: PolicyConfig) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            policy = nnx.merge(abstract_policy(config)[0], params)
            hidden, _ = policy(tokens, tokens, lambda layer, q, k, v, memory: (q, memory))
            return jnp.sum(hidden[..., :3].astype(jnp.float32))

        return jax.jit(jax.grad(loss))(params)["embedding"][...][0]

    narrow, exact = gradient(dataclasses.replace(wide, compute_dtype="bfloat16")), gradient(wide)
    assert float(jnp.max(jnp.abs(narrow - exact)) / jnp.max(jnp.abs(exact))) < 0.05


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 23 * 16 + 16 + 3 * (2 * 16 + 16 * 4 * (4 + 2 + 2 + 4) + 3 * 16 * 24)),
        ({"tied_embeddings": False}, 2 * 23 * 16 + 16 + 3 * (2 * 16 + 16 * 4 * 12 + 3 * 16 * 24)),
        ({"qk_norm": "full"}, 23 * 16 + 16 + 3 * (2 * 16 + (4 + 2) * 4 + 16 * 4 * 12 + 3 * 16 * 24)),
        (
            {"moe": MoEConfig(num_experts=6, d_ff=10, experts_per_token=2, correction_bias=True)},
            23 * 16 + 16 + 3 * (2 * 16 + 16 * 4 * 12 + 16 * 6 + 6 + 6 * 3 * 16 * 10),
        ),
        ({"qk_norm": "head"}, 23 * 16 + 16 + 3 * (2 * 16 + 2 * 4 + 16 * 4 * 12 + 3 * 16 * 24)),
        ({"attention_bias": True}, 23 * 16 + 16 + 3 * (2 * 16 + 4 * (4 + 2 + 2) + 16 * 4 * 12 + 3 * 16 * 24)),
    ],
)
def test_the_parameters_are_counted_by_their_formula(changes: dict[str, Any], count: int) -> None:
    config = dataclasses.replace(SMALL, param_dtype="float32", **changes)
    assert count_params(abstract_policy(config)[1]) == count


def test_the_scan_over_layers_is_the_loop_over_layers() -> None:
    with jax.enable_x64(True):
        params = drawn(SMALL)
        policy: Policy = nnx.merge(abstract_policy(SMALL)[0], params)
        tokens, positions = tokens_of(SMALL, 2, 6), jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))
        x_BTD = policy.embedding[...][tokens]
        rotation = rotation_of(SMALL.rope, SMALL.head_size, positions, x_BTD.dtype)
        graphdef, stacked = nnx.split(policy.blocks)
        for layer in range(SMALL.num_layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda w, layer=layer: w[layer], stacked))
            x_BTD, _, _ = block(jnp.asarray(layer), x_BTD, rotation, causal, None)
        looped = rms_norm(x_BTD, policy.final_norm[...], SMALL.norm_eps)
        np.testing.assert_allclose(policy(tokens, positions, causal)[0], looped, atol=1e-12)


def test_layers_hand_their_memory_on_in_order() -> None:
    def counting(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        seen, calls = memory
        return jnp.zeros_like(q), (seen.at[calls].set(layer), calls + 1)

    config = dataclasses.replace(SMALL, param_dtype="float32", compute_dtype="float32")
    policy = nnx.merge(abstract_policy(config)[0], drawn(config))
    memory = (jnp.full((3,), -1, jnp.int32), jnp.int32(0))
    seen, calls = policy(tokens_of(config, 1, 4), jnp.zeros((1, 4), jnp.int32), counting, memory)[1]
    assert (seen.tolist(), int(calls)) == ([0, 1, 2], 3)


def test_what_layers_keep_changes_no_gradient() -> None:
    with jax.enable_x64(True):
        params, tokens = drawn(SMALL), tokens_of(SMALL, 2, 6)

        @functools.partial(jax.jit, static_argnums=1)
        def gradient(params: Any, keep: Kept) -> Any:
            return jax.grad(lambda p: jnp.sum(jnp.sin(logits_of(SMALL, p, tokens, keep=keep))))(params)

        plain = gradient(params, "all")
        for keep in ("products", "attention", "nothing", "share"):
            again = gradient(params, keep)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), plain, again)


def test_a_token_never_sees_a_later_one() -> None:
    with jax.enable_x64(True):
        params, tokens = drawn(SMALL), tokens_of(SMALL, 1, 8)
        changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % SMALL.vocab_size)
        before, after = logits_of(SMALL, params, tokens), logits_of(SMALL, params, changed)
        np.testing.assert_allclose(before[0, :5], after[0, :5], atol=1e-13)
        assert float(jnp.max(jnp.abs(before[0, 5:] - after[0, 5:]))) > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, r"policy.num_layers is 0; expected a positive count"),
        ({"num_heads": 6}, r"num_heads 6 is not a multiple of policy.num_kv_heads 4"),
        ({"num_heads": 12, "num_kv_heads": 4}, r"d_model 128 is no multiple of policy.num_heads 12: set head_dim"),
        ({"head_dim": 7}, r"head_dim 7 is odd"),
        ({"head_dim": -2}, r"head_dim is -2"),
        ({"rope": RopeConfig(rotary_dim=48)}, r"rotary_dim is 48; a head has 32 numbers"),
        ({"norm_eps": -1.0}, r"norm_eps is -1.0"),
    ],
)
def test_an_impossible_shape_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PolicyConfig(**({"num_kv_heads": 4} | changes))
