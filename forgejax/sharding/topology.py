"""Mesh names: which chips ``v5e-64`` or ``h100-8`` means, and how their devices split over the mesh axes.

Nothing here touches a device or imports jax: a name resolves to the same plan on a laptop and on the pod.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Literal

from forgejax.errors import ConfigError, MeshError

Platform = Literal["cpu", "tpu", "gpu"]

AXES = ("data", "fsdp", "context", "expert", "tensor")
"""Mesh axes, slowest links first: ``tensor`` exchanges activations in every layer and lies innermost."""

_INFERRED = ("fsdp", "data", "tensor", "context")
"""Who takes the devices that nobody asked for, in this order; ``expert`` never does: a dense policy has none."""

_GIB = 2**30
_NAME = re.compile(r"(?P<chip>[a-z0-9]+)-(?P<count>[0-9]{1,6})")
_GRAMMAR = "a chip and a count, as cpu-4, v5e-64, v4-32 or h100-8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of chip, by its makers' data sheet. Figures are per chip, rates in bytes a second.

    A name's count is in TensorCores for some TPUs and in chips for others (``counted_per_chip``); JAX shows some chips
    as two devices (``devices_per_chip``). ``kinds`` are substrings of ``jax.Device.device_kind``; empty: any kind.
    ``host_chips`` are those of one host in a slice of several, or of a whole GPU machine; ``link_rate`` is what the
    links along one axis of a slice carry in one direction, both ways round, or those within a GPU machine.
    """

    name: str
    platform: Platform
    kinds: tuple[str, ...] = ()
    hbm_bytes: int | None = None
    peak_flops: float | None = None  # dense bf16 multiply-adds, two FLOPs each, per second; None: unknown
    hbm_rate: float | None = None
    link_rate: float | None = None
    host_chips: int = 1
    counted_per_chip: int = 1
    devices_per_chip: int = 1


def _tpu(
    name: str, kinds: tuple[str, ...], hbm_gib: int, tflops: float, *, rates: tuple[float, float], **counts: int
) -> Chip:
    """``rates``: GB/s of its memory, and of its links in one direction."""
    return Chip(
        name=name,
        platform="tpu",
        kinds=kinds,
        hbm_bytes=hbm_gib * _GIB,
        peak_flops=tflops * 1e12,
        hbm_rate=rates[0] * 1e9,
        link_rate=rates[1] * 1e9,
        host_chips=4,
        **counts,
    )


def _gpu(name: str, kinds: tuple[str, ...], hbm_gb: float, tflops: float, *, rates: tuple[float, float]) -> Chip:
    """The same for a machine of eight."""
    return Chip(
        name=name,
        platform="gpu",
        kinds=kinds,
        hbm_bytes=round(hbm_gb * 1e9),
        peak_flops=tflops * 1e12,
        hbm_rate=rates[0] * 1e9,
        link_rate=rates[1] * 1e9,
        host_chips=8,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="cpu", platform="cpu"),
        _tpu("v2", ("TPU v2",), 16, 46, rates=(700, 60), counted_per_chip=2, devices_per_chip=2),
        _tpu("v3", ("TPU v3",), 32, 123, rates=(900, 80), counted_per_chip=2, devices_per_chip=2),
        _tpu("v4", ("TPU v4",), 32, 275, rates=(1228, 90), counted_per_chip=2),
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 16, 197, rates=(819, 90)),
        _tpu("v5p", ("TPU v5p", "TPU v5"), 95, 459, rates=(2765, 180), counted_per_chip=2),
        _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 32, 918, rates=(1640, 180)),
        _tpu("tpu7x", ("TPU7x",), 192, 2307, rates=(7380, 200), counted_per_chip=2, devices_per_chip=2),
        _gpu("a100", ("A100",), 80, 312, rates=(2039, 300)),
        _gpu("l4", ("NVIDIA L4",), 24, 121, rates=(300, 32)),
        _gpu("l40s", ("L40S",), 48, 362, rates=(864, 32)),
        _gpu("h100", ("H100",), 80, 989, rates=(3350, 450)),
        _gpu("h200", ("H200",), 141, 989, rates=(4800, 450)),
        _gpu("b200", ("B200",), 180, 2250, rates=(8000, 900)),
        _gpu("mi300x", ("MI300X",), 192, 1307, rates=(5300, 448)),
        Chip(name="gpu", platform="gpu"),
    )
}

_ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Which mesh to train on. An axis of 0 is taken from the preset; an explicit size overrides it.

    The devices an override leaves over go to ``fsdp``, or to ``data`` where ``fsdp`` is given as well. No preset splits
    experts.
    """

    name: str = "cpu-4"
    data: int = 0  # whole replicas of the weights
    fsdp: int = 0  # batch rows and weights, both split
    tensor: int = 0  # heads, MLP and vocabulary
    context: int = 0  # positions within a row
    expert: int = 0  # the experts of a mixture, and batch rows outside of it

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 0:
                raise ConfigError(
                    f"mesh.{axis} is {getattr(self, axis)}; expected a size, or 0 to let the preset choose"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMesh:
    """Over how many devices one engine is split; 1 and 1 is one device."""

    tensor: int = 1  # heads, MLP and vocabulary; beyond the key-value heads each of them is kept several times
    expert: int = 1  # the experts of a mixture

    def __post_init__(self) -> None:
        for axis in ("tensor", "expert"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"an engine's mesh.{axis} is {getattr(self, axis)}; expected 1 or more")

    @property
    def devices(self) -> int:
        """How many JAX devices it takes."""
        return self.tensor * self.expert


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A resolved mesh: what to build, before any device is touched."""

    name: str
    chip: Chip
    chips: int
    data: int
    fsdp: int
    context: int
    expert: int
    tensor: int

    @property
    def platform(self) -> Platform:
        return self.chip.platform

    @property
    def shape(self) -> dict[str, int]:
        """Axis sizes in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """How many JAX devices the mesh takes."""
        return math.prod(self.shape.values())

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of all chips by their data sheet; None where it is unknown (measure it instead)."""
        return None if self.chip.peak_flops is None else self.chip.peak_flops * self.chips

    def describe(self) -> str:
        """One line for logs: ``v5e-64: 64 devices = fsdp 16 x tensor 4``."""
        split = " x ".join(f"{axis} {size}" for axis, size in self.shape.items() if size > 1)
        return f"{self.name}: {self.devices} devices = {split}" if split else f"{self.name}: 1 device"


def resolve(config: MeshConfig) -> MeshPlan:
    """Turns a mesh name and its overrides into a plan.

    Raises:
        MeshError: the name is unknown, its count impossible, or the overrides do not make up the devices.
    """
    chip, count = _parse(config.name)
    if count % chip.counted_per_chip:
        raise MeshError(
            f"mesh {config.name}: the {count} of {chip.name} counts TensorCores, {chip.counted_per_chip} to a chip; "
            f"expected a multiple of {chip.counted_per_chip}, as {chip.name}-{count + 1}"
        )
    chips = count // chip.counted_per_chip
    sizes = _split(config, chip, chips * chip.devices_per_chip)
    return MeshPlan(name=config.name, chip=chip, chips=chips, **sizes)


def _parse(name: str) -> tuple[Chip, int]:
    """The chip and the count of a name such as ``v5e-64``."""
    match = _NAME.fullmatch(name.strip().lower())
    family = match["chip"] if match else re.split(r"[-_ ]", name.strip().lower())[0]
    chip = CHIPS.get(_ALIASES.get(family, family))
    if chip is None:
        close = difflib.get_close_matches(family, [*CHIPS, *_ALIASES], n=3, cutoff=0.5)
        nearest = f"did you mean {' or '.join(close)}? " if close else ""
        raise MeshError(f"unknown mesh {name!r}: {nearest}expected {_GRAMMAR}; the chips are {', '.join(CHIPS)}")
    if match is None or int(match["count"]) < 1:
        raise MeshError(f"mesh {name!r} names no count of chips: expected {_GRAMMAR}")
    return chip, int(match["count"])


def _preset_tensor(platform: Platform, devices: int) -> int:
    """The tensor split of a preset: enough to keep weights and KV of a replica small, within the fast links."""
    if platform == "cpu":
        return 2 if devices % 4 == 0 else 1
    if platform == "tpu":
        return next((size for size, least in ((4, 16), (2, 8)) if devices >= least and devices % size == 0), 1)
    return next((size for size, least in ((4, 16), (2, 4)) if devices >= least and devices % size == 0), 1)


def _fsdp_limit(platform: Platform) -> int:
    """Beyond this many shards a weight's slices are too thin to be worth gathering: further devices hold replicas.

    The mock mesh of 8 CPU devices stops at 2, so that it exercises every axis.
    """
    return 2 if platform == "cpu" else 64


def _split(config: MeshConfig, chip: Chip, devices: int) -> dict[str, int]:
    """Axis sizes: overrides first, then the preset's tensor split, then fsdp, then data."""
    given = {axis: getattr(config, axis) for axis in AXES if getattr(config, axis)}
    product = math.prod(given.values())
    asked = " x ".join(f"{axis} {size}" for axis, size in given.items())
    closed = all(axis in given for axis in _INFERRED)
    if devices % product or (closed and product != devices):
        raise MeshError(
            f"mesh {config.name} has {devices} devices; {asked} takes {product}: expected axis sizes whose product "
            f"{'is' if closed else 'divides'} {devices}; leave an axis at 0 to have it inferred"
        )
    rest = devices // product
    sizes = dict.fromkeys(AXES, 1) | given
    if "tensor" not in given:
        sizes["tensor"] = math.gcd(_preset_tensor(chip.platform, devices), rest)
        rest //= sizes["tensor"]
    open_axes = [axis for axis in _INFERRED if axis not in given]
    if open_axes[:2] == ["fsdp", "data"]:
        sizes["fsdp"] = math.gcd(rest, _fsdp_limit(chip.platform)) if rest > _fsdp_limit(chip.platform) else rest
        sizes["data"] = rest // sizes["fsdp"]
    elif open_axes:
        sizes[open_axes[0]] *= rest
    return sizes
