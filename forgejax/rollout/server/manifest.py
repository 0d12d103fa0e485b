"""Weights on their way between processes: what a set consists of, by name, and how a tree of them is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import msgspec
import numpy as np

from forgejax.errors import EngineError

_DTYPES = {str(np.dtype(kind)): np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)}


class TensorNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a set."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    def make(self) -> np.ndarray:
        """An array of this shape and type, not yet filled."""
        return np.empty(self.shape, _DTYPES[self.dtype])


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A set of weights, and the version that tokens drawn by it carry."""

    version: int
    tensors: tuple[TensorNote, ...]

    def __post_init__(self) -> None:
        for note in self.tensors:
            if note.dtype not in _DTYPES or any(side < 0 for side in note.shape):
                raise ValueError(f"tensor {note.name} is {note.dtype}{list(note.shape)}; expected {sorted(_DTYPES)}")


def name_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a tree by their path in it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def make_manifest(params: Any, version: int) -> Manifest:
    """What a tree of arrays, or of their shapes, consists of."""
    notes = [
        TensorNote(name=name, shape=tuple(leaf.shape), dtype=str(np.dtype(leaf.dtype)))
        for name, leaf in name_leaves(params).items()
    ]
    return Manifest(version=version, tensors=tuple(notes))


def join_leaves(named: Mapping[str, Any], like: Any) -> Any:
    """The tree of ``like`` with these leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in name_leaves(like)])


def check_manifest(given: Manifest, like: Any) -> None:
    """Raises EngineError where these are not weights for the tree of ``like``."""
    got = {note.name: note for note in given.tensors}
    want = {note.name: note for note in make_manifest(like, given.version).tensors}
    for name in sorted(got.keys() | want.keys()):
        if got.get(name) != want.get(name):
            raise EngineError(
                f"weights of version {given.version} belong to another model: at {name} given "
                f"{_describe(got.get(name))}, expected {_describe(want.get(name))}; publish those of the policy that "
                "is served"
            )


def _describe(note: TensorNote | None) -> str:
    return "nothing" if note is None else f"{note.dtype}{list(note.shape)}"
