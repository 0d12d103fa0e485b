"""Laws of arrays that go from one mesh to another."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from forgejax.sharding import copy_shards


def _split(first: int, shape: tuple[int, ...], *spec: str | None) -> Sharding:
    names = ("a", "b")[: len(shape)]
    devices = np.array(jax.devices()[first : first + int(np.prod(shape))]).reshape(shape)
    return NamedSharding(Mesh(devices, names), PartitionSpec(*spec))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (_split(0, (2, 2), "a", "b"), _split(4, (4,), None, "a")),
        (_split(0, (4,), "a"), _split(2, (2, 2), None, "b")),
        (_split(0, (2, 2), None, "b"), _split(1, (4,), "a")),
        (_split(0, (4,), None, "a"), SingleDeviceSharding(jax.devices()[5])),
        (SingleDeviceSharding(jax.devices()[0]), _split(0, (2, 2), "b", "a")),
        (_split(0, (4,), "a"), _split(0, (4,), "a")),
    ],
)
def test_any_split_becomes_any_other_and_outlives_it(
    source: Sharding, target: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
    given = jax.device_put(values, source)
    monkeypatch.setattr(type(given), "__array__", None)  # what passes the host would ask for it
    copied = copy_shards(given, target)
    monkeypatch.undo()
    given.delete()
    assert copied.sharding.is_equivalent_to(target, 2)
    np.testing.assert_array_equal(copied, values)


def test_an_array_of_the_host_is_cut_for_its_devices() -> None:
    values = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    copied = copy_shards(values, _split(0, (4,), "a"))
    values[:] = 0
    assert [shard.data.shape for shard in copied.addressable_shards] == [(1, 3)] * 4
    np.testing.assert_array_equal(copied, np.arange(12.0).reshape(4, 3))
