"""Arrays from the devices of one mesh to those of another, in another split, without passing the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

_Span = tuple[tuple[int, int], ...]  # begin and end along each dimension


def copy_shards(x: Any, sharding: Sharding) -> jax.Array:
    """A copy of an array, of the host or of any devices, where ``sharding`` wants it; no buffer is shared.

    Each device is given the parts of its shard by the devices that hold them. There is no collective in it, so it may
    be called while other threads have programs on these devices. Device arrays are all within this process.
    """
    if not isinstance(x, jax.Array):
        # On a CPU jax may go on reading the host's array itself, whatever ``may_alias`` says.
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.array(x[index]))
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        copied: jax.Array = jax.device_put(x, sharding, may_alias=False)
        return copied
    held = {_span(shard.index, x.shape): shard.data for shard in reversed(x.addressable_shards)}
    wanted = sharding.addressable_devices_indices_map(x.shape)
    shards = [_gather(held, _span(index, x.shape), device) for device, index in wanted.items()]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def _span(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> _Span:
    assert index is not None
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _gather(held: dict[_Span, jax.Array], wanted: _Span, device: jax.Device) -> jax.Array:
    """One shard on its device, from those that are held."""
    parts: dict[_Span, jax.Array] = {}
    for span, data in held.items():
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(span, wanted, strict=True))
        if all(begin < end for begin, end in common):
            inside = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, span, strict=True))
            part = data if common == span else data[inside]
            parts[common] = jax.device_put(part, device, may_alias=False)
    for axis in range(len(wanted)):
        parts = _join(parts, axis)
    (whole,) = parts.values()
    return whole


def _join(parts: dict[_Span, jax.Array], axis: int) -> dict[_Span, jax.Array]:
    """Parts that differ along one axis alone become one."""
    rows: dict[_Span, list[_Span]] = {}
    for span in sorted(parts):
        rows.setdefault((*span[:axis], *span[axis + 1 :]), []).append(span)
    joined = {}
    for spans in rows.values():
        whole = (*spans[0][:axis], (spans[0][axis][0], spans[-1][axis][1]), *spans[0][axis + 1 :])
        found = [parts[span] for span in spans]
        joined[whole] = found[0] if len(found) == 1 else jnp.concatenate(found, axis=axis)
    return joined
