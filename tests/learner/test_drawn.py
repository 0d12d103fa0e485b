from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.learner.drawn import drawn_logps


def test_log_probability_entropy_and_gradient_are_those_of_a_log_softmax() -> None:
    """Logits large enough that a softmax without a shift would overflow in FP32."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits = jnp.asarray(rng.normal(size=(2, 5, 7)) * 200)
        drawn = jnp.asarray(rng.integers(0, 7, (2, 5)))
        temperature = jnp.asarray(rng.uniform(0.5, 2.0, (2, 5)))
        cotangent = jnp.asarray(rng.normal(size=(2, 5)))

        def oracle(logits: jax.Array) -> jax.Array:
            law = jax.nn.log_softmax(logits / temperature[..., None])
            return jnp.take_along_axis(law, drawn[..., None], axis=-1)[..., 0]

        (logp, entropy), back = jax.vjp(lambda x: drawn_logps(x, drawn, temperature), logits)
        expected, expected_back = jax.vjp(oracle, logits)
        law = jax.nn.log_softmax(logits / temperature[..., None])

        np.testing.assert_allclose(logp, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(entropy, -(jnp.exp(law) * law).sum(axis=-1), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            back((cotangent, jnp.full((2, 5), 3.0)))[0], expected_back(cotangent)[0], rtol=1e-12, atol=1e-14
        )


def test_fp32_keeps_its_digits_where_one_token_has_all_the_mass() -> None:
    logits = jnp.asarray([[[80.0, 0.0, -300.0]]], jnp.float32)
    logp, entropy = drawn_logps(logits, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32))

    assert float(logp[0, 0]) == 0.0
    assert 0.0 <= float(entropy[0, 0]) < 1e-30
