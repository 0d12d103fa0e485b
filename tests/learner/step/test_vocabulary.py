from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.learner.step.vocabulary import score_drawn

_V = 7


def _edges(n_edges: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Hidden states, head, tokens, temperatures and a cotangent, for two rows on one shard."""
    rng = np.random.default_rng(seed)
    lead = (2, 1, n_edges)
    return (
        jnp.asarray(rng.normal(size=(*lead, 3)) * 20),
        jnp.asarray(rng.normal(size=(3, _V)) * 10),
        jnp.asarray(rng.integers(0, _V, lead)),
        jnp.asarray(rng.uniform(0.5, 2.0, lead)),
        jnp.asarray(rng.normal(size=lead)),
    )


@pytest.mark.parametrize("chunk", [1, 4, 5, 9], ids=str)
def test_log_probability_entropy_and_gradients_are_those_of_a_log_softmax(chunk: int) -> None:
    """Logits large enough that a softmax without a shift would overflow in FP32; 4 does not divide the 5 edges."""
    with jax.enable_x64(True):
        hidden, head, drawn, temperature, cotangent = _edges(5)

        def law(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(hidden @ head / temperature[..., None])

        def oracle(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return jnp.take_along_axis(law(hidden, head), drawn[..., None], axis=-1)[..., 0]

        (logp, entropy), back = jax.vjp(lambda x, y: score_drawn(x, y, drawn, temperature, chunk), hidden, head)
        expected, expected_back = jax.vjp(oracle, hidden, head)
        logs = law(hidden, head)

        np.testing.assert_allclose(logp, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(entropy, -(jnp.exp(logs) * logs).sum(axis=-1), rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(back((cotangent, jnp.full_like(logp, 3.0))), expected_back(cotangent), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_fp32_keeps_its_digits_where_one_token_has_all_the_mass() -> None:
    head = jnp.asarray([[80.0, 0.0, -300.0]], jnp.float32)
    one = jnp.ones((1, 1, 1), jnp.float32)
    logp, entropy = score_drawn(one[..., None], head, jnp.zeros((1, 1, 1), jnp.int32), one, 8)

    assert float(logp[0, 0, 0]) == 0.0
    assert 0.0 <= float(entropy[0, 0, 0]) < 1e-30


@pytest.mark.parametrize(("limit", "size"), [(1, 1), (20, 16), (24, 16), (31, 16), (32, 32), (500, 32)])
def test_logits_come_in_the_fewest_chunks_that_the_limit_allows(limit: int, size: int) -> None:
    """32 edges; a divisor of the limit alone would cut 20 into chunks of 4."""
    hidden, head, drawn, temperature, _ = _edges(32)
    program = str(jax.make_jaxpr(lambda x, y: score_drawn(x, y, drawn, temperature, limit))(hidden, head))

    assert set(re.findall(rf"f32\[2,1,(\d+),{_V}\]", program)) == {str(size)}


def test_the_heads_gradient_is_summed_before_it_is_rounded() -> None:
    """512 edges that each add 1 to a column: a sum in bf16 would stop at 256."""
    n = 512
    hidden = jnp.ones((1, 1, n, 1), jnp.bfloat16)
    drawn, ones = jnp.zeros((1, 1, n), jnp.int32), jnp.ones((1, 1, n), jnp.float32)
    head = jnp.zeros((1, 2), jnp.bfloat16)
    _, back = jax.vjp(lambda head: score_drawn(hidden, head, drawn, ones, 1)[0], head)

    np.testing.assert_array_equal(np.asarray(back(2 * ones)[0], np.float32), [[n, -n]])
