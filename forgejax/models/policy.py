"""The policy: a decoder-only transformer that is told how to attend.

Grouped-query attention, rotary embeddings by explicit positions, RMSNorm, SwiGLU, tied or untied embeddings, optional
QK-norm and QKV biases; FP32 logits. The learner attends over packed prefix trees, the engine over its KV cache: both
hand an ``Attend`` to the same ``Policy.__call__``, so that sampling and training are one function.

Weights of all layers are stacked on a leading L axis and the layers run under ``jax.lax.scan``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from forgejax.errors import ConfigError
from forgejax.sharding import constrain

DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Shape and numerics of a policy. ``head_dim`` of 0 means ``d_model / num_heads``."""

    vocab_size: int = 512
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 0
    d_ff: int = 384
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = False
    attention_bias: bool = False
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
        for name in ("rope_theta", "norm_eps"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"policy.{name} is {getattr(self, name)}; expected a positive number")
        if self.head_size % 2:
            raise ConfigError(f"policy.head_dim {self.head_size} is odd; rotary embeddings need an even one")

    @property
    def head_size(self) -> int:
        """C, the width of one attention head."""
        return self.head_dim or self.d_model // self.num_heads


@runtime_checkable
class Attend(Protocol):
    """Causal attention of one layer, over whatever memory the caller keeps.

    Args:
        layer: index of the layer, a traced scalar inside the scan.
        q_BTHC: rotated queries, unscaled; the callee multiplies scores by ``C ** -0.5``.
        k_BTKC: rotated keys.
        v_BTKC: values.
        memory: the caller's pytree as the previous layer left it (a KV cache, or None).

    Returns:
        Attention output [B, T, H, C] and the memory for the next layer (same structure, shapes and dtypes).
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


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis in FP32 (Zhang & Sennrich 2019, arXiv 1910.07467), in x's dtype."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.expand_dims(scale.astype(x32.dtype), tuple(range(x.ndim - 1)))).astype(x.dtype)


def rope(x_BTHC: Float[Array, "B T H C"], positions_BT: Int[Array, "B T"], theta: float) -> Float[Array, "B T H C"]:
    """Rotary embedding (arXiv 2104.09864), half-split pairing, by explicit positions; angles in FP32."""
    half = x_BTHC.shape[-1] // 2
    real = jnp.promote_types(x_BTHC.dtype, jnp.float32)
    frequency_c = theta ** (-jnp.arange(half, dtype=real) / half)
    angle_BT1c = positions_BT[:, :, None, None].astype(real) * frequency_c[None, None, None, :]
    cos, sin = jnp.cos(angle_BT1c), jnp.sin(angle_BT1c)
    first, second = jnp.split(x_BTHC.astype(real), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHC.dtype)


class Block(nnx.Module):
    """All layers' weights, stacked on L; called on the slice of one layer."""

    def __init__(self, config: PolicyConfig, rngs: nnx.Rngs):
        self.config = config
        L, D, F = config.num_layers, config.d_model, config.d_ff
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
        if config.qk_norm:
            self.q_norm = weight(rngs, (L, C), ("layers", "norm"), dtype, ones)
            self.k_norm = weight(rngs, (L, C), ("layers", "norm"), dtype, ones)
        self.mlp_norm = weight(rngs, (L, D), ("layers", "norm"), dtype, ones)
        self.gate = weight(rngs, (L, D, F), ("layers", "embed", "mlp"), dtype, normal)
        self.up = weight(rngs, (L, D, F), ("layers", "embed", "mlp"), dtype, normal)
        self.down = weight(rngs, (L, F, D), ("layers", "mlp", "embed"), dtype, residual_down)

    def __call__(
        self, layer: jax.Array, x_BTD: jax.Array, positions_BT: jax.Array, attend: Attend, memory: Any
    ) -> tuple[jax.Array, Any]:
        """One layer's residual update of x [B, T, D]; self holds that layer's slice of every weight."""
        eps, dtype = self.config.norm_eps, x_BTD.dtype
        normed_BTD = rms_norm(x_BTD, self.attention_norm[...], eps)
        out_BTHC, memory = attend(layer, *self._qkv(normed_BTD, positions_BT), memory)
        x_BTD = x_BTD + jnp.einsum("BTHC,HCD->BTD", out_BTHC, self.o[...].astype(dtype))

        normed_BTD = rms_norm(x_BTD, self.mlp_norm[...], eps)
        gate_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", normed_BTD, self.gate[...].astype(dtype)))
        up_BTF = jnp.einsum("BTD,DF->BTF", normed_BTD, self.up[...].astype(dtype))
        return x_BTD + jnp.einsum("BTF,FD->BTD", gate_BTF * up_BTF, self.down[...].astype(dtype)), memory

    def _qkv(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config, dtype = self.config, x_BTD.dtype
        q_BTHC = jnp.einsum("BTD,DHC->BTHC", x_BTD, self.q[...].astype(dtype))
        k_BTKC = jnp.einsum("BTD,DKC->BTKC", x_BTD, self.k[...].astype(dtype))
        v_BTKC = jnp.einsum("BTD,DKC->BTKC", x_BTD, self.v[...].astype(dtype))
        if config.attention_bias:
            q_BTHC = q_BTHC + self.q_bias[...].astype(dtype)[None, None]
            k_BTKC = k_BTKC + self.k_bias[...].astype(dtype)[None, None]
            v_BTKC = v_BTKC + self.v_bias[...].astype(dtype)[None, None]
        if config.qk_norm:
            q_BTHC = rms_norm(q_BTHC, self.q_norm[...], config.norm_eps)
            k_BTKC = rms_norm(k_BTKC, self.k_norm[...], config.norm_eps)
        q_BTHC, k_BTKC = (rope(x, positions_BT, config.rope_theta) for x in (q_BTHC, k_BTKC))
        return constrain(q_BTHC, "rows", "length", "heads", None), k_BTKC, v_BTKC


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
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states [B, T, D] after the final norm, in the compute dtype, and the memory after the last layer.

        ``remat`` recomputes each layer's activations in the backward pass.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def one_layer(carry: tuple[jax.Array, Any], xs: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Any], None]:
            x_BTD, layer_memory = carry
            layer, weights = xs
            weights = jax.tree.map(_keep_split, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
            return nnx.merge(graphdef, weights)(layer, x_BTD, positions_BT, attend, layer_memory), None

        # Inside a scan the compiler cannot merge the recomputation with the forward pass: no barrier is needed.
        body = jax.checkpoint(one_layer, prevent_cse=False) if remat else one_layer
        # Looked up whole along D, else the partitioner replicates the activations; looked up before the cast, so that
        # the gradients of a repeated token add up in the parameters' dtype.
        x_BTD = constrain(self.embedding[...], "vocab", None)[tokens_BT].astype(self.config.compute_dtype)
        x_BTD = constrain(x_BTD, "rows", "length", None)
        layers_L = jnp.arange(self.config.num_layers)
        (x_BTD, memory), _ = jax.lax.scan(body, (x_BTD, memory), (layers_L, stacked))
        return rms_norm(x_BTD, self.final_norm[...], self.config.norm_eps), memory

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in FP32 (or FP64 where the parameters are): widened operands, a full-precision product.

        The precision is asked for because TPUs and GPUs otherwise multiply FP32 operands in bf16 or TF32. Operands that
        are both bf16 stay so: their products are exact in the FP32 accumulator.
        """
        head_DV = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        head_DV = constrain(head_DV, None, "vocab")
        operand = jnp.promote_types(hidden.dtype, head_DV.dtype)
        return jnp.einsum(
            "...D,DV->...V",
            hidden.astype(operand),
            head_DV.astype(operand),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.promote_types(operand, jnp.float32),
        )
