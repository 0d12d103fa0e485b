"""A fresh policy: each device draws its own shard of each weight, so that no host ever holds the whole model."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from forgejax.models.policy import Policy, PolicyConfig
from forgejax.sharding import ONE_DEVICE, Layout

Params = Any
"""An ``nnx.State``: the policy's weights as a pytree."""

_CPU_COMPILER = {"xla_backend_optimization_level": 1}
"""Drawing runs once: on a CPU the full optimiser would take longer than the weights themselves."""


def abstract_policy(config: PolicyConfig) -> tuple[Any, Params]:
    """The policy's ``nnx.GraphDef`` and its weights as shapes: ``nnx.merge(graphdef, params)`` is a Policy."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Policy(config, nnx.Rngs(0))))
    return graphdef, params


def init_params(config: PolicyConfig, layout: Layout = ONE_DEVICE, seed: int = 0) -> Params:
    """Weights drawn from ``seed``, where the layout wants them.

    The same seed gives the same weights in every layout.
    """

    def draw(key: jax.Array) -> Params:
        return nnx.state(Policy(config, nnx.Rngs(params=key)))

    shardings = layout.shardings(abstract_policy(config)[1])
    options = _CPU_COMPILER if layout.platform == "cpu" else None
    params: Params = jax.jit(draw, out_shardings=shardings, compiler_options=options)(jax.random.key(seed))
    return params


def count_params(params: Params) -> int:
    """How many numbers the weights hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
