"""Policy weights on the engine's device, and the box they are swapped in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from forgejax.errors import CheckpointError, EngineError


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """One published set of weights; compared by identity, so that republishing a version counts as new weights."""

    params: Any
    version: int


class WeightBox:
    """The engine's weights: readers take ``current`` once per device program, ``publish`` swaps it atomically.

    ``publish`` may be called from any thread.
    """

    def __init__(self, params: Any, version: int, device: jax.Device):
        _check_version(version)
        self._device = device
        self._shape = jax.tree.map(lambda x: (x.shape, x.dtype), params)
        self.current = Weights(params=self._copy(params), version=version)

    def publish(self, params: Any, version: int) -> None:
        """Copies the weights to the engine's device and makes them current.

        When this returns the copy is complete: the caller may donate its buffers. Raises EngineError for weights of
        another model, and for a version that is no int32 from 0.
        """
        _check_version(version)
        given = jax.tree.map(lambda x: (x.shape, x.dtype), params)
        if given != self._shape:
            raise EngineError(
                f"published weights of version {version} belong to another model: {_difference(given, self._shape)}; "
                "publish the tree of parameters the engine was made with"
            )
        self.current = Weights(params=self._copy(params), version=version)

    def _copy(self, params: Any) -> Any:
        return jax.block_until_ready(jax.device_put(params, self._device, may_alias=False))


def _check_version(version: int) -> None:
    if not 0 <= version < 2**31:
        raise EngineError(f"policy version {version}: expected 0 to {2**31 - 1}; tokens carry it as an int32")


def _difference(given: Any, expected: Any) -> str:
    got, want = (
        dict(jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda leaf: isinstance(leaf, tuple)))
        for x in (given, expected)
    )
    for path in sorted(got.keys() | want.keys(), key=str):
        if got.get(path) != want.get(path):
            return f"at {jax.tree_util.keystr(path)} given {got.get(path)}, expected {want.get(path)}"
    return "the tree structures differ"


def save_params(path: Path, params: Any) -> None:
    """Writes a state of parameters as an orbax checkpoint of plain nested dictionaries; ``path`` must not exist."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nnx.to_pure_dict(params))


def load_params(path: Path, like: Any) -> Any:
    """Reads what ``save_params`` wrote, in the structure of ``like``. Raises CheckpointError."""
    path = path.absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint directory; give one that holds orbax parameters")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(like))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore(path, abstract)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} does not hold the parameters of this policy: {error}") from error
    state = jax.tree.map(lambda x: x, like)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, values))
    return state
