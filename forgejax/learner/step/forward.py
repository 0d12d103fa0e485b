"""The one forward pass of the learner: log-probabilities of the trained edges of packed trees.

Training, supervised training and scoring all run it. Hidden states are gathered at the edges before the vocabulary
projection, which runs in chunks and never sees an untrained token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from forgejax.learner.packing.batch import PackedBatch
from forgejax.learner.step.memory import choose_kept
from forgejax.learner.step.objective import Terms
from forgejax.learner.step.vocabulary import score_drawn
from forgejax.models import Attend, Kept, PerLayer, Policy
from forgejax.ops import SplitMeta, TreeMeta, tree_attention
from forgejax.sharding import Layout, constrain


def _tree_attend(meta: TreeMeta | SplitMeta, layout: Layout) -> Attend:
    """Attention over the trees of a batch, keeping no memory."""
    split = functools.partial(
        tree_attention,
        meta=meta,
        mesh=layout.mesh,
        row_axes=layout.axes("rows"),
        head_axis=layout.axis("heads"),
        length_axis=layout.axis("length"),
    )

    def attend(
        layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            return split(q_BTHC, k_BTKC, v_BTKC), memory

    return attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Log-probabilities of the terms of packed trees, in one layout, within one budget of memory.

    Attributes:
        graphdef: structure of the policy.
        layout: where the arrays lie.
        keep: what each layer keeps for the backward pass; ``auto``: as much as ``activation_gib`` holds.
        activation_gib: what a device may keep of the layers' activations, in GiB.
        vocab_chunk: the most edges of a row whose logits exist at a time. The exponentials of a single chunk are
            kept for the backward pass, those of several are computed again.
    """

    graphdef: Any
    layout: Layout
    keep: Literal["auto"] | Kept
    activation_gib: float
    vocab_chunk: int

    def terms(self, params: Any, batch: PackedBatch) -> Terms:
        """The terms under these weights.

        Log-probabilities are those of ``softmax(logits / temperature)`` with the edge's own temperature, in FP32 (FP64
        for an FP64 policy). No gradient flows through the entropy. Padding terms hold those of edge 0. Routers count
        each token for all samples through it.
        """
        return self.terms_beside(params, batch, lambda attend: attend, None)[0]

    def terms_beside(
        self, params: Any, batch: PackedBatch, around: Callable[[Attend], Attend], parts: Any
    ) -> tuple[Terms, Any]:
        """The same where ``around`` the batch's attention each layer reads its own of ``parts`` or leaves one.

        Returns:
            The terms, and what the layers left.
        """
        policy = nnx.merge(self.graphdef, params)
        keep = self.keep
        if keep == "auto":
            keep = choose_kept(policy.config, batch.tokens_BT.size, self.activation_gib, layout=self.layout)
        hidden_BTD, left, load = policy.with_router_load(
            batch.tokens_BT,
            batch.positions_BT,
            around(_tree_attend(batch.attention, self.layout)),
            token_weight_BT=jnp.asarray(batch.samples_through_BT).astype(jnp.float32),
            memory=PerLayer(parts),
            keep=keep,
        )
        return (*_edge_terms(policy, hidden_BTD, batch, self.vocab_chunk), load), left.parts


def _edge_terms(
    policy: Policy, hidden_BTD: Float[Array, "B T D"], batch: PackedBatch, vocab_chunk: int
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """The log-probability of each term's token and the entropy there, read off the hidden states of the trees."""
    # Where several devices share a row each has its own edges: neither the gather nor the vocabulary crosses over.
    shards = batch.attention.n_shards if isinstance(batch.attention, SplitMeta) else 1

    def by_shard(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return constrain(
            x.reshape(len(x), shards, -1, *x.shape[2:]),
            "rows",
            "length" if shards > 1 else None,
            *(None,) * (x.ndim - 1),
        )

    source_BSE, target_BSE, temperature_BSE = map(
        by_shard, (batch.edge_src_BE, batch.edge_tgt_BE, batch.edge_temperature_BE)
    )
    hidden_BSED = jax.vmap(_gather_rows)(by_shard(hidden_BTD), source_BSE)
    with jax.named_scope("vocabulary"):
        found_BSE = score_drawn(hidden_BSED, policy.unembedding(), target_BSE, temperature_BSE, vocab_chunk)
    logp_BE, entropy_BE = (constrain(x.reshape(len(x), -1), "rows", None) for x in found_BSE)
    return _gather_rows(logp_BE, batch.term_edge_BM), _gather_rows(entropy_BE, batch.term_edge_BM)


def _gather_rows(values: jax.Array, index: Any) -> jax.Array:
    """``values[b, index[b]]``, indices known to be inside."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(values, jnp.asarray(index))
