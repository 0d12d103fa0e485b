"""The decoder again, in plain numpy and float64, one sequence and one head at a time: what the policy is held to."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from forgejax.models import PolicyConfig
from forgejax.models.moe import MoEConfig
from forgejax.models.rope import RopeConfig

Vector = NDArray[np.float64]
Weights = Mapping[str, Vector]


def weights_of(params: nnx.State) -> Weights:
    """Every weight by its dotted path, in float64."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    return {".".join(key.key for key in path): np.asarray(leaf.get_value(), np.float64) for path, leaf in leaves}


def norm(x: Vector, scale: Vector, eps: float) -> Vector:
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def frequencies(rope: RopeConfig, size: int) -> tuple[list[float], float]:
    """Radians per position of each pair and the factor on the rotated numbers, one pair at a time."""
    base = [1.0 / rope.theta ** (2 * pair / size) for pair in range(size // 2)]
    if rope.scaling == "linear":
        return [frequency / rope.factor for frequency in base], 1.0
    if rope.scaling == "llama3":
        return [_llama3(rope, frequency) for frequency in base], 1.0
    if rope.scaling == "yarn":
        mscale = 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
        return [_yarn(rope, size, pair, f) for pair, f in enumerate(base)], rope.attention_factor or mscale
    return base, 1.0


def _llama3(rope: RopeConfig, frequency: float) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < rope.original_positions / rope.high_freq_factor:
        return frequency
    if wavelength > rope.original_positions / rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn(rope: RopeConfig, size: int, pair: int, frequency: float) -> float:
    def border(turns: float) -> float:
        """The pair, as a real number, that turns so often within the original context."""
        return size / 2 * math.log(rope.original_positions / (2 * math.pi * turns), rope.theta)

    low, high = border(rope.beta_fast), border(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    slowed = min(max((pair - low) / ((high - low) or 0.001), 0.0), 1.0)
    return frequency / rope.factor * slowed + frequency * (1 - slowed)


def rotate(x: Vector, position: int, rope: RopeConfig) -> Vector:
    """RoPE as complex numbers: of what turns, the first half holds real parts, the second imaginary ones."""
    size = rope.rotary_dim or len(x)
    half = size // 2
    speeds, factor = frequencies(rope, size)
    turned = (x[:half] + 1j * x[half:size]) * np.exp(1j * position * np.array(speeds)) * factor
    return np.concatenate([turned.real, turned.imag, x[size:]])


def swiglu(x: Vector, gate: Vector, up: Vector, down: Vector) -> Vector:
    opened = x @ gate
    out: Vector = (opened / (1 + np.exp(-opened)) * (x @ up)) @ down
    return out


def mixture(moe: MoEConfig, w: Weights, x: Vector) -> Vector:
    """A token through its experts, one at a time."""
    logits = x @ w["router"]
    odds = np.exp(logits - logits.max())
    scores = odds / odds.sum() if moe.router == "softmax" else 1 / (1 + np.exp(-logits))
    preferred = scores + w.get("router_bias", np.zeros_like(scores))
    chosen = np.argsort(-preferred, kind="stable")[: moe.experts_per_token]
    total = scores[chosen].sum() if moe.normalize else 1.0
    return sum(
        moe.scale * scores[e] / total * swiglu(x, w["expert_gate"][e], w["expert_up"][e], w["expert_down"][e])
        for e in chosen
    )


def decoder_logits(config: PolicyConfig, weights: Weights, tokens: list[int]) -> Vector:
    """Logits [T, V] of one causal sequence."""
    stream = [weights["embedding"][token] for token in tokens]
    for layer in range(config.num_layers):
        w = {path.removeprefix("blocks."): value[layer] for path, value in weights.items() if "blocks." in path}
        attended = _attention(config, w, [norm(x, w["attention_norm"], config.norm_eps) for x in stream])
        stream = [x + update for x, update in zip(stream, attended, strict=True)]
        for t, x in enumerate(stream):
            normed = norm(x, w["mlp_norm"], config.norm_eps)
            if config.moe.num_experts:
                stream[t] = x + mixture(config.moe, w, normed)
            else:
                stream[t] = x + swiglu(normed, w["gate"], w["up"], w["down"])
    head = weights["embedding"].T if config.tied_embeddings else weights["head"]
    return np.stack([norm(x, weights["final_norm"], config.norm_eps) @ head for x in stream])


def _attention(config: PolicyConfig, w: Weights, xs: list[Vector]) -> list[Vector]:
    outputs = [np.zeros(config.d_model) for _ in xs]
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        queries = [rotate(x, t, config.rope) for t, x in enumerate(_normed(config, w, "q", head, xs))]
        keys = [rotate(x, t, config.rope) for t, x in enumerate(_normed(config, w, "k", shared, xs))]
        values = _projected(w, "v", shared, xs)
        for t, query in enumerate(queries):
            scores = np.array([query @ key for key in keys[: t + 1]]) / np.sqrt(config.head_size)
            chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            outputs[t] += sum(chances[s] * values[s] for s in range(t + 1)) @ w["o"][head]
    return outputs


def _projected(w: Weights, kind: str, head: int, xs: list[Vector]) -> list[Vector]:
    bias = w[f"{kind}_bias"][head] if f"{kind}_bias" in w else 0.0
    return [x @ w[kind][:, head] + bias for x in xs]


def _normed(config: PolicyConfig, w: Weights, kind: str, head: int, xs: list[Vector]) -> list[Vector]:
    """The projections of one head after QK-norm; of a ``full`` one, the norm sees all heads."""
    own = _projected(w, kind, head, xs)
    if config.qk_norm == "none":
        return own
    scale = w[f"{kind}_norm"]
    if config.qk_norm == "head":
        return [norm(x, scale, config.norm_eps) for x in own]
    every = [_projected(w, kind, other, xs) for other in range(w[kind].shape[1])]
    whole = [np.concatenate([heads[t] for heads in every]) for t in range(len(xs))]
    return [
        x / np.sqrt(np.mean(x_all * x_all) + config.norm_eps) * scale[head] for x, x_all in zip(own, whole, strict=True)
    ]


def causal(
    layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, memory: None
) -> tuple[jax.Array, None]:
    """Dense causal attention: the plainest ``Attend``."""
    groups, length = q_BTHC.shape[2] // k_BTKC.shape[2], q_BTHC.shape[1]
    k_BTHC, v_BTHC = (jnp.repeat(x, groups, axis=2) for x in (k_BTKC, v_BTKC))
    scores = jnp.einsum("BTHC,BSHC->BHTS", q_BTHC, k_BTHC) * q_BTHC.shape[3] ** -0.5
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return jnp.einsum("BHTS,BSHC->BTHC", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), v_BTHC), None
