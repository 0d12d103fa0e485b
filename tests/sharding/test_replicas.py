"""Laws of the engines of all hosts as one layout; that weights reach them is in tests/run/pod."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from forgejax.errors import MeshError
from forgejax.run.plan.chips import describe_chips
from forgejax.sharding import EngineMesh, Layout, MeshConfig, build_mesh, count_rows, join_hosts, resolve


def layout_of(name: str, **axes: int) -> Layout:
    plan = resolve(MeshConfig(name=name, **axes))
    return Layout(mesh=build_mesh(plan, describe_chips(plan)))


def test_hosts_and_their_chips_are_in_the_learners_order() -> None:
    learner = layout_of("v5e-64", fsdp=4, context=4, tensor=4)
    joined = join_hosts(EngineMesh(tensor=2, expert=2), learner)
    assert learner.mesh is not None and joined.mesh is not None
    assert joined.mesh.devices.shape == (16, 1, 1, 2, 2)
    assert joined.mesh.devices.flatten().tolist() == learner.mesh.devices.flatten().tolist()


def test_an_engine_of_other_devices_than_a_host_has_is_refused() -> None:
    with pytest.raises(MeshError, match=r"the hosts of the mesh have \[4\] devices; expected 2 on each"):
        join_hosts(EngineMesh(tensor=2), layout_of("v5e-64"))


def test_a_weight_that_is_stacked_by_layers_moves_some_layers_at_a_time_and_any_other_whole() -> None:
    learner = layout_of("v5e-64", fsdp=4, context=4, tensor=4)
    joined = join_hosts(EngineMesh(tensor=4), learner)

    def rows(shape: tuple[int, ...], names: tuple[str | None, ...], limit: int) -> int:
        held, target = learner.sharding(*names), joined.sharding(*names)
        assert held is not None and target is not None
        return count_rows(jax.ShapeDtypeStruct(shape, jnp.bfloat16), held, target, limit)

    layer = 8 * 16 * 2 // 4  # bytes of a host's chip
    assert rows((36, 8, 16), (None, None, "mlp"), 5 * layer) == 5
    assert rows((36, 8, 16), (None, None, "mlp"), 1) == 1
    assert rows((64, 16), ("vocab", None), 1) == 64
    assert rows((), (), 1) == 0
