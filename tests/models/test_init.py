"""Laws of fresh weights."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from forgejax.errors import MeshError
from forgejax.models import PolicyConfig, abstract_policy, count_params, init_params
from forgejax.sharding import Layout, MeshConfig, build_mesh, resolve
from tests.models.reference import causal

MILLION = PolicyConfig(num_layers=5)
SMALL = PolicyConfig(num_layers=2, d_model=32, d_ff=64, vocab_size=64)


def loss_of(config: PolicyConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    policy = nnx.merge(abstract_policy(config)[0], params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    logp = jax.nn.log_softmax(policy.logits(policy(tokens_BT, positions_BT, causal)[0])[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1))


def test_the_same_seed_gives_the_same_weights_in_every_layout() -> None:
    config = dataclasses.replace(SMALL, qk_norm="head", attention_bias=True, tied_embeddings=False)
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-4"))))
    alone, split = init_params(config, seed=7), init_params(config, layout, 7)
    jax.tree.map(np.testing.assert_array_equal, alone, split)
    other = init_params(config, layout, 8)
    assert float(jnp.max(jnp.abs(other["embedding"][...] - split["embedding"][...]))) > 0.01


def test_each_device_holds_only_its_own_part() -> None:
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-4"))))
    params = init_params(SMALL, layout)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
    norms = (2 * SMALL.num_layers + 1) * SMALL.d_model  # replicated; everything else falls into four
    assert held == (count_params(params) - norms) // 4 + norms
    assert params["blocks"]["q"][...].sharding.spec == P(None, "fsdp", "tensor", None)


def test_a_model_that_does_not_fit_the_mesh_is_refused_before_anything_is_drawn() -> None:
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-8", tensor=8))))
    with pytest.raises(MeshError, match=r"heads dimension 4 does not divide over tensor 8"):
        init_params(PolicyConfig(), layout)


def test_fresh_logits_have_unit_variance_so_the_loss_starts_half_a_nat_above_uniform() -> None:
    params = init_params(MILLION)
    assert 0.9e6 < count_params(params) < 1.2e6
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MILLION.vocab_size, (4, 32)), jnp.int32)
    assert float(loss_of(MILLION, params, tokens)) == pytest.approx(math.log(MILLION.vocab_size) + 0.5, abs=0.15)


def test_a_mesh_changes_neither_loss_nor_gradient_and_gradients_keep_the_split_of_their_weights() -> None:
    config = SMALL
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-4"))))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)), jnp.int32)

    def scoped(params: Any, tokens: jax.Array) -> jax.Array:
        with layout.scope():
            return loss_of(config, params, tokens)

    split = init_params(config, layout)
    loss, grads = jax.jit(jax.value_and_grad(scoped))(split, jax.device_put(tokens, layout.sharding("rows")))
    alone = jax.jit(jax.value_and_grad(lambda p, t: loss_of(config, p, t)))(init_params(config), tokens)
    assert float(loss) == pytest.approx(float(alone[0]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, alone[1])
    wanted = layout.placements(abstract_policy(config)[1])["blocks"]
    for grad, sharding in zip(jax.tree.leaves(grads["blocks"]), jax.tree.leaves(wanted), strict=True):
        assert grad.sharding.is_equivalent_to(sharding, grad.ndim), (grad.sharding, sharding)
