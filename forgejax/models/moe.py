"""A dropless mixture of experts: every token reaches all the experts its router chose.

The pairs of a token and one of its experts are sorted by expert, so that each expert's tokens are a run of rows, and
three ragged products make the MLPs of all of them. On a mesh each expert shard keeps its own experts for all the tokens
of its group and one sum joins the shards: with eight experts a token nearly every shard is chosen by every token, so
sending tokens only where they are wanted would save little, and would need a bound on how many are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from forgejax.errors import ConfigError
from forgejax.models.dense import silu_gated
from forgejax.models.ragged import ragged_matmul
from forgejax.ops.rounding import product, real_of, with_exact_sums
from forgejax.sharding import Layout, constrain, current_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture of every layer; ``num_experts`` of 0 is a dense MLP, and the other keys are then unused.

    Attributes:
        num_experts: X.
        experts_per_token: how many experts a token reaches.
        d_ff: width of an expert; 0 means ``policy.d_ff``.
        router: ``softmax`` over all experts (Qwen3-MoE), or the ``sigmoid`` of each (MiniMax-M2).
        correction_bias: a bias per expert on the scores that the choice is made by, and on nothing else.
        normalize: the weights of a token's experts sum to one.
        scale: multiplies the weights.
    """

    num_experts: int = 0
    experts_per_token: int = 8
    d_ff: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "d_ff"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy.moe.{name} is {getattr(self, name)}; expected a count, or 0")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"policy.moe.experts_per_token is {self.experts_per_token}; "
                f"expected 1 to the {self.num_experts} of policy.moe.num_experts"
            )
        if not 0.0 < self.scale < math.inf:
            raise ConfigError(f"policy.moe.scale is {self.scale}; expected a positive number")


class Routing(NamedTuple):
    """What the router said of each token: its experts, their weights, and the chances [B, T, X], which sum to one."""

    expert_BTk: jax.Array
    weight_BTk: jax.Array
    chance_BTX: jax.Array


class Experts(NamedTuple):
    """The MLPs of one layer: ``(silu(x @ gate) * (x @ up)) @ down``, each its own."""

    gate_XDF: Any
    up_XDF: Any
    down_XFD: Any


def route(
    x_BTD: Float[Array, "B T D"],
    router_DX: Float[Array, "D X"],
    bias_X: Float[Array, " X"] | None,
    config: MoEConfig,
) -> Routing:
    """Chooses each token's experts, in FP32 (FP64 where x is): rounding must not change the choice.

    The weights are the scores of the chosen; the correction bias moves the choice alone and has no gradient
    (arXiv 2408.15664).
    """
    operand = jnp.promote_types(x_BTD.dtype, router_DX.dtype)
    logits_BTX = product(x_BTD.astype(operand), router_DX.astype(operand))
    choose = functools.partial(_choose, config)
    if jnp.dtype(x_BTD.dtype).itemsize >= 4:
        return choose(logits_BTX.dtype, x_BTD, logits_BTX, bias_X)
    # What the weights are rounded to must not depend on the order of their sums; their gradient may.
    exact = with_exact_sums(choose, *lax.stop_gradient((x_BTD, logits_BTX, bias_X)))
    weight_BTk = _weigh(config, _score(config, logits_BTX), exact.expert_BTk)
    return exact._replace(weight_BTk=weight_BTk + lax.stop_gradient(exact.weight_BTk - weight_BTk))


def _choose(config: MoEConfig, sums: Any, x_BTD: jax.Array, logits_BTX: jax.Array, bias_X: jax.Array | None) -> Routing:
    """The routing of these logits, its sums taken in ``sums`` and given in FP32 (FP64 where x is)."""
    score_BTX, real = _score(config, logits_BTX.astype(sums)), real_of(x_BTD, logits_BTX)
    preferred_BTX = score_BTX if bias_X is None else score_BTX + bias_X.astype(sums)[None, None]
    _, expert_BTk = lax.top_k(lax.stop_gradient(preferred_BTX), config.experts_per_token)
    chance_BTX = score_BTX if config.router == "softmax" else score_BTX / score_BTX.sum(axis=-1, keepdims=True)
    weight_BTk = _weigh(config, score_BTX, expert_BTk)
    return Routing(expert_BTk=expert_BTk, weight_BTk=weight_BTk.astype(real), chance_BTX=chance_BTX.astype(real))


