"""The weights of a mesh over many hosts, whole on every host: split over the devices of each by an engine's mesh.

Slice by slice, so that what exists beside the old and the new weights is bounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from forgejax.errors import MeshError
from forgejax.sharding.layout import Layout
from forgejax.sharding.mesh import build_engine_mesh
from forgejax.sharding.topology import AXES, EngineMesh

_SLICE_BYTES = 256 << 20  # of what a device gets at a time; as much again may exist while it arrives


def pick_engine_mesh(config: EngineMesh, devices: int) -> EngineMesh:
    """The mesh of the engine on each host of ``devices``: all of them, tensor-split where none was asked for.

    Raises MeshError where it takes more or fewer.
    """
    if config == EngineMesh():
        return EngineMesh(tensor=devices)
    if config.devices != devices:
        raise MeshError(
            f"rollout.mesh takes {config.devices} devices and each host has {devices}; in a job of several processes "
            f"an engine has all devices of its host: choose sizes whose product is {devices}, or leave rollout.mesh out"
        )
    return config


class Replicas:
    """Copies weights from the learner's devices, those of all hosts, to this host's, for its engine.

    Every process calls ``take`` at the same place in the order of programs.
    """

    def __init__(self, config: EngineMesh, learner: Layout, abstract_params: Any, *, slice_bytes: int = _SLICE_BYTES):
        """``abstract_params``: the weights as shapes. Raises MeshError for hosts of different sizes."""
        assert learner.mesh is not None
        self.engine = Layout(mesh=build_engine_mesh(config, jax.local_devices()), rules=learner.rules, shared=True)
        self._learner, self._slice_bytes = learner, slice_bytes
        every = Layout(mesh=_join_hosts(config, learner.mesh), rules=learner.rules)
        self._everywhere: list[NamedSharding] = jax.tree.leaves(every.placements(abstract_params))
        self._here: list[NamedSharding] = jax.tree.leaves(self.engine.placements(abstract_params))

    def take(self, params: Any) -> Any:
        """A copy of global arrays on this host's devices; complete when it returns."""
        leaves, structure = jax.tree.flatten(params)
        taken = [self._take(*each) for each in zip(leaves, self._everywhere, self._here, strict=True)]
        return jax.tree.unflatten(structure, taken)

    def _take(self, x: jax.Array, everywhere: NamedSharding, here: NamedSharding) -> jax.Array:
        rows = _count_rows(x, everywhere, self._slice_bytes)
        if rows == len(x) if x.ndim else True:
            return jax.block_until_ready(self._move(x, everywhere, here))
        whole = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=here)(x.shape, x.dtype)
        for start in range(0, len(x), rows):
            count = min(rows, len(x) - start)
            with self._learner.turn():
                part = _slice(x, np.int32(start), count)
            whole = jax.block_until_ready(_place(whole, self._move(part, everywhere, here), np.int32(start)))
        return whole

    def _move(self, x: jax.Array, everywhere: NamedSharding, here: NamedSharding) -> jax.Array:
        with self._learner.turn():  # a collective, over all devices
            moved = jax.device_put(_copy(x), everywhere)
        shards = [shard.data for shard in moved.addressable_shards]
        by_device = {shard.device: data for shard, data in zip(moved.addressable_shards, shards, strict=True)}
        ordered = [by_device[device] for device in here.addressable_devices_indices_map(x.shape)]
        return jax.make_array_from_single_device_arrays(x.shape, here, ordered)


def _join_hosts(config: EngineMesh, mesh: Mesh) -> Mesh:
    """The engines' meshes of all hosts as one, whose data axis counts the hosts."""
    hosts: dict[int, list[jax.Device]] = {}
    for device in sorted(mesh.devices.flat, key=lambda device: device.id):
        hosts.setdefault(device.process_index, []).append(device)
    if {len(devices) for devices in hosts.values()} != {config.devices}:
        sizes = sorted({len(devices) for devices in hosts.values()})
        raise MeshError(f"the hosts of the mesh have {sizes} devices; expected {config.devices} on each")
    grids: Sequence[np.ndarray] = [build_engine_mesh(config, hosts[index]).devices for index in sorted(hosts)]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _count_rows(x: jax.Array, everywhere: NamedSharding, limit: int) -> int:
    """How many rows of a weight are moved at a time: all of them where they are split, or few enough."""
    if not x.ndim:
        return 0
    shard = everywhere.shard_shape(x.shape)
    size = int(np.prod(shard)) * x.dtype.itemsize
    split = shard[0] != len(x) or x.sharding.shard_shape(x.shape)[0] != len(x)
    return len(x) if split or size <= limit else max(1, len(x) * limit // size)


@functools.partial(jax.jit, static_argnums=2)
def _slice(x: jax.Array, start: Any, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count)


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    """What is moved may be what arrives, and the learner donates its own."""
    return jnp.copy(x)
