"""A mesh and its rules as one value: where every array lies, on many devices or on one.

A mesh of one device is a mesh all the same. ``ONE_DEVICE`` is none: it answers the same questions, splits nothing and
leaves arrays where jax puts them.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from forgejax.errors import MeshError
from forgejax.sharding.rules import Rules
from forgejax.sharding.topology import AXES

Tree = TypeVar("Tree")

_TURN = threading.RLock()
_NO_TURN: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How logical axes are split over the devices of a mesh; without one, over nothing.

    Attributes:
        mesh: the devices, with the axes of ``MeshConfig``; None is jax's default device, and for those alone who hand
            a mesh to jax.
        rules: which mesh axes split which logical axis.
        shared: whether another layout of this process has some of its devices, so that programs of both are enqueued
            in turns (see ``turn``).
    """

    mesh: Mesh | None = None
    rules: Rules = dataclasses.field(default_factory=Rules)
    shared: bool = False

    def __post_init__(self) -> None:
        if self.mesh is not None and set(self.mesh.shape) != set(AXES):
            raise MeshError(f"a mesh with axes {', '.join(self.mesh.shape)}; expected those of build_mesh: {AXES}")

    @property
    def on_mesh(self) -> bool:
        """Whether arrays lie on a mesh, be it one of a single device."""
        return self.mesh is not None

    @property
    def platform(self) -> str:
        """The platform of the devices, as jax calls it."""
        platform: str = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return platform

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Hold it while a program with collectives is enqueued, not while it runs, where devices are ``shared``.

        Two threads that enqueue on the same devices could else reach them in two orders, and each program would wait
        for a device that the other holds.
        """
        return _TURN if self.shared else _NO_TURN

    def in_turn(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A jitted function that is called in ``turn``; itself where no devices are shared."""
        if not self.shared:
            return function

        @functools.wraps(function)
        def called(*args: Any) -> Any:
            with _TURN:
                return function(*args)

        return called

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes of more than one device that split a logical axis, major first; empty where it is whole.

        Raises:
            MeshError: there is no such logical axis.
        """
        axes = self.rules.axes(logical)
        return () if self.mesh is None else tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def axis(self, logical: str) -> str | None:
        """The one mesh axis that splits a logical axis; None where it is whole.

        Raises:
            MeshError: several do.
        """
        axes = self.axes(logical)
        if len(axes) > 1:
            raise MeshError(f"rules.{logical} names {list(axes)}, each larger than 1 here; attention takes one at most")
        return axes[0] if axes else None

    def kv_heads_axis(self, num_kv_heads: int) -> str | None:
        """The axis of ``heads`` for ``num_kv_heads`` key-value heads; None where they are fewer than its shards."""
        axis = self.axis("heads")
        return axis if axis is not None and self.axes("kv_heads") and num_kv_heads >= self.devices(axis) else None

    def devices(self, *axes: str) -> int:
        """How many devices lie along these mesh axes together."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)

    def shards(self, *logical: str) -> int:
        """Into how many parts these logical axes fall together: a batch's row count is a multiple of ``rows``'s."""
        return math.prod(self.devices(*self.axes(name)) for name in logical)

    def sharding(self, *logical: str | None) -> NamedSharding | None:
        """Of an array whose first dimensions are these, whole along those that are None and along all further ones.

        Without a name: every device holds it whole. None on one device, which leaves the choice to jax.
        """
        return None if self.mesh is None else NamedSharding(self.mesh, self._spec(logical))

    def shardings(self, tree: Tree) -> Tree | None:
        """``placements``, for ``jit(out_shardings=...)``; None on one device, which leaves the choice to jax."""
        return None if self.mesh is None else self.placements(tree)

    def placements(self, tree: Tree) -> Tree:
        """The sharding of every array of a tree, in a tree of the same structure.

        An ``nnx.Variable`` with ``logical_axes`` metadata is split by the rules; any other array (a step count) is
        whole on every device. Optimizer moments keep the metadata of their weights, so an abstract optimizer state
        works as well. Key-value heads whose shards are a greater multiple of them are whole: each shard has all.

        Raises:
            MeshError: a dimension does not divide by its mesh axes, or one mesh axis would split two dimensions.
        """

        def one(path: tuple, leaf: object) -> object:
            if not isinstance(leaf, nnx.Variable):
                return self._placed(P())
            names = leaf.get_metadata("logical_axes", None)
            shape = leaf.get_value().shape
            spec = P() if names is None else self._weight_spec(jax.tree_util.keystr(path), shape, names)
            return leaf.replace(self._placed(spec))

        found: Tree = jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        return found

    def put(self, tree: Any, logical: Any) -> Any:
        """Host arrays onto the devices, in a tree of the same structure; every process holds the whole of each.

        Args:
            tree: the arrays.
            logical: for each of them a tuple of names, for its first dimensions, as ``sharding`` takes them.
        """
        mesh = self.mesh
        if mesh is None:
            return jax.device_put(tree)

        def one(x: Any, names: tuple[str | None, ...]) -> jax.Array:
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, self._spec(names)), x.__getitem__)

        return jax.tree.map(one, tree, logical)

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """``jax.shard_map`` over the mesh, for specs of ``axes``; the function itself on one device."""
        if self.mesh is None:
            return function
        mapped: Callable[..., Any] = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return mapped

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within it, on this thread, ``current_layout`` is this one, and traced calls of ``constrain`` hold for it.

        Enter it inside the function that is jitted: jax does not retrace a function because a scope around it changed.
        """
        token = _scope.set(self)
        try:
            yield
        finally:
            _scope.reset(token)

    def _spec(self, logical: Sequence[str | None]) -> P:
        return P(*(self.axes(name) or None for name in logical))

    def _placed(self, spec: P) -> Sharding:
        if self.mesh is not None:
            return NamedSharding(self.mesh, spec)
        chosen: jax.Device | None = jax.config.jax_default_device  # type: ignore[attr-defined]
        return SingleDeviceSharding(jax.devices()[0] if chosen is None else chosen)

    def _weight_spec(self, weight: str, shape: tuple[int, ...], names: Sequence[str]) -> P:
        if len(names) != len(shape):
            raise MeshError(f"weight {weight} has shape {shape} and {len(names)} axis names {tuple(names)}")
        split = []
        for name, size in zip(names, shape, strict=True):
            axes, shards = self.axes(name), self.shards(name)
            if name == "kv_heads" and size < shards and shards % size == 0:
                axes, shards = (), 1
            if size % shards:
                raise MeshError(
                    f"weight {weight} of shape {shape}: its {name} dimension {size} does not divide over "
                    f"{' x '.join(f'{axis} {self.devices(axis)}' for axis in axes)}; choose a mesh whose "
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


ONE_DEVICE = Layout()
"""No mesh: jax's default device."""

_scope: contextvars.ContextVar[Layout] = contextvars.ContextVar("layout_scope", default=ONE_DEVICE)


def current_layout() -> Layout:
    """That of the scope this is traced in; ``ONE_DEVICE`` outside of one."""
    return _scope.get()


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Tells the compiler how an activation is split: one logical name, or None, for each dimension of x.

    Outside the scope of a mesh it does nothing, so that one model serves a mesh and a single device. A dimension that
    does not divide by its axes (one prompt in a batch of one) is left to the compiler.
    """
    layout = current_layout()
    if layout.mesh is None:
        return x
    if len(logical) != x.ndim:
        raise MeshError(f"an activation of shape {x.shape} was given {len(logical)} axis names {logical}")
    spec = [
        P.UNCONSTRAINED if size % layout.devices(*layout.axes(name)) else layout.axes(name) or None
        for name, size in zip(logical, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, P(*spec)))