def _score(config: MoEConfig, logits_BTX: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits_BTX, axis=-1) if config.router == "softmax" else jax.nn.sigmoid(logits_BTX)


def _weigh(config: MoEConfig, score_BTX: jax.Array, expert_BTk: jax.Array) -> jax.Array:
    weight_BTk = jnp.take_along_axis(score_BTX, expert_BTk, axis=-1)
    if config.normalize:
        weight_BTk = weight_BTk / weight_BTk.sum(axis=-1, keepdims=True)
    return weight_BTk * config.scale


def expert_mlp(x_BTD: Float[Array, "B T D"], routing: Routing, experts: Experts) -> Float[Array, "B T D"]:
    """The weighted sum of the chosen experts' MLPs of each token, in x's dtype.

    Within a sharding ``scope`` the experts, their widths and the tokens are split as its rules say; what a device
    computes depends on its tokens, what the devices exchange does not.
    """
    layout = current_layout()
    if not layout.on_mesh:
        return _mlp_of(x_BTD, routing.weight_BTk, experts, routing.expert_BTk, 0)
    out_BTD = _on_mesh(layout, x_BTD.shape[:2])(x_BTD, routing.weight_BTk, experts, routing.expert_BTk)
    return constrain(out_BTD, "rows", "length", None)


def _on_mesh(layout: Layout, tokens: tuple[int, ...]) -> Callable[..., jax.Array]:
    """``_mlp_of`` split over a mesh, with gradients: one sum over the shards forward, one backward.

    Activations are computed again in the backward pass.
    """
    expert_axes, width_axes = layout.axes("experts"), layout.axes("expert_mlp")
    sum_axes = expert_axes + width_axes  # each shard has a part of every token's result
    token_axes = [tuple(axis for axis in layout.axes(name) if axis not in sum_axes) for name in ("rows", "length")]
    token_axes = [
        axes if size % layout.devices(*axes) == 0 else () for axes, size in zip(token_axes, tokens, strict=True)
    ]
    of_tokens = P(*(axes or None for axes in token_axes), None)
    inner, outer = P(expert_axes or None, None, width_axes or None), P(expert_axes or None, width_axes or None, None)
    of_experts = Experts(gate_XDF=inner, up_XDF=inner, down_XFD=outer)

    def own(x: jax.Array, weight: jax.Array, experts: Experts, expert: jax.Array) -> jax.Array:
        first = lax.axis_index(expert_axes) * experts.gate_XDF.shape[0] if expert_axes else 0
        return _mlp_of(x, weight, experts, expert, first)

    def forward(x: jax.Array, weight: jax.Array, experts: Experts, expert: jax.Array) -> jax.Array:
        return _joined(own(x, weight, experts, expert), sum_axes)

    def backward(x: jax.Array, weight: jax.Array, experts: Experts, expert: jax.Array, dout: jax.Array) -> tuple:
        _, pull = jax.vjp(lambda x, weight, experts: own(x, weight, experts, expert), x, weight, experts)
        dx, dweight, dexperts = pull(dout)
        return (*_joined((dx, dweight), sum_axes), _joined(dexperts, token_axes[0] + token_axes[1]))

    specs = (of_tokens, of_tokens, of_experts, of_tokens)
    run: Any = jax.custom_vjp(layout.shard_map(forward, specs, of_tokens))
    pull_back = layout.shard_map(backward, (*specs, of_tokens), (of_tokens, of_tokens, of_experts))
    run.defvjp(lambda *inputs: (run(*inputs), inputs), lambda inputs, dout: (*pull_back(*inputs, dout), None))
    split_mlp: Callable[..., jax.Array] = run
    return split_mlp


def _joined(tree: Any, axes: tuple[str, ...]) -> Any:
    return lax.psum(tree, axes) if axes else tree


