"""Logical axes to mesh axes: every partition decision, in one place.

Weights and activations name what a dimension *is* (``heads``, ``mlp``, ``rows``); ``Rules`` says which mesh axes split
it. Weights carry their names as ``logical_axes`` metadata on their ``nnx.Variable``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding.topology import AXES

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """For each logical axis, the mesh axes that split it, major first; an empty tuple replicates it."""

    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp", "context")
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    router: tuple[str, ...] = ()  # the scores of all experts, by which each device chooses for its own tokens
    layers: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("data", "fsdp", "expert")  # B of a packed batch, S of a decode state
    length: tuple[str, ...] = ("context",)  # T of a packed batch
    kept: tuple[str, ...] = ("context", "tensor")  # T of the input that a layer keeps, where devices keep shares of it

    def __post_init__(self) -> None:
        for name, axes in dataclasses.asdict(self).items():
            unknown = [axis for axis in axes if axis not in AXES]
            if unknown or len(set(axes)) != len(axes):
                raise ConfigError(f"rules.{name} is {list(axes)}; expected distinct axes of {', '.join(AXES)}")

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis; None is a dimension that nothing splits."""
        if logical is None:
            return ()
        if logical not in self.__dataclass_fields__:
            known = ", ".join(self.__dataclass_fields__)
            raise MeshError(f"unknown logical axis {logical!r}; expected one of {known}")
        axes: tuple[str, ...] = getattr(self, logical)
        return axes


def param_shardings(tree: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """The sharding of every array of a tree, in a tree of the same structure, for ``jit(out_shardings=...)``.

    An ``nnx.Variable`` with ``logical_axes`` metadata is split by the rules; any other array (a step count) is
    replicated. Optimizer moments keep the metadata of their weights, so an abstract optimizer state works as well.
    Key-value heads whose shards are a greater multiple of them are replicated: each shard then keeps all of them.

    Raises:
        MeshError: a dimension does not divide by its mesh axes, or one mesh axis would split two dimensions.
    """

    def one(path: tuple, leaf: object) -> object:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        names = leaf.get_metadata("logical_axes", None)
        value = leaf.get_value()
        spec = P() if names is None else _weight_spec(jax.tree_util.keystr(path), value.shape, names, mesh, rules)
        return leaf.replace(NamedSharding(mesh, spec))

    sharded: Tree = jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return sharded


def batch_sharding(mesh: Mesh, rules: Rules, *, length: bool = False) -> NamedSharding:
    """The sharding of arrays [rows, ...], whole along every other dimension; or of arrays [rows, length, ...]."""
    rows = _split_by(rules.rows, mesh) or None
    return NamedSharding(mesh, P(rows, _split_by(rules.length, mesh) or None) if length else P(rows))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of the mesh holds whole."""
    return NamedSharding(mesh, P())


def rows_axes(mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes that split rows, for a ``shard_map`` over them; empty where rows are whole."""
    return _split_by(rules.rows, mesh)


def rows_shards(mesh: Mesh, rules: Rules) -> int:
    """How many shards rows fall into: a batch's row count must be a multiple of it."""
    return _size(rules.rows, mesh)


def heads_axis(mesh: Mesh, rules: Rules) -> str | None:
    """The mesh axis that splits query heads, for a ``shard_map`` over them; None where heads are whole."""
    return _only_axis("heads", mesh, rules)


def length_axis(mesh: Mesh, rules: Rules) -> str | None:
    """The mesh axis that splits the tokens of a row, for a ``shard_map`` over them; None where rows are whole."""
    return _only_axis("length", mesh, rules)


def length_shards(mesh: Mesh, rules: Rules) -> int:
    """How many shards the tokens of a row fall into."""
    return _size(rules.length, mesh)


def kv_heads_axis(mesh: Mesh, rules: Rules, num_kv_heads: int) -> str | None:
    """As ``heads_axis`` for ``num_kv_heads`` key-value heads; None where they are fewer than the shards."""
    axis = heads_axis(mesh, rules)
    return axis if axis is not None and _split_by(rules.kv_heads, mesh) and num_kv_heads >= mesh.shape[axis] else None


_scope: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("sharding_scope", default=None)


@contextlib.contextmanager
def scope(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within it, on this thread, traced calls of ``constrain`` hold for this mesh and these rules.

    Enter it inside the function that is jitted: jax does not retrace a function because a scope around it changed.
    """
    token = _scope.set((mesh, rules))
    try:
        yield
    finally:
        _scope.reset(token)


def current_scope() -> tuple[Mesh, Rules] | None:
    """The mesh and the rules of the scope this is traced in; None outside of one."""
    return _scope.get()


def split_axes(logical: str, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes of more than one device that split a logical axis, for a ``shard_map``."""
    return _split_by(rules.axes(logical), mesh)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Tells the compiler how an activation is split: one logical name, or None, for each dimension of x.

    Outside a ``scope`` it does nothing, so that one model serves a mesh and a single device. A dimension that does not
    divide by its axes (one prompt in a batch of one) is left to the compiler.
    """
    ambient = _scope.get()
    if ambient is None:
        return x
    if len(logical) != x.ndim:
        raise MeshError(f"an activation of shape {x.shape} was given {len(logical)} axis names {logical}")
    mesh, rules = ambient
    spec = [
        _split_by(rules.axes(name), mesh) or None if size % _size(rules.axes(name), mesh) == 0 else P.UNCONSTRAINED
        for name, size in zip(logical, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def _split_by(axes: Sequence[str], mesh: Mesh) -> tuple[str, ...]:
    """The axes that do split, on this mesh."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _only_axis(logical: str, mesh: Mesh, rules: Rules) -> str | None:
    axes = _split_by(rules.axes(logical), mesh)
    if len(axes) > 1:
        raise MeshError(f"rules.{logical} names {list(axes)}, each larger than 1 here; attention takes one at most")
    return axes[0] if axes else None


def _size(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _weight_spec(weight: str, shape: tuple[int, ...], names: Sequence[str], mesh: Mesh, rules: Rules) -> P:
    if len(names) != len(shape):
        raise MeshError(f"weight {weight} has shape {shape} and {len(names)} axis names {tuple(names)}")
    split = []
    for name, size in zip(names, shape, strict=True):
        axes = _split_by(rules.axes(name), mesh)
        shards = _size(axes, mesh)
        if name == "kv_heads" and size < shards and shards % size == 0:
            axes, shards = (), 1
        if size % shards:
            raise MeshError(
                f"weight {weight} of shape {shape}: its {name} dimension {size} does not divide over "
                f"{' x '.join(f'{axis} {mesh.shape[axis]}' for axis in axes)}; choose a mesh whose "
                f"{' x '.join(axes)} divides {size}, or change the model's size"
            )
        split.append(axes)
    used = [axis for axes in split for axis in axes]
    if len(set(used)) != len(used):
        raise MeshError(
            f"weight {weight} with axes {tuple(names)} would be split twice by one mesh axis: {used}; "
            f"give those logical axes different mesh axes in the rules"
        )
    return P(*(axes or None for axes in split))
