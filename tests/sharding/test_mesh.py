"""Laws of building a mesh on the machine at hand."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from forgejax.errors import MeshError
from forgejax.sharding import (
    MeshConfig,
    MeshPlan,
    build_mesh,
    has_accelerator,
    mesh,
    prepare_platform,
    resolve,
    spare_devices,
)


def plan_of(name: str, **axes: int) -> MeshPlan:
    return resolve(MeshConfig(name=name, **axes))


@dataclass(frozen=True)
class FakeDevice:
    platform: str
    device_kind: str
    id: int = 0
    process_index: int = 0
    slice_index: int = 0


def fakes(platform: str, kind: str, count: int) -> Any:
    return [FakeDevice(platform, kind, id=index) for index in range(count)]


def test_a_mesh_takes_the_first_devices_and_leaves_the_rest_to_the_engine() -> None:
    built = build_mesh(plan_of("cpu-4"))
    assert dict(built.shape) == {"data": 1, "fsdp": 2, "context": 1, "expert": 1, "tensor": 2}
    assert built.axis_types == (AxisType.Auto,) * 5
    assert [device.id for device in built.devices.flat] == [0, 1, 2, 3]
    assert [device.id for device in spare_devices(built)] == [4, 5, 6, 7]


def test_neighbours_of_the_tensor_axis_are_neighbours_in_the_machine() -> None:
    built = build_mesh(plan_of("cpu-8"))
    assert [[device.id for device in pair] for pair in built.devices.reshape(4, 2)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_mesh_may_be_built_over_chosen_devices() -> None:
    built = build_mesh(plan_of("cpu-2"), jax.devices()[6:])
    assert [device.id for device in built.devices.flat] == [6, 7]


def test_more_cpu_devices_than_there_are_is_an_error_that_says_how_to_get_them() -> None:
    with pytest.raises(MeshError, match=r"cpu-16 needs 16 devices; there are 8.*JAX_NUM_CPU_DEVICES"):
        build_mesh(plan_of("cpu-16"))
    with pytest.raises(MeshError, match=r"needs 9 CPU devices; jax has already started with 8"):
        prepare_platform(plan_of("cpu-8"), extra_devices=1)
    prepare_platform(plan_of("cpu-8"), extra_devices=0)


@pytest.mark.parametrize("name", ["v5e-64", "h100-8"])
def test_an_accelerator_that_is_not_here_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "has_accelerator", lambda platform: platform == "cpu")
    started = time.monotonic()
    for refuse in (lambda: prepare_platform(plan_of(name)), lambda: build_mesh(plan_of(name))):
        with pytest.raises(MeshError, match=rf"{name} needs \d+ \w+ chips; this machine has no TPU and no GPU.*cpu-4"):
            refuse()
    assert time.monotonic() - started < 1.0


def test_an_accelerator_that_jax_does_not_see_is_refused_with_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mesh, "has_accelerator", lambda platform: True)
    with pytest.raises(MeshError, match=r"jax found 8 cpu devices.*jax\[cuda13\]"):
        build_mesh(plan_of("h100-8"))


@pytest.mark.parametrize(
    ("asked", "platform", "kind", "there"),
    [
        ("v5e-8", "tpu", "TPU v6 lite", "v6e-8"),
        ("v5p-16", "tpu", "TPU v5 lite", "v5e-8"),
        ("v5e-8", "tpu", "TPU v5", "v5p-16"),
        ("a100-8", "gpu", "NVIDIA H100 80GB HBM3", "h100-8"),
        ("h100-8", "gpu", "NVIDIA GeForce RTX 3090", "gpu-8"),
        ("l4-8", "gpu", "NVIDIA L40S", "l40s-8"),
    ],
)
def test_another_chip_than_the_named_one_is_refused_with_its_own_name(
    asked: str, platform: str, kind: str, there: str
) -> None:
    with pytest.raises(MeshError, match=rf"these are '{kind}': choose --mesh={there}$"):
        build_mesh(plan_of(asked), fakes(platform, kind, 8))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"])
def test_gpus_of_one_name_in_other_packages_are_accepted(kind: str) -> None:
    assert build_mesh(plan_of("a100-4"), fakes("gpu", kind, 4)).shape["fsdp"] == 2
    assert build_mesh(plan_of("gpu-4"), fakes("gpu", kind, 4)).shape["tensor"] == 2


def test_too_few_chips_are_refused_with_the_mesh_there_is() -> None:
    with pytest.raises(MeshError, match=r"h100-8 needs 8 devices; there are 4 .*choose --mesh=h100-4"):
        build_mesh(plan_of("h100-8"), fakes("gpu", "NVIDIA H100 80GB HBM3", 4))


def test_slices_joined_by_a_network_must_each_hold_whole_replicas() -> None:
    two_slices: Any = [FakeDevice("gpu", "NVIDIA H100 80GB HBM3", id=i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(MeshError, match=r"these are 2 slices; set mesh.data to a multiple of 2"):
        build_mesh(plan_of("h100-8"), two_slices)
    built = build_mesh(plan_of("h100-8", data=2), two_slices)
    assert [{device.slice_index for device in replica.flat} for replica in built.devices] == [{0}, {1}]


def test_chips_of_a_slice_lie_host_by_host_and_in_every_host_in_the_same_order() -> None:
    """Two by two chips a host in a slice of four by four, whose hosts are numbered in no order of theirs."""

    @dataclass(frozen=True)
    class Chip(FakeDevice):
        coords: tuple[int, int, int] = (0, 0, 0)
        core_on_chip: int = 0

    numbers = {(0, 0): 3, (1, 0): 1, (0, 1): 0, (1, 1): 2}
    chips: Any = [
        Chip("tpu", "TPU v5 lite", id=4 * y + x, process_index=numbers[x // 2, y // 2], coords=(x, y, 0))
        for x in range(4)
        for y in range(4)
    ]
    built = build_mesh(plan_of("v5e-16"), chips)
    hosts = built.devices.reshape(4, 4)
    assert [{device.process_index for device in host} for host in hosts] == [{3}, {1}, {0}, {2}]
    assert [[(device.coords[0] % 2, device.coords[1] % 2) for device in host] for host in hosts] == [
        [(0, 0), (1, 0), (0, 1), (1, 1)]
    ] * 4


def test_accelerators_are_told_from_the_device_files(tmp_path: Path) -> None:
    assert has_accelerator("cpu", tmp_path)
    assert not has_accelerator("tpu", tmp_path)
    assert not has_accelerator("gpu", tmp_path)
    vendor = tmp_path / "sys/bus/pci/devices/0000:00:04.0/vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x10de\n")
    assert not has_accelerator("tpu", tmp_path)
    vendor.write_text("0x1ae0\n")
    assert has_accelerator("tpu", tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert has_accelerator("gpu", tmp_path)


def test_a_cpu_mesh_in_a_fresh_process_gets_its_devices_and_one_for_the_engine() -> None:
    code = (
        "import jax; from forgejax.sharding import *; plan = resolve(MeshConfig(name='cpu-4')); "
        "prepare_platform(plan, extra_devices=1); built = build_mesh(plan); "
        "assert len(jax.devices()) == 5 and len(spare_devices(built)) == 1, jax.devices()"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
