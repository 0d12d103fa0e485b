"""How weights reach the engines of all hosts: by one global program a piece, so that what exists beside them is small.

The pieces that ``Replicas`` moves, as shapes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from forgejax.sharding import Layout, count_rows


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
