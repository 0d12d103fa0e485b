"""Packing for the step in two phases: trunks, and the rows of what follows them. Everything here is numpy."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from forgejax.learner.assembling import assemble, shape_of
from forgejax.learner.batch import PackedBatch, PackedTrunk, PackStats, Placement
from forgejax.learner.filling import Bin, Row, fill, fits, padded_rows
from forgejax.learner.forest import Forest
from forgejax.learner.pack_config import PackConfig
from forgejax.learner.trunk_plan import TRUNK_COST, TrunkUnit, plan_trunks
from forgejax.ops import tree_meta


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """One row of a trunk, and the rows that continue it.

    Attributes:
        path: [P] the trunk's tokens.
        ended: the tree of samples that end in the trunk; trained here and in no other row of the same trunk.
        leaves: rows of the samples behind the trunk, their trees without it; node positions count it.
    """

    path: NDArray[np.int32]
    ended: Row
    leaves: tuple[Row, ...]

    @property
    def samples_through(self) -> NDArray[np.int32]:
        """[P] how many of the slot's samples are fed each token."""
        through = np.full(len(self.path), sum(len(bin.tree.samples) for row in self.leaves for bin in row), np.int32)
        for bin in self.ended:
            through[: len(bin.tree.tokens)] += bin.tree.samples_through
        return through


def in_phases(forest: Forest, config: PackConfig, row_shards: int) -> tuple[list[Row], list[list[Slot]]]:
    """Ordinary rows, and the slots of each trunk batch for the samples that a trunk serves better.

    There are trunks only where they save padded rows, or where a sample is too long for a row.
    """
    units = [_trimmed(unit, forest, config) for unit in plan_trunks(forest, config)] if config.trunks else []
    if not units:
        return fill(forest, config, row_shards), []
    batches = _lay_out([_slot(unit, forest, config) for unit in units], row_shards)
    rest = np.ones(len(forest.fed), np.bool_)
    for unit in units:
        rest[unit.start : unit.stop] = False
    left = [forest.tree.samples[at] for at in np.flatnonzero(rest)]
    rows = fill(Forest.of(left, forest.weights[rest]), config, row_shards) if left else []
    if forest.fed.max() <= config.row_length:
        plain = fill(forest, config, row_shards)
        cost = padded_rows(len(rows), config.rows, row_shards) + _cost_in_rows(batches)
        if padded_rows(len(plain), config.rows, row_shards) <= cost:
            return plain, []
    return rows, batches


def assemble_trunk(slots: Sequence[Slot], index: int, config: PackConfig) -> tuple[PackedTrunk, list[Placement]]:
    """The micro-batches of one trunk batch; ``index`` is that of the first in ``PackedStep.parts``."""
    rows = [slot.ended for slot in slots]
    trunk, placements = assemble(rows, index, shape_of(rows, config), config)
    B, T = trunk.tokens.shape
    end = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    lengths = np.array([len(slot.path) for slot in slots], np.int32)
    for row, slot in enumerate(slots):
        here = (row, slice(lengths[row]))
        trunk.tokens[here], trunk.positions[here] = slot.path, np.arange(lengths[row])
        trunk.samples_through[here], end[here] = slot.samples_through, lengths[row]
    trunk = dataclasses.replace(trunk, attention=tree_meta(end, lengths, config.block))

    layers = [[slot.leaves[at] if at < len(slot.leaves) else [] for slot in slots] for at in range(_depth(slots))]
    shape = shape_of([row for layer in layers for row in layer], config)
    leaves = []
    for number, layer in enumerate(layers, start=index + 1):
        leaf, placed = assemble(layer, number, shape, config)
        leaves.append(_behind(leaf, layer, end, lengths, config))
        placements += placed
    return PackedTrunk(trunk=trunk, leaves=tuple(leaves)), placements


