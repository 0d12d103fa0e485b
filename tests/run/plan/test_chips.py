"""Laws of chips that are not there."""

from __future__ import annotations

import pytest

from forgejax.run.plan import chips
from forgejax.run.plan.chips import can_compile, count_host_devices, describe_chips, usable_bytes
from forgejax.sharding import MeshConfig, MeshPlan, build_mesh, resolve


def plan_of(name: str, **axes: int) -> MeshPlan:
    return resolve(MeshConfig(name=name, **axes))


@pytest.mark.parametrize(
    ("name", "slice_"),
    [
        ("v5e-1", "1x1"), ("v5e-4", "2x2"), ("v5e-8", "2x4"), ("v5e-32", "4x8"), ("v5e-64", "8x8"),
        ("v5p-8", "2x2x1"), ("v5p-16", "2x2x2"), ("v5p-32", "2x2x4"), ("v5p-64", "2x4x4"), ("v5p-512", "4x8x8"),
        ("v6e-256", "16x16"), ("v5e-24", None),
    ],
)  # fmt: skip
def test_slices_have_the_shapes_that_their_makers_give_them(name: str, slice_: str | None) -> None:
    assert chips._name_slice(plan_of(name)) == slice_


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v5e-8", 8),
        ("v5e-16", 4),
        ("v5p-8", 4),
        ("v5p-512", 4),
        ("tpu7x-32", 8),
        ("h100-8", 8),
        ("h100-32", 8),
        ("cpu-8", 8),
    ],
)
def test_a_small_slice_is_one_host_and_others_have_four_chips_each(name: str, devices: int) -> None:
    plan = plan_of(name)
    hosts = {device.process_index for device in describe_chips(plan)}
    assert count_host_devices(plan) == devices
    assert len(hosts) * devices == plan.devices


def test_a_mesh_can_be_built_of_chips_that_are_not_there() -> None:
    built = build_mesh(plan_of("v5p-512"), describe_chips(plan_of("v5p-512")))
    assert dict(built.shape) == {"data": 1, "fsdp": 64, "context": 1, "expert": 1, "tensor": 4}
    groups = built.devices.reshape(-1, 4)
    assert all(len({device.process_index for device in group}) == 1 for group in groups)  # heads within a host


def test_a_program_may_take_what_the_compiler_lets_it() -> None:
    assert usable_bytes(plan_of("v5e-64")) == 15.75 * 2**30
    assert usable_bytes(plan_of("tpu7x-8")) == int(96 * 2**30 * 15.75 / 16)  # two devices share a chip's
    assert usable_bytes(plan_of("cpu-4")) is None


def test_chips_that_no_compiler_can_be_told_of_are_counted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert can_compile(plan_of("v5e-64"))
    assert not any(can_compile(plan_of(name)) for name in ("v4-32", "v5e-24", "h100-8", "cpu-4"))
