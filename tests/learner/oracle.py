"""The oracle of the step: it knows no trees, every sample is its own chain under a dense mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from forgejax.learner.packing.samples import Sample
from forgejax.ops.tree.dense import dense_tree_attention


def unmerged(graphdef: Any, room: int) -> Callable[[Any, Sequence[Sequence[Sample]]], tuple[Any, Any]]:
    """CISPO loss and gradient of groups by the formula itself, for ``room`` samples of ``room`` tokens at most."""
    chain = jnp.full((room, room), room, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32)[None], (room, room))

    def attend(layer: Any, q: Any, k: Any, v: Any, memory: Any) -> tuple[Any, Any]:
        return dense_tree_attention(q, k, v, chain), memory

    def loss(params: Any, data: tuple[Any, ...]) -> Any:
        tokens, targets, sources, old, scale, temperature = data
        policy = nnx.merge(graphdef, params)
        logits = policy.logits(policy(tokens, positions, attend)[0]) / temperature[:, :, None]
        logps = jax.nn.log_softmax(logits, axis=-1)
        logp = logps[jnp.arange(room)[:, None], sources, targets]
        ratio = jnp.exp(jnp.clip(jax.lax.stop_gradient(logp) - old, -20, 20))
        return -(scale * jnp.minimum(ratio, 5.0) * logp).sum()

    grad = jax.jit(jax.value_and_grad(loss))

    def of(params: Any, groups: Sequence[Sequence[Sample]]) -> tuple[Any, Any]:
        samples = [one for members in groups for one in members]
        weights = [
            1.0 / (sum(len(one.token_ids) for one in members) * len(groups)) for members in groups for _ in members
        ]
        tokens, targets, sources = (np.zeros((room, room), np.int32) for _ in range(3))
        old, scale, temperature = np.zeros((room, room)), np.zeros((room, room)), np.ones((room, 1))
        for row, (one, weight) in enumerate(zip(samples, weights, strict=True)):
            n = len(one.token_ids)
            tokens[row, : one.fed_tokens] = one.fed_ids
            targets[row, :n], old[row, :n] = one.token_ids, one.old_logp
            sources[row, :n] = len(one.context_ids) - 1 + np.arange(n)
            scale[row, :n] = np.float64(np.float32(weight)) * np.float64(np.float32(one.advantage))
            temperature[row] = np.float32(one.temperature)
        return grad(params, (tokens, targets, sources, old, scale, temperature))

    return of


def relative(ours: Any, oracle: Any) -> float:
    """Length of the difference over length of the oracle."""
    difference = jax.tree.map(np.subtract, ours, oracle)
    lengths = [
        np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in jax.tree.leaves(t))) for t in (difference, oracle)
    ]
    return float(lengths[0] / lengths[1])
