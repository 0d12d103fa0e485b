"""From hidden states to the log-probability of drawn tokens and the entropy of the law they were drawn from.

Logits exist a chunk of edges at a time. On a mesh each device has the edges of its own rows and its own part of the
vocabulary; the gradient of the unembedding is summed over a device's chunks first, and over the devices once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from forgejax.models.dense import unembed, unembed_gradients
from forgejax.sharding import Layout, current_layout


def score_drawn(
    hidden_BSED: Float[Array, "B S E D"],
    head_DV: Float[Array, "D V"],
    drawn_BSE: Int[Array, "B S E"],
    temperature_BSE: Float[Array, "B S E"],
    chunk: int,
) -> tuple[Float[Array, "B S E"], Float[Array, "B S E"]]:
    """log p(drawn) and the entropy of ``p = softmax(hidden @ head / temperature)``, in FP32 (FP64 for FP64).

    The gradient is that of the log-probability with respect to hidden states and head: none flows through the entropy
    or to the temperature. The head's is summed in FP32 over all edges, whatever its own dtype is.

    Args:
        hidden_BSED: of B rows in S shards each, as the mesh splits their length; a mixed product is taken in the wider
            of the two dtypes.
        head_DV: the unembedding.
        drawn_BSE: tokens.
        temperature_BSE: by which the logits are divided.
        chunk: the most edges of a row on one device whose logits exist at a time. The exponentials of a
            single chunk are kept for the backward pass, those of several are computed again.
    """
    operand = jnp.promote_types(hidden_BSED.dtype, head_DV.dtype)
    run = _differentiable(_Split.of_scope(), chunk)
    found: tuple[jax.Array, jax.Array] = run(
        hidden_BSED.astype(operand), head_DV.astype(operand), drawn_BSE, temperature_BSE
    )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """Which mesh axes split edges, vocabulary and the head's other dimension."""

    layout: Layout
    rows: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]

    @staticmethod
    def of_scope() -> _Split:
        layout = current_layout()
        rows, length, vocab, embed = (layout.axes(name) for name in ("rows", "length", "vocab", "embed"))
        # A device has whole columns of the head while it works, and after that the part of their gradient that it
        # shall keep, where those that have it are the same that have edges.
        return _Split(
            layout=layout,
            rows=rows,
            length=length,
            vocab=vocab,
            embed=embed if set(embed) <= {*rows, *length} - {*vocab} else (),
        )

    def mapped(self, function: Callable[..., Any], ins: str, outs: str) -> Callable[..., Any]:
        """``shard_map`` of a function whose arguments and results are hidden states or logits, head, or edges."""
        specs = {
            "edges": P(self.rows or None, self.length or None),
            "logits": P(self.rows or None, self.length or None, None, self.vocab or None),
            "head": P(None, self.vocab or None),
            "d_head": P(self.embed or None, self.vocab or None),
        }
        in_specs, out_specs = (tuple(specs[name] for name in names.split()) for names in (ins, outs))
        return self.layout.shard_map(function, in_specs, out_specs)

    def is_drawn(self, logits: jax.Array, drawn: jax.Array) -> jax.Array:
        """A one-hot over this device's part of the vocabulary."""
        own = lax.broadcasted_iota(drawn.dtype, logits.shape, logits.ndim - 1)
        return own == self._local(drawn, logits)[..., None]

    def at_drawn(self, logits: jax.Array, drawn: jax.Array) -> jax.Array:
        """The logit of what was drawn; 0 where another device has it."""
        at = self._local(drawn, logits)
        own = (at >= 0) & (at < logits.shape[-1])
        taken = jnp.take_along_axis(logits, jnp.where(own, at, 0)[..., None], axis=-1, mode="promise_in_bounds")
        return jnp.where(own, taken[..., 0], 0.0)

    def _local(self, drawn: jax.Array, logits: jax.Array) -> jax.Array:
        return drawn - lax.axis_index(self.vocab) * logits.shape[-1] if self.vocab else drawn

    def summed(self, x: jax.Array) -> jax.Array:
        """Over the parts of the vocabulary."""
        return lax.psum(x, self.vocab) if self.vocab else x

    def joined(self, d_head_DV: jax.Array) -> jax.Array:
        """Summed over all that have edges, each device keeping what it shall of D."""
        rest = tuple(axis for axis in self.rows + self.length if axis not in self.embed)
        if self.embed:
            d_head_DV = lax.psum_scatter(d_head_DV, self.embed, scatter_dimension=0, tiled=True)
        return lax.psum(d_head_DV, rest) if rest else d_head_DV


