"""A policy small enough to be checked against a dense forward pass, and that forward pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from forgejax.models import Policy, PolicyConfig
from forgejax.rollout import EngineConfig, PolicyEngine
from forgejax.sharding import EngineMesh, Layout, build_engine_mesh
from forgejax.types import SampleRequest, SamplingLaw

LAYOUT = Layout(mesh=build_engine_mesh(EngineMesh(), jax.devices()[1:]))
POLICY = PolicyConfig(vocab_size=50, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=32)
_ENGINES: dict[EngineConfig, PolicyEngine] = {}


def params(seed: int = 0) -> Any:
    """Random weights."""
    return nnx.split(Policy(POLICY, nnx.Rngs(seed)))[1]


def engine(**settings: Any) -> PolicyEngine:
    """An engine of these settings; engines are stateless, so that equal ones share their compiled programs."""
    base: dict[str, Any] = {
        "slots": 4,
        "max_context": 128,
        "tokens_per_step": 2,
        "prefill_buckets": (8, 32),
        "page_tokens": 4,
    }
    config = EngineConfig(**(base | settings))
    if config not in _ENGINES:
        _ENGINES[config] = PolicyEngine(POLICY, config, LAYOUT)
    return _ENGINES[config]


def request(name: str, prompt: Any, max_tokens: int = 10, **fields: Any) -> SampleRequest:
    return SampleRequest(request_id=name, prompt_ids=np.asarray(prompt, np.int32), max_tokens=max_tokens, **fields)


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, POLICY.vocab_size, length).astype(np.int32)


def _causal(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: None) -> tuple[jax.Array, None]:
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("BTHC,BSHC->BHTS", q, k) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHC->BTHC", weights, v), memory


@jax.jit
def _dense_logits(state: Any, ids: jax.Array) -> jax.Array:
    graphdef = nnx.split(nnx.eval_shape(lambda: Policy(POLICY, nnx.Rngs(0))))[0]
    policy = nnx.merge(graphdef, state)
    hidden, _ = policy(ids[None], jnp.arange(len(ids))[None], _causal, None)
    logits: jax.Array = policy.logits(hidden)[0]
    return logits


def dense_logits(state: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one full forward pass without any cache."""
    # Two programs for all lengths; causal attention ignores what follows.
    padded = np.zeros(128 if len(ids) <= 128 else 1024, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_dense_logits(state, padded))[: len(ids)]


def dense_logprobs(state: Any, prompt_ids: np.ndarray, token_ids: np.ndarray, law: SamplingLaw) -> np.ndarray:
    """Log-prob of each sampled id given everything before it, from one full forward pass."""
    ids = np.concatenate([prompt_ids, token_ids])
    logits = dense_logits(state, ids)[len(prompt_ids) - 1 : -1] / (law.temperature or 1.0)
    logps = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    picked: np.ndarray = np.take_along_axis(logps, token_ids[:, None], axis=1)[:, 0]
    return picked