def _mlp_of(
    x_BTD: jax.Array, weight_BTk: jax.Array, experts: Experts, expert_BTk: jax.Array, first: jax.Array | int
) -> jax.Array:
    """The part of the result that the experts ``first``, ``first + 1``, ... have in it. No collective."""
    own_X, copies = jnp.arange(experts.gate_XDF.shape[0]), expert_BTk.shape[-1]
    expert_A = expert_BTk.reshape(-1) - first
    # Others' pairs come after all runs: their rows are zeros and cost nothing.
    run_A = jnp.where((expert_A >= 0) & (expert_A < own_X.size), expert_A, own_X.size)
    order_A = jnp.argsort(run_A, stable=True)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.size), unique_indices=True)
    end_X = jnp.searchsorted(run_A[order_A], own_X, side="right")
    sizes_X = jnp.diff(end_X, prepend=0)

    rows_AD = _reordered(x_BTD.reshape(-1, x_BTD.shape[-1]), order_A, inverse_A, copies)
    weight_A1 = _reordered(weight_BTk.reshape(-1, 1), order_A, inverse_A, 1).astype(x_BTD.dtype)
    matrices = experts.gate_XDF, experts.up_XDF
    gate_AF, up_AF = (checkpoint_name(ragged_matmul(rows_AD, w_XDF, sizes_X), "gated") for w_XDF in matrices)
    # Weighted before the last product, whose result the gradient of the weights then does not need.
    hidden_AF = silu_gated(gate_AF, up_AF) * weight_A1
    out_AD = ragged_matmul(hidden_AF, experts.down_XFD, sizes_X)
    out_NkD = _reordered(out_AD, inverse_A, order_A, 1).reshape(-1, copies, out_AD.shape[-1])
    return _summed(out_NkD).reshape(x_BTD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _reordered(rows_ND: jax.Array, order_A: jax.Array, inverse_A: jax.Array, copies: int) -> jax.Array:
    """``copies`` of each row, reordered; its gradient is a gather by the inverse and a sum, not a scatter."""
    return rows_ND[order_A // copies]


def _reordered_forward(
    rows_ND: jax.Array, order_A: jax.Array, inverse_A: jax.Array, copies: int
) -> tuple[jax.Array, jax.Array]:
    return _reordered(rows_ND, order_A, inverse_A, copies), inverse_A


def _reordered_backward(copies: int, inverse_A: jax.Array, dout_AD: jax.Array) -> tuple[jax.Array, None, None]:
    return _summed(dout_AD[inverse_A].reshape(-1, copies, dout_AD.shape[-1])), None, None


_reordered.defvjp(_reordered_forward, _reordered_backward)


def _summed(x_NkD: jax.Array) -> jax.Array:
    """The sum over k, taken in FP32 at least, in x's dtype."""
    return x_NkD.sum(axis=1, dtype=jnp.promote_types(x_NkD.dtype, jnp.float32)).astype(x_NkD.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["load_LX", "entropy_L", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterLoad:
    """Sums over tokens, each counted ``token_weight`` times: they add up over micro-batches. No gradient.

    Attributes:
        load_LX: how often each expert was chosen.
        entropy_L: entropy of the router's chances, in nats.
        weight: how many tokens were counted.
    """

    load_LX: Any
    entropy_L: Any
    weight: Any

    def merge(self, other: RouterLoad) -> RouterLoad:
        return jax.tree.map(jnp.add, self, other)

    def fractions(self) -> jax.Array:
        """[L, X], the share of each expert in the choices of its layer."""
        return self.load_LX / jnp.maximum(self.load_LX.sum(axis=-1, keepdims=True), 1)

    def metrics(self) -> dict[str, jax.Array]:
        """The largest share of any expert of any layer, the same over the mean share, and the mean entropy."""
        most = self.fractions().max()
        return {
            "router/load_max": most,
            "router/load_max_over_mean": most * self.load_LX.shape[-1],
            "router/entropy": self.entropy_L.mean() / jnp.maximum(self.weight, 1),
        }

    @staticmethod
    def nothing(layers: int, experts: int) -> RouterLoad:
        return RouterLoad(
            load_LX=jnp.zeros((layers, experts), jnp.float32),
            entropy_L=jnp.zeros((layers,), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
        )


def layer_load(routing: Routing, token_weight_BT: Float[Array, "B T"]) -> tuple[jax.Array, jax.Array]:
    """One layer's row of ``load_LX`` and of ``entropy_L``."""
    chance_BTX = lax.stop_gradient(routing.chance_BTX)
    entropy_BT = -jax.scipy.special.xlogy(chance_BTX, chance_BTX).sum(axis=-1)
    weight_BTk = jnp.broadcast_to(token_weight_BT[..., None], routing.expert_BTk.shape)
    load_X = jnp.zeros(chance_BTX.shape[-1], token_weight_BT.dtype).at[routing.expert_BTk].add(weight_BTk)
    return load_X, (entropy_BT.astype(token_weight_BT.dtype) * token_weight_BT).sum()
