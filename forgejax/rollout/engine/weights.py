"""Policy weights on the engine's devices, and the box they are swapped in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from forgejax.errors import EngineError
from forgejax.sharding import copy_shards


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedWeights:
    """One published set of weights; compared by identity, so that republishing a version counts as new weights."""

    params: Any
    version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class HandedWeights:
    """Weights that lie where the engine wants them and that nobody else changes or donates: taken without a copy."""

    params: Any


class WeightBox:
    """The engine's weights: readers take ``current`` once per device program, ``publish`` swaps it atomically.

    ``publish`` may be called from any thread.
    """

    def __init__(self, params: Any, version: int, placements: Any):
        """``placements``: a sharding for each weight, in their order."""
        check_version(version)
        self._placements = jax.tree.leaves(placements)
        self._shape = _describe_shapes(params)
        self.current = PublishedWeights(params=self._copy(params), version=version)

    def publish(self, params: Any, version: int) -> None:
        """Copies the weights, wherever and however split they lie, to the engine's devices and makes them current;
        ``HandedWeights`` are taken as they are.

        When this returns the copy is complete: the caller may donate its buffers. Raises EngineError for weights of
        another model, and for a version that is no int32 from 0.
        """
        check_version(version)
        given = _describe_shapes(params)
        if given != self._shape:
            raise EngineError(
                f"published weights of version {version} belong to another model: {_describe(given, self._shape)}; "
                "publish the tree of parameters the engine was made with"
            )
        self.current = PublishedWeights(params=self._copy(params), version=version)

    def _copy(self, params: Any) -> Any:
        if isinstance(params, HandedWeights):
            return params.params
        leaves, structure = jax.tree.flatten(params)
        copied = [copy_shards(x, placement) for x, placement in zip(leaves, self._placements, strict=True)]
        return jax.block_until_ready(jax.tree.unflatten(structure, copied))


def _describe_shapes(params: Any) -> Any:
    given = params.params if isinstance(params, HandedWeights) else params
    return jax.tree.map(lambda x: (x.shape, x.dtype), given)


def check_version(version: int) -> None:
    """Raises EngineError for a version that tokens cannot carry."""
    if not 0 <= version < 2**31:
        raise EngineError(f"policy version {version}: expected 0 to {2**31 - 1}; tokens carry it as an int32")


def _describe(given: Any, expected: Any) -> str:
    got, want = (
        dict(jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda leaf: isinstance(leaf, tuple)))
        for x in (given, expected)
    )
    for path in sorted(got.keys() | want.keys(), key=str):
        if got.get(path) != want.get(path):
            return f"at {jax.tree_util.keystr(path)} given {got.get(path)}, expected {want.get(path)}"
    return "the tree structures differ"
