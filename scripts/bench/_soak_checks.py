"""What a soak holds its engines to: log-probs by a dense forward pass, and memory of processes."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from forgejax.models import Policy, PolicyConfig
from forgejax.types import Completion

_PADDED = 256


def measure_gap(policy: PolicyConfig, params: Any, completion: Completion) -> float:
    """The largest difference of its log-probs from those of one dense forward pass; of at most 256 tokens."""
    ids = np.concatenate([completion.prompt_ids, completion.token_ids])
    padded = np.zeros(_PADDED, np.int32)
    padded[: len(ids)] = ids
    dense_T = np.asarray(_score(policy, params, padded))
    first = len(completion.prompt_ids) - 1
    return float(np.abs(dense_T[first : len(ids) - 1] - completion.logprobs).max())


@functools.partial(jax.jit, static_argnums=0)
def _score(policy: PolicyConfig, params: Any, ids_T: jax.Array) -> jax.Array:
    """The log-prob of each id but the first, given those before it."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Policy(policy, nnx.Rngs(0))))
    module: Policy = nnx.merge(graphdef, params)
    hidden, _ = module(ids_T[None], jnp.arange(len(ids_T))[None], _attend_densely, None)
    logp_TV = jax.nn.log_softmax(module.logits(hidden)[0, :-1], axis=-1)
    return jnp.take_along_axis(logp_TV, ids_T[1:, None], axis=1)[:, 0]


def _attend_densely(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: None) -> tuple[jax.Array, None]:
    share = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
    scores = jnp.einsum("BTHC,BSHC->BHTS", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHC->BTHC", weights, v), memory


def find_process(argument: str) -> int:
    """The process that was started with this argument. Raises LookupError."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                return int(folder.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    raise LookupError(f"no process was started with {argument}")


def read_memory(process_id: int) -> int:
    """Bytes of a process in memory, of its own alone; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{process_id}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(fields[1]) - int(fields[2])) * 4096


def measure_growth(sizes: Sequence[int]) -> float:
    """By which part of itself a size grew, from the third fifth of the time to the last."""
    fifth = max(len(sizes) // 5, 1)
    early, late = sizes[-3 * fifth : -2 * fifth] or sizes[:1], sizes[-fifth:]
    return statistics.median(late) / statistics.median(early) - 1