def trunk_stats(batches: Sequence[Sequence[Slot]], config: PackConfig) -> PackStats:
    """The figures of what ``assemble_trunk`` makes of the batches; a trunk in several slots counts in each."""
    slots = [slot for some in batches for slot in some]
    bins = [(len(slot.path), bin) for slot in slots for row in slot.leaves for bin in row]
    ended = [(0, bin) for slot in slots for bin in slot.ended]
    fed = [above + sample.fed_tokens for above, bin in [*bins, *ended] for sample in bin.tree.samples]
    unmerged, trunks = np.array(fed, np.int64), np.array([len(slot.path) for slot in slots], np.int64)
    awaited = 0
    for some in batches:
        longest = max(len(slot.path) for slot in some)
        waits = [max(_leaf_pairs(slot, at) for slot in some) for at in range(_depth(some))]
        awaited += len(some) * (longest * (longest + 1) // 2 + sum(waits))
    return PackStats(
        samples=len(fed),
        trained_tokens=sum(len(bin.tree.term_edge) for _, bin in [*bins, *ended]),
        tree_tokens=sum(len(bin.tree.tokens) for _, bin in bins) + int(trunks.sum()),
        unmerged_tokens=int(unmerged.sum()),
        tree_pairs=sum(bin.pairs for _, bin in bins) + int(_pairs(trunks).sum()),
        unmerged_pairs=int(_pairs(unmerged).sum()),
        awaited_pairs=awaited,
        padded_tokens=sum(len(some) * (1 + _depth(some)) for some in batches) * config.row_length,
    )


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
    samples, weights = forest.tree.samples, forest.weights
    behind = [
        dataclasses.replace(sample, context_ids=sample.context_ids[unit.length :])
        for sample in samples[first : unit.stop]
    ]
    leaves = []
    for row in fill(Forest.of(behind, weights[first : unit.stop]), dataclasses.replace(config, rows=1), 1):
        trees = [dataclasses.replace(bin.tree, positions=bin.tree.positions + np.int32(unit.length)) for bin in row]
        leaves.append([Bin.of(tree, bin.weights, config) for tree, bin in zip(trees, row, strict=True)])
    ended = [Bin.of(forest.part(unit.start, first), weights[unit.start : first], config)] if first > unit.start else []
    return Slot(path=samples[first].context_ids[: unit.length].astype(np.int32), ended=ended, leaves=tuple(leaves))


def _lay_out(slots: Sequence[Slot], row_shards: int) -> list[list[Slot]]:
    """The slots of each trunk batch, one a row shard.

    Trunks with like numbers of leaf rows run together. Where there are fewer trunks than slots, the ones with the most
    leaf rows run in several slots, which share these rows. More than one row a shard would take no less time: a trunk's
    rows follow one another in any case.
    """
    slots = sorted(slots, key=lambda slot: -len(slot.leaves))
    return [_spread(slots[at : at + row_shards], row_shards) for at in range(0, len(slots), row_shards)]


def _cost_in_rows(batches: Sequence[Sequence[Slot]]) -> float:
    """What the batches cost, in padded rows of ordinary micro-batches."""
    return sum((len(slots) * (TRUNK_COST + _depth(slots)) for slots in batches), 0.0)


def _spread(slots: Sequence[Slot], count: int) -> list[Slot]:
    """The slots, those with the most leaf rows split, until there are ``count``; empty ones where that cannot be."""
    shares = [1] * len(slots)
    for _ in range(count - len(slots)):
        most = max(range(len(slots)), key=lambda at: len(slots[at].leaves) / shares[at])
        shares[most] += 1
    found = []
    for slot, share in zip(slots, shares, strict=True):
        for part in range(share):
            leaves = slot.leaves[part::share]
            if leaves:
                found.append(dataclasses.replace(slot, ended=[] if part else slot.ended, leaves=leaves))
    nothing = Slot(path=np.zeros(0, np.int32), ended=[], leaves=())
    return found + [nothing] * (count - len(found))


def _behind(
    leaf: PackedBatch,
    rows: Sequence[Row],
    trunk_end_BT: Int[np.ndarray, "B T"],
    trunk_lengths_B: Int[np.ndarray, " B"],
    config: PackConfig,
) -> PackedBatch:
    """The leaf batch, its tokens seeing their row's trunk before themselves."""
    T = trunk_end_BT.shape[1]
    lengths = np.array([T + sum(len(bin.tree.tokens) for bin in row) for row in rows], np.int32)
    end = np.concatenate([trunk_end_BT, leaf.attention.end + T], axis=1)
    seen = np.arange(T)[None, :] < trunk_lengths_B[:, None]
    end[:, :T] = np.where(seen, lengths[:, None], end[:, :T])
    return dataclasses.replace(leaf, attention=tree_meta(end, lengths, config.block, q_offset=T))


def _depth(slots: Sequence[Slot]) -> int:
    return max(len(slot.leaves) for slot in slots)


def _leaf_pairs(slot: Slot, at: int) -> int:
    return sum(bin.pairs for bin in slot.leaves[at]) if at < len(slot.leaves) else 0


def _pairs(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Query-key pairs of chains of so many tokens."""
    return tokens * (tokens + 1) // 2
