"""A digest tells arrays apart by one bit, a place, a shape, a dtype or a name, and never by how they are laid out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.learner import digest_arrays

TREE: dict[str, Any] = {
    "a": jnp.arange(24, dtype=jnp.float32).reshape(4, 6),
    "b": jnp.ones((3,), jnp.bfloat16),
    "count": jnp.int32(5),
}


def test_equal_bits_have_equal_digests_of_16_digits_however_they_are_sharded() -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    laid = jax.device_put(TREE["a"], jax.NamedSharding(mesh, jax.P("x", "y")))
    digest = digest_arrays(TREE)

    assert len(digest) == 16 and int(digest, 16) >= 0
    assert digest_arrays(TREE | {"a": laid}) == digest
    assert digest_arrays({name: np.asarray(leaf) for name, leaf in TREE.items()}) == digest


@pytest.mark.parametrize(
    "other",
    [
        {"a": TREE["a"].at[0, 0].set(-0.0)},
        {"a": jnp.nextafter(TREE["a"], jnp.where(jnp.arange(6) == 3, 99.0, TREE["a"]))},
        {"a": TREE["a"].at[:2].set(TREE["a"][1::-1])},
        {"a": TREE["a"].reshape(6, 4)},
        {"b": jnp.ones((3,), jnp.float16)},
        {"count": jnp.int32(6)},
    ],
    ids=["sign of zero", "last bits", "two rows swapped", "shape", "dtype", "count"],
)
def test_another_bit_place_shape_or_dtype_has_another_digest(other: dict[str, Any]) -> None:
    assert digest_arrays(TREE | other) != digest_arrays(TREE)


def test_another_name_has_another_digest() -> None:
    assert digest_arrays({"a": TREE["a"]}) != digest_arrays({"b": TREE["a"]})
