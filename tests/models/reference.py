"""The decoder again, in plain numpy and float64, one sequence and one head at a time: what the policy is held to."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from forgejax.models import PolicyConfig

Vector = NDArray[np.float64]
Weights = Mapping[str, Vector]


def weights_of(params: nnx.State) -> Weights:
    """Every weight by its dotted path, in float64."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    return {".".join(key.key for key in path): np.asarray(leaf.get_value(), np.float64) for path, leaf in leaves}


def norm(x: Vector, scale: Vector, eps: float) -> Vector:
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def rotate(x: Vector, position: int, theta: float) -> Vector:
    """RoPE as complex numbers: the first half holds real parts, the second imaginary ones."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def decoder_logits(config: PolicyConfig, weights: Weights, tokens: list[int]) -> Vector:
    """Logits [T, V] of one causal sequence."""
    stream = [weights["embedding"][token] for token in tokens]
    for layer in range(config.num_layers):
        w = {path.removeprefix("blocks."): value[layer] for path, value in weights.items() if "blocks." in path}
        attended = _attention(config, w, [norm(x, w["attention_norm"], config.norm_eps) for x in stream])
        stream = [x + update for x, update in zip(stream, attended, strict=True)]
        for t, x in enumerate(stream):
            normed = norm(x, w["mlp_norm"], config.norm_eps)
            gate = normed @ w["gate"]
            stream[t] = x + (gate / (1 + np.exp(-gate)) * (normed @ w["up"])) @ w["down"]
    head = weights["embedding"].T if config.tied_embeddings else weights["head"]
    return np.stack([norm(x, weights["final_norm"], config.norm_eps) @ head for x in stream])


def _attention(config: PolicyConfig, w: Weights, xs: list[Vector]) -> list[Vector]:
    outputs = [np.zeros(config.d_model) for _ in xs]
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        queries = _rotated(config, _projected(w, "q", head, xs), w.get("q_norm"))
        keys = _rotated(config, _projected(w, "k", shared, xs), w.get("k_norm"))
        values = _projected(w, "v", shared, xs)
        for t, query in enumerate(queries):
            scores = np.array([query @ key for key in keys[: t + 1]]) / np.sqrt(config.head_size)
            chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            outputs[t] += sum(chances[s] * values[s] for s in range(t + 1)) @ w["o"][head]
    return outputs


def _projected(w: Weights, kind: str, head: int, xs: list[Vector]) -> list[Vector]:
    bias = w[f"{kind}_bias"][head] if f"{kind}_bias" in w else 0.0
    return [x @ w[kind][:, head] + bias for x in xs]


def _rotated(config: PolicyConfig, xs: list[Vector], scale: Vector | None) -> list[Vector]:
    normed = xs if scale is None else [norm(x, scale, config.norm_eps) for x in xs]
    return [rotate(x, position, config.rope_theta) for position, x in enumerate(normed)]


def causal(
    layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, memory: None
) -> tuple[jax.Array, None]:
    """Dense causal attention: the plainest ``Attend``."""
    groups, length = q_BTHC.shape[2] // k_BTKC.shape[2], q_BTHC.shape[1]
    k_BTHC, v_BTHC = (jnp.repeat(x, groups, axis=2) for x in (k_BTKC, v_BTKC))
    scores = jnp.einsum("BTHC,BSHC->BHTS", q_BTHC, k_BTHC) * q_BTHC.shape[3] ** -0.5
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return jnp.einsum("BHTS,BSHC->BTHC", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), v_BTHC), None
