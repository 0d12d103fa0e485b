"""Laws of published weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from forgejax.errors import EngineError
from tests.rollout import tiny


def test_published_weights_survive_the_donation_of_the_learners_buffers() -> None:
    engine = tiny.engine()
    given = jax.device_put(tiny.params(1), engine.layout.sharding())
    expected = jax.tree.map(np.asarray, given)
    box = engine.load_params(tiny.params(0))
    box.publish(given, 7)
    jax.tree.map(lambda x: x.delete(), given)
    assert box.current.version == 7
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, box.current.params), expected)


def test_weights_sharded_over_a_mesh_are_gathered_on_the_engines_device() -> None:
    engine = tiny.engine()
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    given = jax.tree.map(lambda x: jax.device_put(x, sharding), tiny.params(1))
    box = engine.load_params(tiny.params(0))
    box.publish(given, 1)
    for leaf, expected in zip(jax.tree.leaves(box.current.params), jax.tree.leaves(tiny.params(1)), strict=True):
        assert leaf.devices() == set(engine.mesh.devices.flat)
        np.testing.assert_array_equal(leaf, expected)


def test_weights_of_another_model_are_refused_by_name() -> None:
    box = tiny.engine().load_params()
    other = jax.tree.map(lambda x: x[..., :1], tiny.params())
    with pytest.raises(EngineError, match=r"another model: at .*blocks.*given .* expected"):
        box.publish(other, 1)
    with pytest.raises(EngineError, match="version 2147483648: expected 0 to 2147483647"):
        box.publish(tiny.params(), 2**31)
