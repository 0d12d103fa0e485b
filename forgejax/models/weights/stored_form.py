"""Between a stored tensor and a part of one of our weights: reshapes and transposes as data, copied in small blocks."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Rows = Callable[[int, int], NDArray[Any]]
"""``rows(start, stop)``: that part of a stored tensor along its first dimension."""

_BLOCK_BYTES = 4 << 20  # what of a stored tensor is in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredForm:
    """``"(H C) D -> D H C"``: the stored dimensions, each one or several of ours, and ours in our order."""

    stored: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @property
    def atoms(self) -> tuple[str, ...]:
        """Our dimensions in stored order."""
        return tuple(name for group in self.stored for name in group)

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[name] for name in group) for group in self.stored)

    def to_stored(self, ours: NDArray[Any]) -> NDArray[Any]:
        """A whole weight (of one layer, of one expert) as it is stored."""
        sizes = dict(zip(self.ours, ours.shape, strict=True))
        return self._in_stored_order(ours).reshape(self.stored_shape(sizes))

    def copy(
        self,
        rows: _Rows,
        sizes: Mapping[str, int],
        index: tuple[slice, ...],
        out: NDArray[Any],
        done: Callable[[], None],
    ) -> None:
        """Fills ``out`` with the part ``index`` (bounded slices, in our order) of a stored tensor.

        Only the rows that the part needs are asked for, a block at a time; ``done`` is called after each block.
        """
        bounds = dict(zip(self.ours, index, strict=True))
        first, *others = self.atoms
        inner = math.prod(sizes[name] for name in self.stored[0][1:])
        row_bytes = inner * math.prod(self.stored_shape(sizes)[1:]) * out.dtype.itemsize
        step = max(1, _BLOCK_BYTES // row_bytes)
        target = self._in_stored_order(out)
        part = tuple(bounds[name] for name in others)
        for start in range(bounds[first].start, bounds[first].stop, step):
            stop = min(start + step, bounds[first].stop)
            block = rows(start * inner, stop * inner).reshape(stop - start, *(sizes[name] for name in others))
            origin = bounds[first].start
            target[start - origin : stop - origin] = block[(slice(None), *part)]
            del block
            done()

    def _in_stored_order(self, ours: NDArray[Any]) -> NDArray[Any]:
        return np.transpose(ours, [self.ours.index(name) for name in self.atoms])


@functools.cache
def parse_stored_form(text: str) -> StoredForm:
    """Parses ``"(H C) D -> D H C"``; raises ValueError where both sides do not name the same dimensions."""
    left, arrow, right = text.partition(" -> ")
    stored = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w+", left))
    form = StoredForm(stored=stored, ours=tuple(right.split()))
    if not arrow or sorted(form.atoms) != sorted(form.ours):
        raise ValueError(f"stored form {text!r}: both sides of ' -> ' must name the same dimensions")
    return form
