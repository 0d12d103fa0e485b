"""Building a mesh from a plan: what is there, what is missing, and which devices stay free for the engine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from forgejax.errors import MeshError
from forgejax.sharding.topology import AXES, CHIPS, EngineMesh, MeshPlan, Platform

_THREADS_PER_DEVICE = 4
_GOOGLE_PCI_VENDOR = "0x1ae0"
_GPU_NODES = ("dev/nvidia0", "dev/kfd", "dev/dxg")
_ADVICE: dict[Platform, str] = {
    "tpu": "run on the Cloud TPU slice with jax[tpu] installed, or choose a mesh this machine has, as --mesh=cpu-4",
    "gpu": "run on the GPU machine with jax[cuda13] installed, or choose a mesh this machine has, as --mesh=cpu-4",
    "cpu": "call prepare_platform before the first use of a device, or set JAX_NUM_CPU_DEVICES before the start",
}


def prepare_platform(plan: MeshPlan, extra_devices: int = 1, processes: int = 1) -> None:
    """Makes jax ready for the plan. Call it before the first use of a device, else it can only check.

    A CPU mesh asks for as many fake devices as the plan takes, its share where it is one of several ``processes``, and
    ``extra_devices`` more for an engine beside it, and keeps jax off any accelerator. For TPUs and GPUs nothing is set.

    Raises:
        MeshError: the accelerator is not in this machine, or jax has already started with too few CPU devices. Told
            from the machine's device files, without waiting for an accelerator runtime to start.
    """
    if plan.platform != "cpu":
        _require_hardware(plan)
        return
    wanted = plan.devices // processes + extra_devices
    try:
        jax.config.update("jax_platforms", "cpu")
        _ask_for_cpus(wanted)
    except RuntimeError as error:  # jax has started: what it has is all there will be
        if jax.default_backend() != "cpu" or len(jax.local_devices()) < wanted:
            raise MeshError(
                f"mesh {plan.name} needs {wanted} CPU devices; jax has already started with {len(jax.devices())} on "
                f"{jax.default_backend()}: {_ADVICE['cpu']}"
            ) from error


def prepare_engine(devices: int) -> None:
    """Asks for as many fake devices should a CPU be what jax finds. Once jax has started it changes nothing."""
    with contextlib.suppress(RuntimeError):
        _ask_for_cpus(devices)


def _ask_for_cpus(wanted: int) -> None:
    """Raises RuntimeError where jax has started already with another number."""
    # XLA's CPU client runs collectives on a thread pool of NPROC threads (by default one a core), and each waiting
    # participant blocks one. Independent collectives of a program run at once: too small a pool deadlocks.
    os.environ.setdefault("NPROC", str(_THREADS_PER_DEVICE * wanted))
    asked: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # -1 where nobody has asked
    jax.config.update("jax_num_cpu_devices", max(wanted, asked))


def build_mesh(plan: MeshPlan, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The plan's mesh with Auto axes, over the first of ``devices`` (by default all that this job has).

    Raises:
        MeshError: the devices are too few, of another kind, or cannot be laid out in these axis sizes.
    """
    if devices is None:
        if plan.platform != "cpu":
            _require_hardware(plan)
        devices = jax.devices()
    _require_kind(plan, devices)
    if len(devices) < plan.devices:
        advice = _ADVICE["cpu"] if plan.platform == "cpu" else f"choose --mesh={_name_for(devices)}"
        raise MeshError(
            f"mesh {plan.name} needs {plan.devices} devices; there are {len(devices)} "
            f"({devices[0].device_kind}): {advice}"
        )
    return _make(plan.shape, devices[: plan.devices], plan.describe())


def build_engine_mesh(config: EngineMesh, devices: Sequence[jax.Device]) -> Mesh:
    """An engine's mesh with Auto axes, over the first of ``devices``.

    Raises:
        MeshError: they are too few, or cannot be laid out in these axis sizes.
    """
    asked = f"an engine's mesh of tensor {config.tensor} x expert {config.expert}"
    if len(devices) < config.devices:
        raise MeshError(
            f"{asked} needs {config.devices} devices; there are {len(devices)} for it: choose smaller sizes"
        )
    shape = dict.fromkeys(AXES, 1) | {"tensor": config.tensor, "expert": config.expert}
    return _make(shape, devices[: config.devices], asked)


def spare_devices(mesh: Mesh) -> tuple[jax.Device, ...]:
    """This job's devices outside the mesh, in jax's order: room for an engine beside the learner."""
    taken = set(mesh.devices.flat)
    return tuple(device for device in jax.devices() if device not in taken)


