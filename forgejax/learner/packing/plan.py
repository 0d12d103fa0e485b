"""What a step's micro-batches hold, decided as ranges of samples before any array is made.

Rows without a trunk fill whole micro-batches, balanced over the shards. Where rows would repeat a long prefix it may
stand in a trunk of its own, which runs once before the rows that continue it (``step/trunk_step``).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.fill import count_padded_rows, fill_rows, fits_row, split_into_batches
from forgejax.learner.packing.forest import Forest, Range
from forgejax.learner.packing.trunks import TRUNK_COST, WORTHWHILE, TrunkUnit, plan_trunks

_NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bin:
    """Samples ``start`` to ``stop`` of a forest, as one tree in one row."""

    forest: Forest
    start: int
    stop: int

    @functools.cached_property
    def size(self) -> tuple[int, int, int]:
        """Nodes, edges and terms."""
        return self.forest.size(self.start, self.stop)

    @functools.cached_property
    def pairs(self) -> int:
        """Query-key pairs of attention, keys of a trunk included."""
        return self.forest.pairs(self.start, self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """What one row holds: trees behind one another; or, with a ``path``, one trunk and the trees that end in it.

    Attributes:
        bins: the trees, those of a trunk lying on its path.
        path: the trunk's tokens, or none.
        continued: how many samples go on behind the trunk.
    """

    bins: tuple[Bin, ...] = ()
    path: NDArray[np.int32] = dataclasses.field(default_factory=_NO_TOKENS.copy)
    continued: int = 0

    @property
    def tokens(self) -> int:
        return len(self.path) or sum([bin.size[0] for bin in self.bins])

    @property
    def edges(self) -> int:
        return sum([bin.size[1] for bin in self.bins])

    @property
    def terms(self) -> int:
        return sum([bin.size[2] for bin in self.bins])

    @property
    def pairs(self) -> int:
        """Query-key pairs of attention."""
        return len(self.path) * (len(self.path) + 1) // 2 or sum([bin.pairs for bin in self.bins])


BatchPlan = tuple[tuple[RowPlan, ...], ...]
"""The rows of each shard of one micro-batch; all shards have as many."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrunkPlan:
    """One trunk a shard, and the micro-batches of one row a shard that continue it."""

    trunk: BatchPlan
    leaves: tuple[BatchPlan, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """Every micro-batch of a step."""

    batches: tuple[BatchPlan, ...]
    trunks: tuple[TrunkPlan, ...] = ()

    def bins(self) -> Iterator[Bin]:
        """Every bin, batch by batch, a trunk's own before those of its leaves."""
        plans = [*self.batches, *(plan for each in self.trunks for plan in (each.trunk, *each.leaves))]
        return (bin for plan in plans for rows in plan for row in rows for bin in row.bins)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Slot:
    """A trunk on one shard: its path, what ends in it, and the rows behind it as ranges of a forest of their own."""

    path: NDArray[np.int32]
    ended: tuple[Bin, ...]
    behind: Forest
    rows: Sequence[Sequence[Range]]

    @property
    def samples_behind(self) -> int:
        return sum(stop - start for row in self.rows for start, stop in row)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Choice:
    """A set of trunks and the rows that are left over, and what all of it costs in rows."""

    rest: Forest
    rows: Sequence[Sequence[Range]]
    trunks: list[list[_Slot]]
    cost: float


def plan_step(forest: Forest, config: PackConfig, *, row_shards: int = 1) -> StepPlan:
    """Decides the rows of a forest.

    There are trunks only where a sample is too long for a row, or where they save ``WORTHWHILE`` of the padded rows.

    Args:
        forest: each of its samples is one that ``config.fits``; its weights have the normaliser.
        config: the shape of a micro-batch.
        row_shards: how many shards of the mesh split the rows; every micro-batch has ``rows`` for each.
    """
    needed = plan_trunks(forest, config, needed=True) if config.trunks else []
    choice = _weigh_trunks(needed, forest, config, row_shards)
    enough = (1 - WORTHWHILE) * choice.cost
    trunk_of_a_row = TrunkUnit(start=0, stop=0, length=config.row_length)
    if config.trunks and _bound_cost([trunk_of_a_row] * row_shards, forest, config, row_shards) <= enough:
        units = plan_trunks(forest, config)
        if _bound_cost(units, forest, config, row_shards) <= enough:  # else rows need not be filled to see it
            saving = _weigh_trunks(units, forest, config, row_shards)
            choice = saving if saving.cost <= enough else choice
    rows = [RowPlan(bins=_bins_of(choice.rest, ranges)) for ranges in choice.rows]
    return StepPlan(
        batches=tuple(_balance_rows(rows, config, row_shards)),
        trunks=tuple(_plan_trunk(slots) for slots in choice.trunks),
    )


def _bins_of(forest: Forest, ranges: Sequence[Range]) -> tuple[Bin, ...]:
    return tuple([Bin(forest=forest, start=start, stop=stop) for start, stop in ranges])


def _balance_rows(rows: Sequence[RowPlan], config: PackConfig, shards: int) -> Iterator[BatchPlan]:
    """The micro-batches of the rows, such that the shards of each cost about the same.

    Shards wait for each other at the end of a micro-batch: rows of like cost go into the same one, and within it the
    dearest free row goes to the cheapest shard. Empty rows fill up.
    """
    cost = {
        id(row): sum(config.token_cost * bin.size[0] + config.pair_cost * bin.pairs for bin in row.bins) for row in rows
    }
    queue = iter(sorted(rows, key=lambda row: -cost[id(row)]))
    for size in split_into_batches(len(rows), config.rows, shards):
        slots: list[list[RowPlan]] = [[] for _ in range(shards)]
        loads = [0.0] * shards
        for row in itertools.islice(queue, size * shards):
            shard = min((s for s in range(shards) if len(slots[s]) < size), key=loads.__getitem__)
            slots[shard].append(row)
            loads[shard] += cost[id(row)]
        yield tuple((*slot, *(RowPlan() for _ in range(size - len(slot)))) for slot in slots)


def _plan_trunk(slots: Sequence[_Slot]) -> TrunkPlan:
    """One slot a shard."""
    trunk = tuple((RowPlan(bins=slot.ended, path=slot.path, continued=slot.samples_behind),) for slot in slots)
    depth = max(len(slot.rows) for slot in slots)
    leaves = [
        tuple((RowPlan(bins=_bins_of(slot.behind, slot.rows[at]) if at < len(slot.rows) else ()),) for slot in slots)
        for at in range(depth)
    ]
    return TrunkPlan(trunk=trunk, leaves=tuple(leaves))


def _bound_cost(units: Sequence[TrunkUnit], forest: Forest, config: PackConfig, row_shards: int) -> float:
    """What trunks cost at least, in rows: the forest's other nodes fill theirs, and none is repeated."""
    slots = -(-len(units) // row_shards) * row_shards
    others = len(forest.tree.tokens_T) - sum(unit.length for unit in units)
    return slots * TRUNK_COST + others / config.row_length


def _weigh_trunks(units: Sequence[TrunkUnit], forest: Forest, config: PackConfig, row_shards: int) -> _Choice:
    """The units behind trunks, everything else in ordinary rows."""
    units = [_trim_ended(unit, forest, config) for unit in units]
    ordinary = np.ones(len(forest.fed), np.bool_)
    for unit in units:
        ordinary[unit.start : unit.stop] = False
    rest = forest.only(np.flatnonzero(ordinary)) if units and ordinary.any() else forest
    rows = fill_rows(rest, config, row_shards) if ordinary.any() else []
    trunks = _group_slots([_make_slot(unit, forest, config) for unit in units], row_shards)
    phases = sum((len(slots) * (TRUNK_COST + max(len(slot.rows) for slot in slots)) for slots in trunks), 0.0)
    cost = count_padded_rows(len(rows), config.rows, row_shards) + phases
    return _Choice(rest=rest, rows=rows, trunks=trunks, cost=cost)


def _trim_ended(unit: TrunkUnit, forest: Forest, config: PackConfig) -> TrunkUnit:
    """The unit with no more samples that end in its trunk than a row holds; the others are left to ordinary rows."""
    first = _find_first_behind(unit, forest)
    ended = range(unit.start, first)
    start = unit.start + bisect.bisect_left(ended, True, key=lambda at: fits_row(forest.size(at, first), config))
    return dataclasses.replace(unit, start=start)


def _find_first_behind(unit: TrunkUnit, forest: Forest) -> int:
    """The first sample that goes on behind the trunk; those before it end in it."""
    return unit.start + int((forest.fed[unit.start : unit.stop] > unit.length).argmax())


def _make_slot(unit: TrunkUnit, forest: Forest, config: PackConfig) -> _Slot:
    """A unit in one slot."""
    first = _find_first_behind(unit, forest)
    behind = forest.only(np.arange(first, unit.stop), unit.length)
    return _Slot(
        path=forest.tree.samples[first].context_ids[: unit.length].astype(np.int32),
        ended=_bins_of(forest, [(unit.start, first)]) if unit.start < first else (),
        behind=behind,
        rows=fill_rows(behind, dataclasses.replace(config, rows=1), 1),
    )


def _group_slots(slots: Sequence[_Slot], row_shards: int) -> list[list[_Slot]]:
    """The slots of each trunk batch, one a row shard.

    Trunks with like numbers of leaf rows run together. Where there are fewer trunks than slots, the ones with the most
    leaf rows run in several slots, which share these rows. More than one row a shard would take no less time: a trunk's
    rows follow one another in any case.
    """
    slots = sorted(slots, key=lambda slot: -len(slot.rows))
    return [_share_slots(slots[at : at + row_shards], row_shards) for at in range(0, len(slots), row_shards)]


def _share_slots(slots: Sequence[_Slot], count: int) -> list[_Slot]:
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
                found.append(dataclasses.replace(slot, ended=() if part else slot.ended, rows=rows))
    nothing = dataclasses.replace(slots[0], path=_NO_TOKENS, ended=(), rows=())
    return found + [nothing] * (count - len(found))
