"""The chips of a named mesh, described: on a machine that has none of them.

Where libtpu is installed the described chips of a TPU slice can be compiled for; of all others shapes alone are known.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from typing import Any

import jax

from forgejax.sharding import MeshPlan

_FLAT = ("v2", "v3", "v5e", "v6e")  # slices of two dimensions; the others have three
_TWO_CORES = ("v4",)  # described as two devices a chip, where the chips themselves are one
_OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",  # else libtpu looks for them, and says at length that there are none
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_USABLE = 1 - 0.25 / 16  # of a chip's memory: a program that wants more of a v5e is refused by the compiler


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandIn:
    """A device of which only its place is known."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        """On a line: nothing that is counted depends on it."""
        return (self.id, 0, 0)


def prepare_compiler() -> None:
    """Before jax is used: no accelerator is looked for, and other processes may use the TPU compiler meanwhile.

    For processes that run nothing on a TPU.
    """
    os.environ |= _OFFLINE
    jax.config.update("jax_platforms", "cpu")


def can_compile(plan: MeshPlan) -> bool:
    """Whether the compiler of the mesh's chips is here, and can be told of such a slice."""
    known = plan.platform == "tpu" and plan.chip.name not in _TWO_CORES and _name_slice(plan) is not None
    return known and importlib.util.find_spec("libtpu") is not None


@functools.lru_cache(maxsize=64)
def describe_chips(plan: MeshPlan) -> tuple[Any, ...]:
    """The devices of a mesh, for ``build_mesh``; hosts are told apart by ``process_index``."""
    if can_compile(plan):
        from jax.experimental import topologies  # noqa: PLC0415

        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{plan.chip.name}:{_name_slice(plan)}", chips_per_host_bounds=_bounds(plan)
        )
        return tuple(described.devices)
    of_host = count_host_devices(plan)
    kind = plan.chip.kinds[0] if plan.chip.kinds else plan.chip.name
    return tuple(
        StandIn(id=at, platform=plan.platform, device_kind=kind, process_index=at // of_host)
        for at in range(plan.devices)
    )


def count_host_devices(plan: MeshPlan) -> int:
    """How many devices one host of the mesh has: a small slice is one host."""
    if plan.platform == "cpu":
        return plan.devices
    one = _of_one_host(plan)
    return plan.devices if one else plan.chip.host_chips * plan.chip.devices_per_chip


def usable_bytes(plan: MeshPlan) -> int | None:
    """Of a device's memory, what programs may take; None where the memory is unknown."""
    chip = plan.chip
    return None if chip.hbm_bytes is None else int(chip.hbm_bytes / chip.devices_per_chip * _USABLE)


def _of_one_host(plan: MeshPlan) -> bool:
    """Up to eight chips of v5e and v6e come as one host, as do the chips of a GPU machine."""
    return plan.chips <= (8 if plan.chip.name in ("v5e", "v6e") else plan.chip.host_chips)


def _bounds(plan: MeshPlan) -> tuple[int, int, int]:
    """How many chips of a host lie along each dimension."""
    if not _of_one_host(plan):
        return (2, 2, 1)
    x, y, *z = map(int, str(_name_slice(plan)).split("x"))
    return (x, y, z[0] if z else 1)


def _name_slice(plan: MeshPlan) -> str | None:
    """As the makers name the slice, ``8x8``: sides of powers of two, as even as can be; None where there is none."""
    sides = [1, 1] if plan.chip.name in _FLAT else [1, 1, 1]
    rest = plan.chips
    if rest & (rest - 1):
        return None
    while rest > 1:
        # Of a host's chips two lie along each of the first two dimensions, before a third has more than one.
        at = sides.index(min(sides)) if min(sides[:2]) > 1 else sides[:2].index(1)
        sides[at], rest = sides[at] * 2, rest // 2
    return "x".join(map(str, sorted(sides) if min(sides) > 1 or len(sides) == 2 else sides))
