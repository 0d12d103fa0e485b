"""The policy: a decoder-only transformer that is told how to attend.

One decoder, configured by data, is every family: grouped-query attention, rotary embeddings by explicit positions,
RMSNorm, SwiGLU or a mixture of experts, tied or untied embeddings, optional QK-norm and QKV biases; FP32 logits. The
learner attends over packed prefix trees, the engine over its KV cache: both hand an ``Attend`` to the same
``Policy.__call__``, so that sampling and training are one function.

Weights of all layers are stacked on a leading L axis and the layers run under ``jax.lax.scan``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from forgejax.errors import ConfigError
from forgejax.models.dense import embed, linear, rms_norm, silu_gated, unembed
from forgejax.models.keeping import Kept, remembering
from forgejax.models.moe import Experts, MoEConfig, RouterLoad, Routing, expert_mlp, layer_load, route
from forgejax.models.rope import RopeConfig, Rotation, rotate, rotation_of
from forgejax.sharding import constrain

DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Shape and numerics of a policy.

    Attributes:
        path: a folder in Hugging Face format, or a GGUF file, that the weights are read from; empty: fresh weights.
        head_dim: width of a head; 0 means ``d_model / num_heads``.
        d_ff: width of the MLP.
        qk_norm: RMSNorm of queries and keys before they are rotated: over each ``head`` with one scale (Qwen3), or over
            the numbers of all heads together, ``full`` (MiniMax-M2).
        attention_bias: queries, keys and values have biases.
    """

    path: str = ""
    vocab_size: int = 512
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 0
    d_ff: int = 384
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: Literal["none", "head", "full"] = "none"
    attention_bias: bool = False
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy.{name} is {getattr(self, name)}; expected a positive count")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"policy.num_heads {self.num_heads} is not a multiple of policy.num_kv_heads {self.num_kv_heads}"
            )
        if not self.head_dim and self.d_model % self.num_heads:
            raise ConfigError(
                f"policy.d_model {self.d_model} is no multiple of policy.num_heads {self.num_heads}: set head_dim"
            )
        if self.head_dim < 0:
            raise ConfigError(f"policy.head_dim is {self.head_dim}; expected a width, or 0 for d_model / num_heads")
        if not 0.0 < self.norm_eps < float("inf"):
            raise ConfigError(f"policy.norm_eps is {self.norm_eps}; expected a positive number")
        if self.head_size % 2 and not self.rope.rotary_dim:
            raise ConfigError(f"policy.head_dim {self.head_size} is odd; rotary embeddings need an even one")
        if self.rope.rotary_dim > self.head_size:
            raise ConfigError(
                f"policy.rope.rotary_dim is {self.rope.rotary_dim}; a head has {self.head_size} numbers: expected as "
                "many at most, or 0 for all"
            )

    @property
    def head_size(self) -> int:
        """C, the width of one attention head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def expert_width(self) -> int:
        """F of an expert."""
        return self.moe.d_ff or self.d_ff


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Memory of which each layer gets a part of its own and leaves another: arrays [L, ...], or None for nothing.

    What all layers share is carried from one to the next instead. A backward pass through parts costs no more than
    they hold; through a carried array of all layers it would cost that once a layer.
    """

    parts: Any


