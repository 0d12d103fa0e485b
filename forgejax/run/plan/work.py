"""How much a micro-batch, an update, a publication and a decode step compute and move, and how long that takes.

A roofline: ``seconds = max(FLOPs / peak, bytes of memory / its rate, bytes sent / the links' rate)`` on each chip, by
the data sheet. No program has reached it: it is a bound, good for comparing meshes and for seeing what bounds a step.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from forgejax.models import Kept, PolicyConfig, abstract_policy
from forgejax.sharding import Chip, Layout

# Passes over a layer's matrices: forward, two backward, and one more where the forward pass is run again.
_PASSES: dict[Kept, int] = {"all": 3, "products": 3, "attention": 3, "nothing": 4, "share": 4}
# Products of queries, keys and values by pair: two forward; seven backward (three for dQ, four for dK and dV).
_ATTENTION: dict[Kept, int] = {"all": 9, "products": 9, "attention": 9, "nothing": 11, "share": 11}
_UPDATE_BYTES = 28  # of each weight: gradient, master and both moments read, the last three written, in FP32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one chip does: FLOPs, bytes read and written in its memory, bytes sent to others."""

    flops: float
    memory: float
    sent: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """By what bounds it; empty for a chip whose rates are unknown."""
        if chip.peak_flops is None or chip.hbm_rate is None or chip.link_rate is None:
            return {}
        devices = chip.devices_per_chip
        return {
            "compute": self.flops * devices / chip.peak_flops,
            "memory": self.memory * devices / chip.hbm_rate,
            "links": self.sent * devices / chip.link_rate,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """A full micro-batch: rows of the whole mesh, their length, and what is trained of them."""

    rows: int
    length: int
    edges: int  # of each row

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def pairs(self) -> int:
        """Of queries and keys, were each row one chain: no tree of as many tokens has more."""
        return self.rows * self.length * (self.length + 1) // 2


def count_active(policy: PolicyConfig) -> int:
    """Weights of all layers that one token is multiplied with."""
    D, C, H, K = policy.d_model, policy.head_size, policy.num_heads, policy.num_kv_heads
    width = policy.expert_width * policy.moe.experts_per_token if policy.moe.num_experts else policy.d_ff
    return policy.num_layers * (2 * D * C * (H + K) + 3 * D * width + D * policy.moe.num_experts)


def count_micro_batch(policy: PolicyConfig, rows: Rows, keep: Kept, layout: Layout, block: int) -> Work:
    """Forward and backward of a micro-batch on each chip, what is run again included, of rows that are chains.

    ``2 * passes * (active weights) * tokens + 2 * products * L * H * C * pairs + 8 * D * V * edges``: 4 passes where
    layers keep their input alone, else 3; 11 or 9 products; the vocabulary's logits are made twice.
    """
    devices, width = layout.mesh.size if layout.mesh is not None else 1, jnp.dtype(policy.compute_dtype).itemsize
    passes, products = _PASSES[keep], _ATTENTION[keep]
    L, D, V = policy.num_layers, policy.d_model, policy.vocab_size
    heads, kv_heads = policy.num_heads * policy.head_size, policy.num_kv_heads * policy.head_size
    flops = 2 * passes * count_active(policy) * rows.tokens
    flops += 2 * products * L * heads * rows.pairs + 8 * D * V * rows.rows * rows.edges
    tensor = layout.shards("heads")
    matrices = _count_layer_weights(policy) * width // (tensor * _expert_shards(policy, layout))
    tokens = rows.tokens / layout.shards("rows", "length")  # of a chip, beside those that share its heads
    memory = passes * matrices + 12 * count_weights(policy) / devices
    memory += passes * L * tokens * (6 * D + (4 * heads + 4 * kv_heads + 6 * _mlp_width(policy)) / tensor) * width
    memory += (products - 5) * L * 2 * kv_heads * width * rows.pairs / (block * devices)
    return Work(flops=flops / devices, memory=memory, sent=_count_sent(policy, rows, layout, passes=passes))


def count_update(policy: PolicyConfig, layout: Layout) -> Work:
    """The optimizer's step on each chip, and the cast of its weights."""
    own = count_weights(policy) / (layout.mesh.size if layout.mesh is not None else 1)
    narrow = jnp.dtype(policy.param_dtype).itemsize
    return Work(flops=20 * own, memory=own * (_UPDATE_BYTES + 4 + narrow), sent=0.0)


def count_decode(policy: PolicyConfig, engine: Layout, slots: int, context: int) -> Work:
    """One token of all slots, each behind ``context`` tokens, on each chip of an engine."""
    devices, tensor = (engine.mesh.size if engine.mesh is not None else 1), engine.shards("heads")
    width, heads = jnp.dtype(policy.compute_dtype).itemsize, policy.num_heads * policy.head_size
    kept = max(policy.num_kv_heads // tensor, 1) * policy.head_size
    flops = 2 * (count_active(policy) + policy.d_model * policy.vocab_size) * slots
    flops += 4 * policy.num_layers * heads * context * slots
    touched = 1 - (1 - _share_of_experts(policy)) ** slots if policy.moe.num_experts else 1.0
    weights = (_count_layer_weights(policy) * touched + policy.d_model * policy.vocab_size) * width / devices
    keys = 2 * policy.num_layers * kept * width * context * slots
    sent = 4 * policy.num_layers * policy.d_model * slots * width * (devices - 1) / devices
    return Work(flops=flops / devices, memory=weights + keys, sent=sent)


def count_weights(policy: PolicyConfig) -> int:
    """All of them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_policy(policy)[1]))


def _count_sent(policy: PolicyConfig, rows: Rows, layout: Layout, *, passes: int) -> float:
    """By the algorithm, in rings: weights gathered for every pass and their gradients scattered once, hidden states
    summed twice a layer and pass, keys and values of a shared row gathered, their gradients summed."""
    width = jnp.dtype(policy.compute_dtype).itemsize
    L, D = policy.num_layers, policy.d_model
    tensor, length, gathered = layout.shards("heads"), layout.shards("length"), layout.shards("embed")
    experts = _expert_shards(policy, layout)
    whole = count_weights(policy) * width / (tensor * experts)
    sent = passes * whole * _ring(gathered)  # once less forward, once more for the gradients
    if layout.devices("data") > 1:
        sent += 2 * whole * 2 / gathered * _ring(layout.devices("data"))
    own = rows.tokens / layout.shards("rows", "length")
    sums = 2 * passes - 2  # each is a scatter and a gather
    sent += L * sums * 2 * own * D * width * _ring(tensor)
    if experts > 1:
        sent += L * (passes - 1) * 2 * own * experts * D * width * _ring(experts)
    row = rows.tokens / layout.shards("rows") * 2 * max(policy.num_kv_heads // tensor, 1) * policy.head_size * width
    return sent + L * (passes - 1 + 2) * row * _ring(length)


def _ring(members: int) -> float:
    return (members - 1) / members


def _expert_shards(policy: PolicyConfig, layout: Layout) -> int:
    return layout.shards("experts") if policy.moe.num_experts else 1


def _share_of_experts(policy: PolicyConfig) -> float:
    return policy.moe.experts_per_token / policy.moe.num_experts


def _mlp_width(policy: PolicyConfig) -> int:
    return policy.expert_width * policy.moe.experts_per_token if policy.moe.num_experts else policy.d_ff


def _count_layer_weights(policy: PolicyConfig) -> int:
    embeddings = (1 if policy.tied_embeddings else 2) * policy.vocab_size * policy.d_model
    return count_weights(policy) - embeddings
