"""The optimizer step as pure functions: gradients of micro-batches are summed, then applied once.

``start`` and ``accumulate`` and ``apply`` are pure and jitted; between two calls of ``accumulate`` the devices are
free for other programs. The loss is the sum over terms of ``weight * correction * loss(term)``, and the weights carry
the normaliser of the whole step, so that the split into micro-batches changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from forgejax.errors import ConfigError
from forgejax.learner.packing.batch import PackedBatch
from forgejax.learner.step.forward import ForwardPass
from forgejax.learner.step.losses import LossConfig
from forgejax.learner.step.measure import Tally, tally_terms
from forgejax.learner.step.objective import sum_objective
from forgejax.learner.step.optimizer import OptimizerConfig, clip_gradients, make_optimizer, make_schedule
from forgejax.models import Kept
from forgejax.models.moe import RouterLoad
from forgejax.ops.rounding import AS_WRITTEN, narrow
from forgejax.sharding import ONE_DEVICE, Layout

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Loss, optimizer and memory of the train step.

    ``keep``: what each layer keeps for the backward pass, the rest being computed again (``step/memory.py`` tells
    what each costs); ``auto``: as much as ``activation_gib`` GiB a device hold. ``vocab_chunk``: the most edges of a
    row whose logits exist at a time; where one chunk holds them all their exponentials are kept, else computed twice.
    """

    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    keep: Literal["auto"] | Kept = "auto"
    activation_gib: float = 4.0
    vocab_chunk: int = 256

    def __post_init__(self) -> None:
        if self.vocab_chunk < 1:
            raise ConfigError(f"step.vocab_chunk is {self.vocab_chunk}; expected at least 1 edge")
        if not 0 <= self.activation_gib < float("inf"):
            raise ConfigError(f"step.activation_gib is {self.activation_gib}; expected GiB of memory, finite")

    def ending_at(self, steps: int) -> StepConfig:
        """The same for a run of so many steps, which the learning rate's schedule follows unless it has its own."""
        return dataclasses.replace(self, optimizer=self.optimizer.ending_at(steps))

    def forward_pass(self, graphdef: Any, layout: Layout) -> ForwardPass:
        """The forward pass of a policy within this memory."""
        return ForwardPass(
            graphdef=graphdef,
            layout=layout,
            keep=self.keep,
            activation_gib=self.activation_gib,
            vocab_chunk=self.vocab_chunk,
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What training goes on from: the master weights, optimizer state, and the number of updates applied.

    ``params`` are in FP32 (FP64 stays), whatever the policy runs in: an update at RL's learning rates is far smaller
    than the last bit of a bf16 weight, and would be rounded away (arXiv 1710.03740 §3.1). What runs is a cast of them.
    Skipped steps do not count in ``step``.
    """

    params: Any
    opt_state: Any
    step: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["grads", "tally"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulated:
    """Gradients, in FP32 (FP64 for FP64 weights), and figures summed over micro-batches."""

    grads: Any
    tally: Any  # a Tally


def add_gradients(sums: Any, primals: tuple[Any, ...], pull_back: Any, cotangent: Any) -> Any:
    """``sums`` with what ``pull_back(cotangent)`` gives added inside the backward pass.

    A layer's gradient goes into its slice of the sum as soon as it is there. Added up afterwards, those of all layers
    would exist at once beside their sums, and be written and read once more. That is so still for weights narrower than
    their sum: the backward pass adds to arrays of the gradient's own dtype alone.

    Args:
        sums: one tree for each of the primals, in FP32 or wider.
        primals: what the function was differentiated at.
        pull_back: of ``jax.vjp(function, *primals)``.
        cotangent: of the function's result.
    """

    def own(total: jax.Array, x: jax.Array) -> bool:
        return bool(total.dtype == x.dtype)

    refs = jax.tree.map(lambda total, x: jax.new_ref(total if own(total, x) else jnp.zeros_like(x)), sums, primals)
    pull_back.with_refs(*refs)(cotangent)
    added = jax.tree.map(jax.freeze, refs)
    return jax.tree.map(lambda total, x, new: new if own(total, x) else total + new, sums, primals, added)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """The jitted functions of one policy, loss, optimizer and layout.

    Attributes:
        init: ``params -> TrainState``, on a copy of the params.
        cast: the weights in the policy's dtype, out of those of a ``TrainState``; the same arrays where that is theirs.
        start: ``weights -> Accumulated`` of nothing.
        accumulate: ``(weights, accumulated, batch, version) -> Accumulated``; consumes ``accumulated``. ``version``
            is the policy version of the weights: log-probability gaps are measured on the terms it drew.
        apply: ``(state, accumulated) -> (TrainState, metrics)``; consumes the state. Where the loss or the gradient
            norm is not finite the state comes back as it was, and the metric ``skipped`` is 1.
        score: ``(weights, batch) -> [B, M]`` log-probabilities of the terms, whole on every device.
    """

    init: Callable[[Any], TrainState]
    cast: Callable[[Any], Any]
    start: Callable[[Any], Accumulated]
    accumulate: Callable[[Any, Accumulated, PackedBatch, Any], Accumulated]
    apply: Callable[[TrainState, Accumulated], tuple[TrainState, Metrics]]
    score: Callable[[Any, PackedBatch], jax.Array]


def make_train_step(
    graphdef: Any, abstract_params: Any, config: StepConfig, *, layout: Layout = ONE_DEVICE
) -> TrainStep:
    """Builds the jitted functions; nothing compiles before the first call with a new shape.

    Args:
        graphdef: structure of the policy, from ``nnx.split``.
        abstract_params: its weights, or their shapes alone.
        config: loss, optimizer, memory.
        layout: where weights, optimizer state and batches lie.
    """
    optimizer = make_optimizer(config.optimizer)
    forward = config.forward_pass(graphdef, layout)

    def init(params: Any) -> TrainState:
        wide = _wide(params)
        return TrainState(params=wide, opt_state=optimizer.init(wide), step=jnp.zeros((), jnp.int32))

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda x, like: narrow(x, like.dtype), params, abstract_params)

    def start(params: Any) -> Accumulated:
        zeros = jax.tree.map(jnp.zeros_like, _wide(params))
        return Accumulated(
            grads=zeros, tally=_nothing(jax.tree.leaves(zeros)[0].dtype, nnx.merge(graphdef, params).no_router_load())
        )

    def accumulate(params: Any, accumulated: Accumulated, batch: PackedBatch, version: jax.Array) -> Accumulated:
        def loss(params: Any) -> tuple[jax.Array, Tally]:
            return sum_objective(forward.terms(params, batch), batch, version, config.loss)

        value, pull_back, counted = jax.vjp(loss, params, has_aux=True)
        (grads,) = add_gradients((accumulated.grads,), (params,), pull_back, jnp.ones_like(value))
        return Accumulated(grads=grads, tally=accumulated.tally.merge(counted))

    def apply(state: TrainState, accumulated: Accumulated) -> tuple[TrainState, Metrics]:
        return _apply(optimizer, config.optimizer, state, accumulated, cast)

    def score(params: Any, batch: PackedBatch) -> jax.Array:
        return forward.terms(params, batch)[0]

    state, sums, weights = (
        layout.shardings(jax.eval_shape(function, abstract_params)) for function in (init, start, cast)
    )
    is_cast = any(jnp.promote_types(x.dtype, jnp.float32) != x.dtype for x in jax.tree.leaves(abstract_params))
    return TrainStep(
        init=jit_on(init, layout, state),
        cast=jit_on(cast, layout, weights) if is_cast else lambda params: params,
        start=jit_on(start, layout, sums),
        accumulate=jit_on(accumulate, layout, sums, donate=(1,)),
        apply=jit_on(apply, layout, (state, layout.sharding()), donate=(0,)),
        score=jit_on(score, layout, layout.sharding()),
    )


def _apply(
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    state: TrainState,
    accumulated: Accumulated,
    cast: Callable[[Any], Any],
) -> tuple[TrainState, Metrics]:
    norm = optax.tree.norm(accumulated.grads)
    sound = jnp.isfinite(norm) & jnp.isfinite(accumulated.tally.loss)

    def updated(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any, Metrics]:
        updates, opt_state = optimizer.update(clip_gradients(grads, norm, config), opt_state, params)
        new = optax.apply_updates(params, updates)
        return new, opt_state, _measure_update(params, updates, cast(params), cast(new))

    def left_alone(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any, Metrics]:
        return params, opt_state, {name: jnp.zeros((), norm.dtype) for name in ("update_to_weight", "moved_weights")}

    # A branch, not a choice between two results for every weight: that would move half as many bytes again.
    params, opt_state, moved = jax.lax.cond(
        sound, updated, left_alone, state.params, state.opt_state, accumulated.grads
    )
    metrics = accumulated.tally.metrics() | moved
    metrics |= {
        "grad_norm": norm,
        "skipped": 1 - sound.astype(jnp.int32),
        "learning_rate": make_schedule(config)(state.step),
    }
    return TrainState(params=params, opt_state=opt_state, step=state.step + sound.astype(jnp.int32)), metrics


def _measure_update(params: Any, updates: Any, before: Any, after: Any) -> Metrics:
    """The length of the update over that of the weights, and the share of the weights that run which it moves."""
    moved = jax.tree.map(lambda x, y: jnp.sum(x != y, dtype=jnp.float32), before, after)
    count = sum(x.size for x in jax.tree.leaves(params))  # may be more than an int32 holds
    norm = optax.tree.norm(updates)
    return {
        "update_to_weight": norm / optax.tree.norm(params),
        "moved_weights": (optax.tree.sum(moved) / float(count)).astype(norm.dtype),
    }


def _wide(params: Any) -> Any:
    """The weights in FP32 (FP64 stays): the dtype of gradients and moments."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)


def _nothing(real: Any, router: RouterLoad | None) -> Tally:
    none = jnp.zeros((1, 1), jnp.bool_)
    zero = jnp.zeros((1, 1), real)
    return tally_terms(
        loss=jnp.zeros((), real),
        logp=zero,
        old_logp=zero,
        ratio=zero,
        entropy=zero,
        clipped=none,
        mask=none,
        fresh=none,
        router=router,
    )


def jit_on(function: Callable[..., Any], layout: Layout, out: Any, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
    """jit, traced inside the layout's scope.

    Args:
        function: a pure function.
        layout: where its arrays lie.
        out: the shardings of what it gives; None, whole or for a part, leaves them to the compiler.
        donate: the arguments that it consumes.
    """

    @functools.wraps(function)
    def scoped(*args: Any) -> Any:
        with layout.scope():
            return function(*args)

    return layout.in_turn(jax.jit(scoped, donate_argnums=donate, out_shardings=out, compiler_options=AS_WRITTEN))
