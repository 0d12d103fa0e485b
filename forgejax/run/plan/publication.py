"""How weights reach the engines of all hosts: by one global program a piece, so that what exists beside them is small.

A learner's weight, split over the whole mesh, becomes one replica a host, split over the chips of each. Of a weight
that is stacked by layers some layers are moved at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from forgejax.sharding import Layout

SLICE_BYTES = 256 * 2**20
"""Of a piece on one chip, where its weight is stacked by layers."""


@dataclasses.dataclass(frozen=True)
class Move:
    """A piece of a weight, as it lies and as it shall lie."""

    shape: tuple[int, ...]
    dtype: Any
    held: NamedSharding
    target: NamedSharding

    def source(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.held)


def list_moves(abstract_params: Any, learner: Layout, everywhere: Layout) -> Mapping[Move, int]:
    """The pieces of all weights, and how often each kind of piece is moved."""
    counts: Counter[Move] = Counter()
    places = zip(
        *(jax.tree.leaves(layout.placements(abstract_params)) for layout in (learner, everywhere)), strict=True
    )
    for x, (held, target) in zip(jax.tree.leaves(abstract_params), places, strict=True):
        rows = count_rows(x, held, target)
        for start in range(0, max(len(x.shape) and x.shape[0], 1), max(rows, 1)):
            shape = (min(rows, x.shape[0] - start), *x.shape[1:]) if x.shape else ()
            counts[Move(shape, x.dtype, held, target)] += 1
    return counts


def count_rows(x: Any, held: NamedSharding, target: NamedSharding) -> int:
    """How many rows of a weight are moved at a time: all where a mesh splits them."""
    if not x.shape:
        return 1
    own = target.shard_shape(x.shape)
    if own[0] != x.shape[0] or held.shard_shape(x.shape)[0] != x.shape[0]:
        return int(x.shape[0])
    size = math.prod(own) * x.dtype.itemsize
    return max(1, min(x.shape[0], x.shape[0] * SLICE_BYTES // max(size, 1)))
