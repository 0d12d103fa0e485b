from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.models.dense import linear, rms_norm, silu_gated, unembed


@pytest.mark.parametrize(
    ("formula", "shape", "contracted"), [("btd,dhc->bthc", (6, 3, 4), 1), ("bthc,hcd->btd", (2, 3, 6), 2)]
)
def test_a_linear_map_and_its_gradients_are_those_of_autodiff(
    formula: str, shape: tuple[int, ...], contracted: int
) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, 5, *shape[:contracted])))
        weight = jnp.asarray(rng.normal(size=shape))
        ours, back = jax.vjp(lambda x, w: linear(x, w, contracted), x, weight)
        oracle, oracle_back = jax.vjp(lambda x, w: jnp.einsum(formula, x, w), x, weight)
        cotangent = jnp.asarray(rng.normal(size=oracle.shape))

        np.testing.assert_allclose(ours, oracle, rtol=1e-12)
        for a, b in zip(back(cotangent), oracle_back(cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_a_gated_unit_keeps_two_arrays_and_has_the_gradient_of_autodiff() -> None:
    with jax.enable_x64(True):
        gate, up, cotangent = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 4)) * 4) for i in range(3))
        ours, back = jax.vjp(silu_gated, gate, up)
        oracle, oracle_back = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)

        np.testing.assert_allclose(ours, oracle, rtol=1e-12)
        for a, b in zip(back(cotangent), oracle_back(cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        assert len(jax.tree.leaves(back)) == 2


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 3, 4, 6), (6,)], ids=str)
def test_a_norm_and_its_gradients_are_those_of_autodiff(shape: tuple[int, ...]) -> None:
    def formula(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 0.1) * scale.reshape((1,) * (x.ndim - 1) + (6,))

    with jax.enable_x64(True):
        x, scale, cotangent = (
            jnp.asarray(np.random.default_rng(i).normal(size=s)) for i, s in enumerate([shape, (6,), shape])
        )
        ours, back = jax.vjp(lambda x, s: rms_norm(x, s, 0.1), x, scale)
        oracle, oracle_back = jax.vjp(formula, x, scale)

        np.testing.assert_allclose(ours, oracle, rtol=1e-12)
        for a, b in zip(back(cotangent), oracle_back(cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_logits_and_their_gradients_are_those_of_autodiff() -> None:
    with jax.enable_x64(True):
        hidden, head, cotangent = (
            jnp.asarray(np.random.default_rng(i).normal(size=shape))
            for i, shape in enumerate([(2, 5, 6), (6, 9), (2, 5, 9)])
        )
        ours, back = jax.vjp(unembed, hidden, head)
        oracle, oracle_back = jax.vjp(lambda h, w: h @ w, hidden, head)

        np.testing.assert_allclose(ours, oracle, rtol=1e-12)
        for a, b in zip(back(cotangent), oracle_back(cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_bf16_operands_give_fp32_logits_and_bf16_gradients() -> None:
    hidden, head = jnp.ones((3, 4), jnp.bfloat16), jnp.full((4, 5), 1 + 2**-7, jnp.bfloat16)
    logits, back = jax.vjp(unembed, hidden, head)

    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, np.full((3, 5), 4 * (1 + 2**-7), np.float32))
    assert [x.dtype for x in back(logits)] == [jnp.bfloat16, jnp.bfloat16]