def has_accelerator(platform: Platform, root: Path = Path("/")) -> bool:
    """Whether the machine's device files (under ``root``) show such an accelerator."""
    if platform == "cpu":
        return True
    if platform == "gpu":
        return any((root / node).exists() for node in _GPU_NODES)
    return count_chips(root) > 0


def count_chips(root: Path = Path("/")) -> int:
    """How many TPU chips the machine's device files (under ``root``) show."""
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    by_vendor = sum(file.read_text().strip() == _GOOGLE_PCI_VENDOR for file in vendors)
    return len(list((root / "dev").glob("accel*"))) or by_vendor


def _require_hardware(plan: MeshPlan) -> None:
    """A TPU runtime without a TPU waits minutes for cloud metadata: look before it is started."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    remote = "proxy" in (platforms or "")  # devices behind a proxy have no files here
    if not remote and not has_accelerator(plan.platform):
        raise MeshError(
            f"mesh {plan.name} needs {plan.chips} {plan.chip.name} chips; {_found()}: {_ADVICE[plan.platform]}"
        )


def _found() -> str:
    there = [platform for platform in ("tpu", "gpu") if has_accelerator(platform)]
    return f"this machine has a {there[0].upper()} only" if there else "this machine has no TPU and no GPU"


def _require_kind(plan: MeshPlan, devices: Sequence[jax.Device]) -> None:
    """A wrong chip would run, and report a false utilisation."""
    if not devices:
        raise MeshError(f"mesh {plan.name} needs {plan.devices} devices; none were given")
    first = devices[0]
    if first.platform != plan.platform:
        raise MeshError(
            f"mesh {plan.name} needs {plan.devices} {plan.chip.name} devices; jax found {len(devices)} "
            f"{first.platform} devices ({first.device_kind}): {_ADVICE[plan.platform]}"
        )
    if plan.chip.kinds and plan.chip.name != _chip_of(first.device_kind):
        raise MeshError(
            f"mesh {plan.name} needs {plan.chip.name} chips; these are {first.device_kind!r}: "
            f"choose --mesh={_name_for(devices)}"
        )


def _chip_of(device_kind: str) -> str | None:
    """The chip of a device kind. TPU kinds are whole names (``TPU v5`` is not ``TPU v5 lite``), GPU kinds a word."""
    for chip in CHIPS.values():
        if any(_is_kind(device_kind, kind, chip.platform) for kind in chip.kinds):
            return chip.name
    return None


def _is_kind(device_kind: str, kind: str, platform: Platform) -> bool:
    return device_kind == kind if platform == "tpu" else re.search(rf"\b{kind}\b", device_kind) is not None


def _name_for(devices: Sequence[jax.Device]) -> str:
    """The mesh name of all these devices."""
    chip = CHIPS[_chip_of(devices[0].device_kind) or ("cpu" if devices[0].platform == "cpu" else "gpu")]
    return f"{chip.name}-{len(devices) * chip.counted_per_chip // chip.devices_per_chip}"


def _sort_by_host(devices: Sequence[Any]) -> list[Any]:
    """Chips of one TPU slice: hosts by where they lie in it, then the chips of each."""

    def place(device: Any) -> tuple[int, ...]:
        return (*reversed(device.coords), device.core_on_chip)

    first: dict[int, tuple[int, ...]] = {}
    for device in devices:
        index = device.process_index
        first[index] = min(first.get(index, place(device)), place(device))
    return sorted(devices, key=lambda device: (first[device.process_index], place(device)))


def _make(shape: Mapping[str, int], devices: Sequence[jax.Device], asked: str) -> Mesh:
    """The mesh of these devices, neighbours in the machine as neighbours in it; ``asked`` is its name in errors.

    Several TPU slices are joined by the data-centre network, so each must hold whole replicas: data spans them. Those
    of one slice lie host by host: an engine takes the chips of a host, and where these lie in the learner's order too,
    its weights come by gathers along the slice. From orders that differ the compiler for TPUs makes groups of chips
    that it cannot route, and aborts.
    """
    sizes = tuple(shape.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape["data"] % slices:
        raise MeshError(f"{asked}: these are {slices} slices; set mesh.data to a multiple of {slices}")
    if devices[0].platform == "tpu" and slices == 1:
        return Mesh(np.array(_sort_by_host(devices)).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
        else:
            within = (shape["data"] // slices, *sizes[1:])
            between = (slices,) + (1,) * (len(sizes) - 1)
            grid = mesh_utils.create_hybrid_device_mesh(within, between, list(devices), allow_split_physical_axes=True)
    except (ValueError, NotImplementedError) as error:
        raise MeshError(f"{asked}: these sizes do not fit the slice's shape ({error}); choose others") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
