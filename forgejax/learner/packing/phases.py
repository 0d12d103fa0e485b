"""Which samples run in ordinary rows and which behind trunks. Everything here is numpy."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.filling import Bin, Row, fill, fits, padded_rows
from forgejax.learner.packing.forest import Forest, Range
from forgejax.learner.packing.trunk_plan import TRUNK_COST, WORTHWHILE, TrunkUnit, plan_trunks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """One row of a trunk, and the rows that continue it.

    Attributes:
        path: the trunk's tokens.
        forest: what ``ended_samples`` count in.
        ended_samples: those that end in the trunk; trained here and in no other row of the same trunk.
        behind: the samples behind the trunk, their trees without it.
        rows: the rows of these, as ranges of their samples.
    """

    path: NDArray[np.int32]
    forest: Forest
    ended_samples: Range
    behind: Forest
    rows: Sequence[Sequence[Range]]

    @functools.cached_property
    def ended(self) -> Row:
        """The tree of the samples that end in the trunk; made when first asked for."""
        start, stop = self.ended_samples
        return [Bin.of(self.forest, start, stop)] if start < stop else []

    @functools.cached_property
    def leaves(self) -> tuple[Row, ...]:
        """The trees of each row behind the trunk; made when first asked for."""
        return tuple([Bin.of(self.behind, *one) for one in row] for row in self.rows)

    @property
    def samples_through(self) -> NDArray[np.int32]:
        """How many of the slot's samples are fed each token of the path."""
        through = np.full(len(self.path), sum(len(bin.tree.samples) for row in self.leaves for bin in row), np.int32)
        for bin in self.ended:
            through[: len(bin.tree.tokens)] += bin.tree.samples_through
        return through


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """Rows of ``rest`` as ranges of its samples, the slots of each trunk batch, and what all of it costs in rows."""

    rest: Forest
    rows: Sequence[Sequence[Range]]
    trunks: list[list[Slot]]
    cost: float


def in_phases(forest: Forest, config: PackConfig, row_shards: int) -> tuple[list[Row], list[list[Slot]]]:
    """Ordinary rows, and the slots of each trunk batch for the samples that a trunk serves better.

    There are trunks only where a sample is too long for a row, or where they save ``WORTHWHILE`` of the padded rows.
    """
    needed = plan_trunks(forest, config, needed=True) if config.trunks else []
    plan = _planned(needed, forest, config, row_shards)
    enough = (1 - WORTHWHILE) * plan.cost
    trunk_of_a_row = TrunkUnit(start=0, stop=0, length=config.row_length)
    if config.trunks and _least([trunk_of_a_row] * row_shards, forest, config, row_shards) <= enough:
        units = plan_trunks(forest, config)
        if _least(units, forest, config, row_shards) <= enough:  # else trees need not be cut to see it
            saving = _planned(units, forest, config, row_shards)
            plan = saving if saving.cost <= enough else plan
    return [[Bin.of(plan.rest, *one) for one in row] for row in plan.rows], plan.trunks


def _least(units: Sequence[TrunkUnit], forest: Forest, config: PackConfig, row_shards: int) -> float:
    """What trunks cost at least, in rows: the forest's other nodes fill theirs, and none is repeated."""
    slots = -(-len(units) // row_shards) * row_shards
    others = len(forest.tree.tokens) - sum(unit.length for unit in units)
    return slots * TRUNK_COST + others / config.row_length


def _planned(units: Sequence[TrunkUnit], forest: Forest, config: PackConfig, row_shards: int) -> _Plan:
    """The units behind trunks, everything else in ordinary rows."""
    units = [_trimmed(unit, forest, config) for unit in units]
    ordinary = np.ones(len(forest.fed), np.bool_)
    for unit in units:
        ordinary[unit.start : unit.stop] = False
    rest = forest.only(np.flatnonzero(ordinary)) if units and ordinary.any() else forest
    rows = fill(rest, config, row_shards) if ordinary.any() else []
    trunks = _lay_out([_slot(unit, forest, config) for unit in units], row_shards)
    phases = sum((len(slots) * (TRUNK_COST + max(len(slot.rows) for slot in slots)) for slots in trunks), 0.0)
    return _Plan(rest=rest, rows=rows, trunks=trunks, cost=padded_rows(len(rows), config.rows, row_shards) + phases)


def _trimmed(unit: TrunkUnit, forest: Forest, config: PackConfig) -> TrunkUnit:
    """The unit with no more samples that end in its trunk than a row holds; the others are left to ordinary rows."""
    first = _first_behind(unit, forest)
    ended = range(unit.start, first)
    start = unit.start + bisect.bisect_left(ended, True, key=lambda at: fits(forest.size(at, first), config))
    return dataclasses.replace(unit, start=start)


def _first_behind(unit: TrunkUnit, forest: Forest) -> int:
    """The first sample that goes on behind the trunk; those before it end in it."""
    return unit.start + int((forest.fed[unit.start : unit.stop] > unit.length).argmax())


def _slot(unit: TrunkUnit, forest: Forest, config: PackConfig) -> Slot:
    """A unit in one slot."""
    first = _first_behind(unit, forest)
    behind = forest.only(np.arange(first, unit.stop), unit.length)
    return Slot(
        path=forest.tree.samples[first].context_ids[: unit.length].astype(np.int32),
        forest=forest,
        ended_samples=(unit.start, first),
        behind=behind,
        rows=fill(behind, dataclasses.replace(config, rows=1), 1),
    )


def _lay_out(slots: Sequence[Slot], row_shards: int) -> list[list[Slot]]:
    """The slots of each trunk batch, one a row shard.

    Trunks with like numbers of leaf rows run together. Where there are fewer trunks than slots, the ones with the most
    leaf rows run in several slots, which share these rows. More than one row a shard would take no less time: a trunk's
    rows follow one another in any case.
    """
    slots = sorted(slots, key=lambda slot: -len(slot.rows))
    return [_spread(slots[at : at + row_shards], row_shards) for at in range(0, len(slots), row_shards)]


def _spread(slots: Sequence[Slot], count: int) -> list[Slot]:
    """The slots, those with the most leaf rows split, until there are ``count``; empty ones where that cannot be."""
    shares = [1] * len(slots)
    for _ in range(count - len(slots)):
        most = max(range(len(slots)), key=lambda at: len(slots[at].rows) / shares[at])
        shares[most] += 1
    found = []
    for slot, share in zip(slots, shares, strict=True):
        for part in range(share):
            rows = slot.rows[part::share]
            if rows:
                found.append(dataclasses.replace(slot, ended_samples=(0, 0) if part else slot.ended_samples, rows=rows))
    nothing = dataclasses.replace(slots[0], path=np.zeros(0, np.int32), ended_samples=(0, 0), rows=())
    return found + [nothing] * (count - len(found))
