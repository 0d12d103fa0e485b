"""The one forward pass of the learner: log-probabilities of the trained edges of packed trees.

Training, supervised training and scoring all run it. Hidden states are gathered at the edges before the vocabulary
projection, which runs in chunks, is recomputed in the backward pass, and never sees an untrained token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from forgejax.learner.batch import PackedBatch
from forgejax.models import Attend, Policy
from forgejax.ops import TreeMeta, tree_attention
from forgejax.sharding import Rules, constrain, heads_axis, rows_axes


def tree_attend(meta: TreeMeta, mesh: Mesh | None, rules: Rules) -> Attend:
    """Attention over the trees of a batch, keeping no memory."""
    axes = rows_axes(mesh, rules) if mesh is not None else ()
    heads = heads_axis(mesh, rules) if mesh is not None else None

    def attend(
        layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
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
    remat: bool,
    vocab_chunk: int,
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """log-probability of each term's token, and the entropy of the distribution it was drawn from.

    Both are those of ``softmax(logits / temperature)`` with the edge's own temperature, in FP32 (FP64 for an FP64
    policy). No gradient flows through the entropy. Padding terms hold those of edge 0.

    Args:
        graphdef: structure of the policy.
        params: its weights.
        batch: packed trees.
        mesh: the mesh the arrays lie on, or None.
        rules: partition rules.
        remat: recompute each layer in the backward pass.
        vocab_chunk: the most edges of a row whose logits exist at a time.
    """
    policy = nnx.merge(graphdef, params)
    attend = tree_attend(batch.attention, mesh, rules)
    hidden_BTD, _ = policy(batch.tokens, batch.positions, attend, None, remat)
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

    @jax.checkpoint
    def chunk(hidden: jax.Array, target: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BEV = policy.logits(hidden) / temperature[..., None]
        norm_BE = jax.nn.logsumexp(logits_BEV, axis=-1)
        # A sum over a one-hot instead of a gather: it stays local where the vocabulary is split.
        drawn = jnp.arange(logits_BEV.shape[-1])[None, None, :] == target[..., None]
        logp_BE = jnp.where(drawn, logits_BEV, 0.0).sum(axis=-1) - norm_BE
        fixed_BEV = jax.lax.stop_gradient(logits_BEV - norm_BE[..., None])
        return logp_BE, -(jnp.exp(fixed_BEV) * fixed_BEV).sum(axis=-1)

    xs = (chunks(hidden_BED), chunks(batch.edge_tgt), chunks(batch.edge_temperature))
    _, (logp, entropy) = jax.lax.scan(lambda carry, x: (carry, chunk(*x)), None, xs)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, count * size)[:, :E] for x in (logp, entropy))  # type: ignore[return-value]