def _differentiable(split: _Split, chunk: int) -> Callable[..., Any]:
    kept = "edges edges edges edges logits"

    def forward(*ins: jax.Array) -> tuple:
        return _forward(split, chunk, ins)

    def backward(*ins: jax.Array) -> tuple:
        return _backward(split, chunk, ins)

    def saving(hidden: jax.Array, head: jax.Array, drawn: jax.Array, temperature: jax.Array) -> tuple:
        ins = (hidden, head, drawn, temperature)
        outs = kept if drawn.shape[-1] <= chunk else "edges edges edges edges"
        logp, entropy, *saved = split.mapped(forward, "edges head edges edges", outs)(*ins)
        return (logp, entropy), (*ins, *saved)

    def pull_back(saved: tuple, d_out: tuple[jax.Array, jax.Array]) -> tuple:
        ins = "edges edges head edges edges edges edges" + (" logits" if len(saved) == 7 else "")
        d_hidden, d_head = split.mapped(backward, ins, "edges d_head")(d_out[0], *saved)
        return d_hidden, d_head, None, None

    run = jax.custom_vjp(lambda *ins: saving(*ins)[0])
    run.defvjp(saving, pull_back)
    return run


def _forward(split: _Split, chunk: int, ins: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """log p and entropy; and for the backward pass the largest scaled logit and the sum of ``exp(logit - largest)``.

    If one chunk holds them all, the exponentials as well: the backward pass then needs no logits.
    """
    hidden, head, drawn, temperature = ins
    n_edges = drawn.shape[-1]

    def one(carry: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        hidden, drawn, temperature = xs
        logits = unembed(hidden, head)
        # The quotient of the largest is the largest quotient: rounding keeps order.
        top = logits.max(axis=-1) / temperature
        top = lax.pmax(top, split.vocab) if split.vocab else top
        below = _below(logits, temperature, top)
        lifted = jnp.exp(-below)
        total = split.summed(lifted.sum(axis=-1))
        logp = split.summed(split.at_drawn(logits, drawn) / temperature) - (top + jnp.log(total))
        entropy = jnp.log(total) + split.summed(jnp.einsum("BSEV,BSEV->BSE", lifted, below)) / total
        kept = (lifted,) if drawn.shape[-1] == n_edges else ()
        return None, (logp, entropy, top, total, *kept)

    return _by_chunks(one, None, (hidden, drawn, temperature), chunk)[1]


def _backward(split: _Split, chunk: int, ins: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The gradients of hidden states and head."""
    d_logp, hidden, head, *of_edges = ins  # what was drawn, temperatures, tops, totals and perhaps exponentials

    def one(d_head: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array]]:
        d_logp, hidden, drawn, temperature, top, total, *kept = xs
        lifted = kept[0] if kept else jnp.exp(-_below(unembed(hidden, head), temperature, top))
        d_logits = (d_logp / temperature)[..., None] * (split.is_drawn(lifted, drawn) - lifted / total[..., None])
        d_hidden, more = unembed_gradients(hidden, head, d_logits)
        return d_head + more, (split.summed(d_hidden).astype(hidden.dtype),)

    # The filling of the last chunk has no cotangent, and so no gradient.
    nothing = jnp.zeros(head.shape, d_logp.dtype)
    d_head, (d_hidden,) = _by_chunks(one, nothing, (d_logp, hidden, *of_edges), chunk)
    return d_hidden, split.joined(d_head).astype(head.dtype)


def _below(logits: jax.Array, temperature: jax.Array, top: jax.Array) -> jax.Array:
    """How far each scaled logit lies below the largest."""
    return top[..., None] - logits / temperature[..., None]


def _by_chunks(
    function: Callable[[Any, tuple[jax.Array, ...]], tuple[Any, tuple[jax.Array, ...]]],
    carry: Any,
    xs: tuple[jax.Array, ...],
    chunk: int,
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Runs over arrays [B, S, E, ...] in chunks of E, all of one size, the last filled up by a few edges at most."""
    lead, E = xs[0].shape[:2], xs[0].shape[2]
    count = -(-E // chunk)
    if count == 1:
        return function(carry, xs)
    size = -(-E // count)
    room = count * size - E

    def chunks(x: jax.Array, mode: str) -> jax.Array:
        if room:
            x = jnp.pad(x, [(0, room if at == 2 else 0) for at in range(x.ndim)], mode=mode)
        return jnp.moveaxis(x.reshape(*lead, count, size, *x.shape[3:]), 2, 0)

    first, *others = xs
    carry, ys = lax.scan(function, carry, (chunks(first, "constant"), *(chunks(x, "edge") for x in others)))
    return carry, tuple(jnp.moveaxis(y, 0, 2).reshape(*lead, count * size, *y.shape[4:])[:, :, :E] for y in ys)
