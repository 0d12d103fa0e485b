"""A checksum of arrays on their devices, to tell whether two runs came to the same bits."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SALTS = (0x9E3779B9, 0x85EBCA6B)


def digest_arrays(tree: Any) -> str:
    """16 hexadecimal digits of the bits, shapes, dtypes and names of a pytree's arrays.

    Equal for equal bits, however the arrays are sharded: their words are mixed with their places and added up as
    integers, which no order changes. Two sums of 32 bits an array leave the devices, and no array does.
    """
    digest = hashlib.sha256()
    named = jax.tree_util.tree_leaves_with_path(tree)
    added = jax.device_get([_add_words(jnp.asarray(leaf)) for _, leaf in named])
    for (path, leaf), sums in zip(named, added, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {np.asarray(sums).tolist()}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _add_words(x: jax.Array) -> jax.Array:
    """Two sums, modulo 2**32, of the words of an array, each mixed with where it stands."""
    words = _view_words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.stack([_mix(words ^ _mix(place + jnp.uint32(salt))).sum(dtype=jnp.uint32) for salt in _SALTS])


def _view_words(x: jax.Array) -> jax.Array:
    """The bits as unsigned integers of at most 32 bits; wider numbers have two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit of x (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
