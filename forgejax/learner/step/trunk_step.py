"""The two-phase step: a prefix that does not fit beside what follows it runs once for several micro-batches.

``trunk`` keeps the keys and values of every layer; the micro-batches of leaves attend over them and over their own, and
the gradients of the trunk's keys and values add up; ``pull_back`` then takes them, with the loss of the trunk's own
terms, through the trunk to the weights. That is the chain rule and nothing else: the gradient is the one of rows that
each repeat the trunk, at the cost of one forward pass of the trunk more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from forgejax.errors import ConfigError
from forgejax.learner.packing.batch import PackedBatch
from forgejax.learner.step.measure import Tally
from forgejax.learner.step.objective import Terms, sum_objective
from forgejax.learner.step.train_step import Accumulated, StepConfig, add_gradients, jit_on
from forgejax.models import Attend
from forgejax.sharding import ONE_DEVICE, Layout, constrain


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkKV:
    """Rotated keys and values of a trunk [L, B, T, K, C], or of one of its layers [B, T, K, C]; or their gradients."""

    k: Any
    v: Any


Sums = tuple[Accumulated, TrunkKV]
"""Gradients of the weights with their figures, and those of a trunk's keys and values, summed over micro-batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkStep:
    """The jitted functions of a step in two phases.

    Attributes:
        trunk: ``(params, batch) -> (kv, d_kv)`` of a trunk's batch; ``d_kv`` are zeros in the dtype of gradients.
        accumulate_leaves: ``(params, kv, (accumulated, d_kv), batch, version) -> (accumulated, d_kv)``; consumes the
            pair.
        pull_back: ``(params, accumulated, d_kv, batch, version) -> accumulated`` once all leaves are in; ``batch`` is
            the trunk's. Consumes ``accumulated``.
        score_leaves: ``(params, kv, batch) -> [B, M]`` log-probabilities of the leaves' terms.
    """

    trunk: Callable[[Any, PackedBatch], tuple[TrunkKV, TrunkKV]]
    accumulate_leaves: Callable[[Any, TrunkKV, Sums, PackedBatch, Any], Sums]
    pull_back: Callable[[Any, Accumulated, TrunkKV, PackedBatch, Any], Accumulated]
    score_leaves: Callable[[Any, TrunkKV, PackedBatch], jax.Array]


def make_trunk_step(
    graphdef: Any,
    abstract_params: Any,
    config: StepConfig,
    *,
    start: Callable[[Any], Accumulated],
    layout: Layout = ONE_DEVICE,
) -> TrunkStep:
    """Builds the functions beside a ``TrainStep``, whose ``start`` this takes; nothing compiles before the first call.

    The layout may split rows, weights and heads.

    Raises:
        ConfigError: it splits the length of rows.
    """
    _require_whole_rows(layout)
    forward = config.forward_pass(graphdef, layout)

    def of_trunk(params: Any, batch: PackedBatch) -> tuple[Terms, TrunkKV]:
        return forward.terms_beside(params, batch, _keeping_kv, None)

    def of_leaves(params: Any, kv: TrunkKV, batch: PackedBatch) -> Terms:
        return forward.terms_beside(params, batch, _behind_trunk, kv)[0]

    def trunk(params: Any, batch: PackedBatch) -> tuple[TrunkKV, TrunkKV]:
        kv = of_trunk(params, batch)[1]
        return kv, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), kv)

    def accumulate_leaves(params: Any, kv: TrunkKV, sums: Sums, batch: PackedBatch, version: jax.Array) -> Sums:
        def loss(params: Any, kv: TrunkKV) -> tuple[jax.Array, Tally]:
            return sum_objective(of_leaves(params, kv, batch), batch, version, config.loss)

        accumulated, d_kv = sums
        value, pull_back, counted = jax.vjp(loss, params, kv, has_aux=True)
        grads, d_kv = add_gradients((accumulated.grads, d_kv), (params, kv), pull_back, jnp.ones_like(value))
        return Accumulated(grads=grads, tally=accumulated.tally.merge(counted)), d_kv

    def pull_back(
        params: Any, accumulated: Accumulated, d_kv: TrunkKV, batch: PackedBatch, version: jax.Array
    ) -> Accumulated:
        def run(params: Any) -> tuple[tuple[jax.Array, TrunkKV], Tally]:
            terms, kv = of_trunk(params, batch)
            loss, counted = sum_objective(terms, batch, version, config.loss)
            return (loss, kv), counted

        (loss, kv), back, counted = jax.vjp(run, params, has_aux=True)
        cotangent = jnp.ones_like(loss), jax.tree.map(lambda d, x: d.astype(x.dtype), d_kv, kv)
        (grads,) = add_gradients((accumulated.grads,), (params,), back, cotangent)
        return Accumulated(grads=grads, tally=accumulated.tally.merge(counted))

    def score_leaves(params: Any, kv: TrunkKV, batch: PackedBatch) -> jax.Array:
        return of_leaves(params, kv, batch)[0]

    sums, kv = layout.shardings(jax.eval_shape(start, abstract_params)), _lay_kv(graphdef, abstract_params, layout)
    return TrunkStep(
        trunk=jit_on(trunk, layout, (kv, kv)),
        accumulate_leaves=jit_on(accumulate_leaves, layout, (sums, kv), donate=(2,)),
        pull_back=jit_on(pull_back, layout, sums, donate=(1,)),
        score_leaves=jit_on(score_leaves, layout, layout.sharding()),
    )


def _lay_kv(graphdef: Any, abstract_params: Any, layout: Layout) -> Any:
    """How the keys and values of a trunk lie on the devices."""
    num_kv_heads = nnx.merge(graphdef, abstract_params).config.num_kv_heads
    return layout.sharding(None, "rows", None, "heads" if layout.kv_heads_axis(num_kv_heads) else None, None)


def _require_whole_rows(layout: Layout) -> None:
    if axes := layout.axes("length"):
        raise ConfigError(
            f"packing.trunks on a mesh that splits rows over {' and '.join(axes)}: trunks "
            "stay on the device of their leaves; set packing.trunks = false, or mesh.context = 1"
        )


def _keeping_kv(attend: Attend) -> Attend:
    """Leaves each layer's keys and values behind."""

    def kept(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: Any) -> tuple[jax.Array, TrunkKV]:
        k, v = (constrain(x, "rows", "length", "kv_heads", None) for x in (k, v))
        return attend(layer, q, k, v, None)[0], TrunkKV(k=k, v=v)

    return kept


def _behind_trunk(attend: Attend) -> Attend:
    """Attends over the trunk's keys and values, then its own."""

    def behind(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: TrunkKV) -> tuple[jax.Array, None]:
        k, v = jnp.concatenate([memory.k, k], axis=1), jnp.concatenate([memory.v, v], axis=1)
        return attend(layer, q, k, v, None)[0], None

    return behind
