"""Laws of mesh names."""

import itertools
import math
import subprocess
import sys

import pytest

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding import MeshConfig, MeshPlan, resolve


def plan_of(name: str, **axes: int) -> MeshPlan:
    return resolve(MeshConfig(name=name, **axes))


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("cpu-4", 4, 4),
        ("v5e-64", 64, 64),
        ("v5litepod-16", 16, 16),
        ("v6e-8", 8, 8),
        ("v4-32", 16, 16),  # TensorCores, two to a chip, one device to a chip
        ("v5p-128", 64, 64),
        ("v3-8", 4, 8),  # TensorCores, each a device
        ("tpu7x-16", 8, 16),
        ("h100-8", 8, 8),
    ],
)
def test_the_count_of_a_name_means_what_the_maker_counts(name: str, chips: int, devices: int) -> None:
    plan = plan_of(name)
    assert (plan.chips, plan.devices) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cpu-1", {}),
        ("cpu-4", {"fsdp": 2, "tensor": 2}),
        ("cpu-8", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("v5e-4", {"fsdp": 4}),
        ("v5e-64", {"fsdp": 16, "tensor": 4}),
        ("v5e-256", {"fsdp": 64, "tensor": 4}),
        ("v5p-1024", {"data": 2, "fsdp": 64, "tensor": 4}),
        ("h100-8", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_a_preset_splits_weights_first_and_copies_them_last(name: str, sizes: dict[str, int]) -> None:
    assert plan_of(name).shape == dict.fromkeys(("data", "fsdp", "context", "expert", "tensor"), 1) | sizes


def test_every_possible_override_gives_axes_that_make_up_all_devices() -> None:
    for name in ("cpu-6", "cpu-8", "v5e-16", "h100-64"):
        devices = plan_of(name).devices
        divisors = [0] + [size for size in range(1, 9) if devices % size == 0]
        for data, fsdp, tensor in itertools.product(divisors, repeat=3):
            if devices % math.prod(size or 1 for size in (data, fsdp, tensor)):
                continue
            plan = plan_of(name, data=data, fsdp=fsdp, tensor=tensor)
            assert plan.devices == devices
            assert all(given in (0, plan.shape[axis]) for axis, given in (("data", data), ("fsdp", fsdp)))


def test_the_devices_an_override_leaves_over_go_to_fsdp_and_then_to_data() -> None:
    assert plan_of("v5e-64", tensor=8).shape == {"data": 1, "fsdp": 8, "context": 1, "expert": 1, "tensor": 8}
    assert plan_of("v5e-64", fsdp=4).shape == {"data": 4, "fsdp": 4, "context": 1, "expert": 1, "tensor": 4}
    assert plan_of("v5e-64", context=2).shape == {"data": 1, "fsdp": 8, "context": 2, "expert": 1, "tensor": 4}
    assert plan_of("v5e-64", expert=8).shape == {"data": 1, "fsdp": 2, "context": 1, "expert": 8, "tensor": 4}
    assert plan_of("cpu-8", data=1, fsdp=1).tensor == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5-64", ["v5e", "v5p", "a chip and a count"]),
        ("hl00-8", ["h100"]),
        ("v5e", ["no count", "v5e-64"]),
        ("cpu-0", ["no count"]),
        ("", ["expected a chip and a count"]),
        ("v4-7", ["TensorCores", "v4-8"]),
        ("cpu-" + "9" * 5000, ["expected a chip and a count"]),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(name: str, words: list[str]) -> None:
    with pytest.raises(MeshError) as raised:
        plan_of(name)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_overrides_that_do_not_make_up_the_devices_are_refused_with_their_product() -> None:
    with pytest.raises(MeshError, match=r"64 devices; fsdp 3 takes 3"):
        plan_of("v5e-64", fsdp=3)
    with pytest.raises(MeshError, match=r"4 devices; data 1 x fsdp 2 x context 1 x tensor 1 takes 2"):
        plan_of("cpu-4", data=1, fsdp=2, tensor=1, context=1)
    with pytest.raises(ConfigError, match=r"mesh.fsdp is -1"):
        MeshConfig(fsdp=-1)


def test_peak_flops_count_chips_and_are_unknown_for_a_cpu() -> None:
    assert plan_of("v5e-64").peak_flops == pytest.approx(64 * 197e12)
    assert plan_of("v4-32").peak_flops == pytest.approx(16 * 275e12)
    assert plan_of("cpu-4").peak_flops is None
    assert plan_of("v5e-1").chip.hbm_bytes == 16 * 2**30


def test_a_plan_describes_only_the_axes_that_split() -> None:
    assert plan_of("v5e-64").describe() == "v5e-64: 64 devices = fsdp 16 x tensor 4"
    assert plan_of("cpu-1").describe() == "cpu-1: 1 device"


def test_a_pod_is_planned_where_there_is_none_without_starting_jax() -> None:
    code = (
        "import jax; from jax._src import xla_bridge; from forgejax.sharding import *; "
        "assert resolve(MeshConfig(name='v5e-64')).devices == 64; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
