"""Random forests in pre-order, and gradients through an attention function, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from forgejax.ops import TreeMeta, tree_attention
from forgejax.ops.tree.attention import Kernel
from forgejax.ops.tree.dense import dense_tree_attention

# Interpreted kernels are large programs that run once: compiling them well is not worth its time.
QUICKLY = {"xla_backend_optimization_level": 0}

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def forest(rng: np.random.Generator, length: int, used: int, branching: float = 0.05) -> NDArray[np.int32]:
    """``end`` of a random forest of ``used`` nodes in pre-order, then padding up to ``length``."""
    end = np.arange(1, length + 1, dtype=np.int32)
    path: list[int] = []  # from a root to the node before
    for node in range(used):
        if path and rng.random() < branching:
            for ended in path[(kept := int(rng.integers(len(path)))) :]:
                end[ended] = node
            path = path[:kept]
        path.append(node)
    end[path] = used
    return end


def rows(seed: int, length: int, lengths: list[int], branching: float = 0.05) -> NDArray[np.int32]:
    """One forest a row, [B, T]."""
    rng = np.random.default_rng(seed)
    return np.stack([forest(rng, length, used, branching) for used in lengths])


def ancestry(end: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[..., i, j]: whether j is i itself or an ancestor of it."""
    index = np.arange(end.shape[-1])
    seen: NDArray[np.bool_] = (index[None, :] <= index[:, None]) & (index[:, None] < end[..., None, :])
    return seen


def depths(end: NDArray[np.int32]) -> NDArray[np.int32]:
    """The position of each token: how many ancestors it has."""
    return ancestry(end).sum(axis=-1, dtype=np.int32) - np.int32(1)


def normal(seed: int, *shapes: tuple[int, ...], dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def real_tokens(lengths: list[int], length: int) -> jax.Array:
    """1 for tokens and 0 for padding, [B, T, 1, 1]: what padding puts out is nobody's business."""
    return jnp.asarray(np.arange(length)[None, :] < np.array(lengths)[:, None], "float32")[:, :, None, None]


def attention(meta: TreeMeta, kernel: Kernel) -> Attend:
    return lambda q, k, v: tree_attention(q, k, v, meta, kernel=kernel)


def oracle(
    end: NDArray[np.int32] | jax.Array,
    window: int | None = None,
    positions: NDArray[np.int32] | None = None,
    index: NDArray[np.int64] | jax.Array | None = None,
) -> Attend:
    """Positions are those of the keys; ``index`` is the logical one of each query."""
    at = None if index is None else jnp.asarray(index)
    of_keys = None if positions is None else jnp.asarray(positions)
    return lambda q, k, v: dense_tree_attention(q, k, v, jnp.asarray(end), at, window=window, positions_BS=of_keys)


def out_and_grads(attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array) -> list[jax.Array]:
    """``weight * attend(q, k, v)`` and the gradients of its sum."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v) * weight
        return out.astype("float32").sum(), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return [out, *grads]
