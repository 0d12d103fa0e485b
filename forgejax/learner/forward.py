"""The one forward pass of the learner: log-probabilities of the trained edges of packed trees.

Training, supervised training and scoring all run it. Hidden states are gathered at the edges before the vocabulary
projection, which runs in chunks and never sees an untrained token.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from forgejax.learner.batch import PackedBatch
from forgejax.learner.drawn import drawn_logps
from forgejax.learner.memory import kept_within
from forgejax.models import Attend, Kept, Policy
from forgejax.models.moe import RouterLoad
from forgejax.ops import TreeMeta, tree_attention
from forgejax.sharding import Rules, constrain, heads_axis, rows_axes


def tree_attend(meta: TreeMeta, mesh: Mesh | None, rules: Rules) -> Attend:
    """Attention over the trees of a batch, keeping no memory."""
    axes = rows_axes(mesh, rules) if mesh is not None else ()
    heads = heads_axis(mesh, rules) if mesh is not None else None

    def attend(
        layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            out = tree_attention(q_BTHC, k_BTKC, v_BTKC, meta, mesh=mesh, row_axes=axes, head_axis=heads)
        return out, memory

    return attend


def term_logps(
    graphdef: Any,
    params: Any,
    batch: PackedBatch,
    *,
    mesh: Mesh | None,
    rules: Rules,
    keep: Literal["auto"] | Kept,
    activation_gib: float,
    vocab_chunk: int,
) -> tuple[Float[Array, "B M"], Float[Array, "B M"], RouterLoad | None]:
    """log-probability of each term's token, and the entropy of the distribution it was drawn from.

    The third is what the routers of a mixture did, each token counted for all samples through it; None without one.
    The others are those of ``softmax(logits / temperature)`` with the edge's own temperature, in FP32 (FP64 for an FP64
    policy). No gradient flows through the entropy. Padding terms hold those of edge 0.

    Args:
        graphdef: structure of the policy.
        params: its weights.
        batch: packed trees.
        mesh: the mesh the arrays lie on, or None.
        rules: partition rules.
        keep: what each layer keeps for the backward pass; ``auto``: as much as ``activation_gib`` holds.
        activation_gib: what a device may keep of the layers' activations, in GiB.
        vocab_chunk: the most edges of a row whose logits exist at a time. Those of a single chunk are kept for the
            backward pass, those of several are computed again.
    """
    policy = nnx.merge(graphdef, params)
    attend = tree_attend(batch.attention, mesh, rules)
    if keep == "auto":
        keep = kept_within(policy.config, batch.tokens.size, activation_gib, mesh=mesh, rules=rules)
    through_BT = jnp.asarray(batch.samples_through).astype(jnp.float32)
    hidden_BTD, _, load = policy.with_router_load(
        batch.tokens, batch.positions, attend, token_weight_BT=through_BT, keep=keep
    )
    return *edge_terms(policy, hidden_BTD, batch, vocab_chunk), load


def edge_terms(
    policy: Policy, hidden_BTD: Float[Array, "B T D"], batch: PackedBatch, vocab_chunk: int
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """The log-probability of each term's token and the entropy there, read off the hidden states of the trees."""
    hidden_BED = constrain(_gather_rows(hidden_BTD, batch.edge_src), "rows", None, None)
    logp_BE, entropy_BE = _edge_logps(policy, hidden_BED, batch, vocab_chunk)
    return _gather_rows(logp_BE, batch.term_edge), _gather_rows(entropy_BE, batch.term_edge)


def _gather_rows(values: jax.Array, index: Any) -> jax.Array:
    """``values[b, index[b]]``, indices known to be inside."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(values, jnp.asarray(index))


def _edge_logps(
    policy: Policy, hidden_BED: jax.Array, batch: PackedBatch, vocab_chunk: int
) -> tuple[jax.Array, jax.Array]:
    B, E, _ = hidden_BED.shape
    count = -(-E // vocab_chunk)
    size = -(-E // count)  # chunks of one size: the last is filled up by a few edges at most

    def chunks(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if count * size > E:
            x = jnp.pad(x, ((0, 0), (0, count * size - E)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    def chunk(hidden: jax.Array, target: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("vocabulary"):
            return drawn_logps(policy.logits(hidden), target, temperature)

    if count == 1:
        return chunk(hidden_BED, jnp.asarray(batch.edge_tgt), jnp.asarray(batch.edge_temperature))
    recomputed = jax.checkpoint(chunk)
    xs = (chunks(hidden_BED), chunks(batch.edge_tgt), chunks(batch.edge_temperature))
    _, (logp, entropy) = jax.lax.scan(lambda carry, x: (carry, recomputed(*x)), None, xs)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, count * size)[:, :E] for x in (logp, entropy))  # type: ignore[return-value]