@runtime_checkable
class Attend(Protocol):
    """Causal attention of one layer, over whatever memory the caller keeps.

    Args:
        layer: index of the layer, a traced scalar inside the scan.
        q_BTHC: rotated queries, unscaled; the callee multiplies scores by ``C ** -0.5``.
        k_BTKC: rotated keys.
        v_BTKC: values.
        memory: the caller's pytree as the previous layer left it (a KV cache, or None), or the layer's own part of a
            ``PerLayer``.

    Returns:
        Attention output [B, T, H, C] and the memory for the next layer (same structure, shapes and dtypes), or
        whatever the layer leaves of its own.
    """

    def __call__(
        self, layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, memory: Any, /
    ) -> tuple[jax.Array, Any]: ...


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: DType, init: Callable[..., jax.Array]
) -> nnx.Param:
    """Declares one weight: its shape, dtype, initialiser and the logical axis name of each dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"weight of shape {shape} has {len(axes)} axis names {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), logical_axes=axes)


class Block(nnx.Module):
    """All layers' weights, stacked on L; called on the slice of one layer."""

    def __init__(self, config: PolicyConfig, rngs: nnx.Rngs):
        self.config = config
        L, D, F = config.num_layers, config.d_model, config.expert_width if config.moe.num_experts else config.d_ff
        H, K, C = config.num_heads, config.num_kv_heads, config.head_size
        # Unit-variance inputs give unit-variance outputs at any width: a fixed 0.02 starves a narrow model's attention.
        normal = nnx.initializers.normal(D**-0.5)
        # Residual branches start smaller by sqrt(2L), so that the stream's variance does not grow with depth (GPT-2).
        branch = (2 * L) ** -0.5
        residual_o = nnx.initializers.normal(branch * (H * C) ** -0.5)
        residual_down = nnx.initializers.normal(branch * F**-0.5)
        ones, zeros, dtype = nnx.initializers.ones, nnx.initializers.zeros, config.param_dtype

        self.attention_norm = weight(rngs, (L, D), ("layers", "norm"), dtype, ones)
        self.q = weight(rngs, (L, D, H, C), ("layers", "embed", "heads", "head_dim"), dtype, normal)
        self.k = weight(rngs, (L, D, K, C), ("layers", "embed", "kv_heads", "head_dim"), dtype, normal)
        self.v = weight(rngs, (L, D, K, C), ("layers", "embed", "kv_heads", "head_dim"), dtype, normal)
        self.o = weight(rngs, (L, H, C, D), ("layers", "heads", "head_dim", "embed"), dtype, residual_o)
        if config.attention_bias:
            self.q_bias = weight(rngs, (L, H, C), ("layers", "heads", "head_dim"), dtype, zeros)
            self.k_bias = weight(rngs, (L, K, C), ("layers", "kv_heads", "head_dim"), dtype, zeros)
            self.v_bias = weight(rngs, (L, K, C), ("layers", "kv_heads", "head_dim"), dtype, zeros)
        if config.qk_norm == "head":
            self.q_norm = weight(rngs, (L, C), ("layers", "norm"), dtype, ones)
            self.k_norm = weight(rngs, (L, C), ("layers", "norm"), dtype, ones)
        elif config.qk_norm == "full":
            self.q_norm = weight(rngs, (L, H, C), ("layers", "heads", "head_dim"), dtype, ones)
            self.k_norm = weight(rngs, (L, K, C), ("layers", "kv_heads", "head_dim"), dtype, ones)
        self.mlp_norm = weight(rngs, (L, D), ("layers", "norm"), dtype, ones)
        if not config.moe.num_experts:
            self.gate = weight(rngs, (L, D, F), ("layers", "embed", "mlp"), dtype, normal)
            self.up = weight(rngs, (L, D, F), ("layers", "embed", "mlp"), dtype, normal)
            self.down = weight(rngs, (L, F, D), ("layers", "mlp", "embed"), dtype, residual_down)
            return
        X = config.moe.num_experts
        self.router = weight(rngs, (L, D, X), ("layers", "embed", "router"), dtype, normal)
        if config.moe.correction_bias:
            self.router_bias = weight(rngs, (L, X), ("layers", "router"), dtype, zeros)
        self.expert_gate = weight(rngs, (L, X, D, F), ("layers", "experts", "embed", "expert_mlp"), dtype, normal)
        self.expert_up = weight(rngs, (L, X, D, F), ("layers", "experts", "embed", "expert_mlp"), dtype, normal)
        self.expert_down = weight(
            rngs, (L, X, F, D), ("layers", "experts", "expert_mlp", "embed"), dtype, residual_down
        )

    def __call__(
        self,
        layer: jax.Array,
        x_BTD: jax.Array,
        rotation: Rotation,
        attend: Attend,
        memory: Any,
        *,
        token_weight_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, tuple[jax.Array, jax.Array] | None]:
        """One layer's residual update of x [B, T, D]; self holds that layer's slice of every weight.

        Returns x, the memory, and ``layer_load`` of a mixture's router where a ``token_weight_BT`` is given.
        """
        eps, dtype = self.config.norm_eps, x_BTD.dtype
        normed_BTD = rms_norm(x_BTD, self.attention_norm[...], eps)
        out_BTHC, memory = attend(layer, *self._qkv(normed_BTD, rotation), memory)
        with jax.named_scope("projections"):
            x_BTD = checkpoint_name(x_BTD + linear(out_BTHC, self.o[...].astype(dtype), 2), "stream")

        normed_BTD = rms_norm(x_BTD, self.mlp_norm[...], eps)
        if self.config.moe.num_experts:
            routing, out_BTD = self._mixture(normed_BTD)
            load = None if token_weight_BT is None else layer_load(routing, token_weight_BT)
            return x_BTD + out_BTD, memory, load
        with jax.named_scope("mlp"):
            weights = self.gate, self.up
            gate_BTF, up_BTF = (checkpoint_name(linear(normed_BTD, w[...].astype(dtype)), "gated") for w in weights)
            return x_BTD + linear(silu_gated(gate_BTF, up_BTF), self.down[...].astype(dtype)), memory, None

    def _mixture(self, x_BTD: jax.Array) -> tuple[Routing, jax.Array]:
        moe, dtype = self.config.moe, x_BTD.dtype
        routing = route(x_BTD, self.router[...], self.router_bias[...] if moe.correction_bias else None, moe)
        experts = (w[...].astype(dtype) for w in (self.expert_gate, self.expert_up, self.expert_down))
        return routing, expert_mlp(x_BTD, routing, Experts(*experts))

    def _qkv(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        config, dtype = self.config, x_BTD.dtype
        with jax.named_scope("projections"):
            weights = self.q, self.k, self.v
            q_BTHC, k_BTKC, v_BTKC = (checkpoint_name(linear(x_BTD, w[...].astype(dtype)), "qkv") for w in weights)
        if config.attention_bias:
            q_BTHC = q_BTHC + self.q_bias[...].astype(dtype)[None, None]
            k_BTKC = k_BTKC + self.k_bias[...].astype(dtype)[None, None]
            v_BTKC = v_BTKC + self.v_bias[...].astype(dtype)[None, None]
        if config.qk_norm != "none":
            q_BTHC = self._normed(q_BTHC, self.q_norm[...])
            k_BTKC = self._normed(k_BTKC, self.k_norm[...])
        q_BTHC, k_BTKC = rotate(q_BTHC, rotation), rotate(k_BTKC, rotation)
        return constrain(q_BTHC, "rows", "length", "heads", None), k_BTKC, v_BTKC

    def _normed(self, x_BTHC: jax.Array, scale: jax.Array) -> jax.Array:
        """QK-norm: over each head where scale is [C], over all numbers of all heads where it is [H, C]."""
        width = scale.size
        x = x_BTHC.reshape(*x_BTHC.shape[:2], -1, width)
        return rms_norm(x, scale.reshape(width), self.config.norm_eps).reshape(x_BTHC.shape)


def _keep_split(weight_of_layer: nnx.Variable) -> nnx.Variable:
    """Holds a layer's slice, and through it its gradient, to the split of the stacked weight."""
    axes = weight_of_layer.get_metadata("logical_axes")[1:]
    return weight_of_layer.replace(constrain(weight_of_layer.get_value(), *axes))


class Policy(nnx.Module):
    """The decoder. ``policy(tokens, positions, attend)`` gives hidden states; ``policy.logits(hidden)`` FP32 logits.

    Which tokens see which is entirely up to ``attend``; ``positions`` are used by the rotary embedding alone.
    """

    def __init__(self, config: PolicyConfig, rngs: nnx.Rngs):
        self.config = config
        V, D, dtype = config.vocab_size, config.d_model, config.param_dtype
        normal = nnx.initializers.normal(D**-0.5)
        self.embedding = weight(rngs, (V, D), ("vocab", "embed"), dtype, normal)
        self.blocks = Block(config, rngs)
        self.final_norm = weight(rngs, (D,), ("norm",), dtype, nnx.initializers.ones)
        if not config.tied_embeddings:
            self.head = weight(rngs, (D, V), ("embed", "vocab"), dtype, normal)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        attend: Attend,
        memory: Any = None,
        keep: Kept = "all",
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states [B, T, D] after the final norm, in the compute dtype, and the memory after the last layer.

        Where ``memory`` is a ``PerLayer``, so is what comes back: what the layers left, stacked on L.
        ``keep``: what each layer keeps for the backward pass.
        """
        hidden_BTD, memory, _ = self._run(
            tokens_BT, positions_BT, attend, memory=memory, keep=keep, token_weight_BT=None
        )
        return hidden_BTD, memory

    def with_router_load(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        attend: Attend,
        *,
        token_weight_BT: Float[Array, "B T"],
        memory: Any = None,
        keep: Kept = "all",
    ) -> tuple[Float[Array, "B T D"], Any, RouterLoad | None]:
        """The same, and what the routers did, each token counted ``token_weight_BT`` times; None without a mixture."""
        hidden_BTD, memory, loads = self._run(
            tokens_BT, positions_BT, attend, memory=memory, keep=keep, token_weight_BT=token_weight_BT
        )
        if loads is None:
            return hidden_BTD, memory, None
        load = RouterLoad(load_LX=loads[0], entropy_L=loads[1], weight=token_weight_BT.sum())
        return hidden_BTD, memory, load

    def no_router_load(self) -> RouterLoad | None:
        """What ``with_router_load`` gives for no tokens, where their weights are FP32."""
        experts = self.config.moe.num_experts
        return RouterLoad.nothing(self.config.num_layers, experts) if experts else None

    def _run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        attend: Attend,
        *,
        memory: Any,
        keep: Kept,
        token_weight_BT: jax.Array | None,
    ) -> tuple[jax.Array, Any, tuple[jax.Array, jax.Array] | None]:
        graphdef, stacked = nnx.split(self.blocks)
        own = isinstance(memory, PerLayer)
        carried, parts = (None, memory.parts) if own else (memory, None)

        def one_layer(
            carry: tuple[jax.Array, Any], xs: tuple[jax.Array, Any, Any]
        ) -> tuple[tuple[jax.Array, Any], tuple[Any, Any]]:
            x_BTD, carried = carry
            layer, weights, part = xs
            weights = jax.tree.map(_keep_split, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
            block = nnx.merge(graphdef, weights)
            x_BTD, left, load = block(
                layer, x_BTD, rotation, attend, part if own else carried, token_weight_BT=token_weight_BT
            )
            return ((x_BTD, None), (left, load)) if own else ((x_BTD, left), (None, load))

        body = remembering(one_layer, keep)
        # Looked up whole along D, else the partitioner replicates the activations; looked up before the cast, so that
        # the gradients of a repeated token add up unrounded.
        x_BTD = embed(constrain(self.embedding[...], "vocab", None), tokens_BT).astype(self.config.compute_dtype)
        x_BTD = constrain(x_BTD, "rows", "length", None)
        rotation = rotation_of(self.config.rope, self.config.head_size, positions_BT, x_BTD.dtype)
        layers_L = jnp.arange(self.config.num_layers)
        (x_BTD, carried), (parts, loads) = jax.lax.scan(body, (x_BTD, carried), (layers_L, stacked, parts))
        hidden_BTD = rms_norm(x_BTD, self.final_norm[...], self.config.norm_eps)
        return hidden_BTD, PerLayer(parts) if own else carried, loads

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in FP32 (or FP64 where the parameters are): widened operands, a full-precision product.

        Operands that are both bf16 stay so: their products are exact in the FP32 accumulator.
        """
        head_DV = self.unembedding()
        operand = jnp.promote_types(hidden.dtype, head_DV.dtype)
        return unembed(hidden.astype(operand), head_DV.astype(operand))

    def unembedding(self) -> Float[Array, "D V"]:
        """What hidden states are multiplied with, whole along D."""
        head_DV = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        return constrain(head_DV, None, "vocab")
