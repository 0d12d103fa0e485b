"""Trunks and the rows of what follows them as the arrays of micro-batches. Everything here is numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from forgejax.learner.packing.assembling import assemble, shape_of
from forgejax.learner.packing.batch import PackedBatch, PackedTrunk, PackStats, Placement
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.filling import Row
from forgejax.learner.packing.phases import Slot
from forgejax.ops import tree_meta


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

    layers = [[slot.leaves[at] if at < len(slot.rows) else [] for slot in slots] for at in range(_depth(slots))]
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
    bins = [bin for slot in slots for row in slot.leaves for bin in row]
    ended = [bin for slot in slots for bin in slot.ended]
    fed = [sample.fed_tokens for bin in [*bins, *ended] for sample in bin.tree.samples]
    unmerged, trunks = np.array(fed, np.int64), np.array([len(slot.path) for slot in slots], np.int64)
    awaited = 0
    for some in batches:
        longest = max(len(slot.path) for slot in some)
        waits = [max(_leaf_pairs(slot, at) for slot in some) for at in range(_depth(some))]
        awaited += len(some) * (longest * (longest + 1) // 2 + sum(waits))
    return PackStats(
        samples=len(fed),
        trained_tokens=sum(len(bin.tree.term_edge) for bin in [*bins, *ended]),
        tree_tokens=sum(len(bin.tree.tokens) for bin in bins) + int(trunks.sum()),
        unmerged_tokens=int(unmerged.sum()),
        tree_pairs=sum(bin.pairs for bin in bins) + int(_pairs(trunks).sum()),
        unmerged_pairs=int(_pairs(unmerged).sum()),
        awaited_pairs=awaited,
        padded_tokens=sum(len(some) * (1 + _depth(some)) for some in batches) * config.row_length,
    )


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
    return max(len(slot.rows) for slot in slots)


def _leaf_pairs(slot: Slot, at: int) -> int:
    return sum(bin.pairs for bin in slot.leaves[at]) if at < len(slot.rows) else 0


def _pairs(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Query-key pairs of chains of so many tokens."""
    return tokens * (tokens + 1) // 2
