"""Drift: do the ids that are trained on equal the ids that the engine was given and drew?

The ids are read back out of the packed batch, through the very indices the step uses, and compared with records made
elsewhere: a mistake in recording, merging, cutting or packing shows as a count.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from forgejax.learner.packing.batch import PackedStep, Part, Placement
from forgejax.types import TokenIds

Ids = Sequence[int] | NDArray[np.integer]


def count_drift(packed: PackedStep, given: Mapping[str, tuple[Ids, Ids]], excused: Container[str] = ()) -> int:
    """How many positions differ, over all samples of a step.

    Args:
        packed: what the step trains on.
        given: for each request id, the prompt ids and the sampled ids of the engine's own log. Each position of a
            sample without a record counts.
        excused: requests that are left out.
    """
    parts = packed.parts
    return sum(
        _differences(read_trained_ids(parts[placement.batch], placement), given.get(placement.request_id))
        for placement in packed.placements
        if placement.request_id not in excused
    )


def read_trained_ids(part: Part, placement: Placement) -> tuple[TokenIds, TokenIds]:
    """The context and the trained ids of one sample, as the step sees them.

    The context of a term is what its source node attends to; the last term's source sees the whole sample. A row behind
    a trunk attends to the trunk's row first.
    """
    batch, row, terms = part.batch, placement.row, slice(placement.start, placement.stop)
    tokens = np.asarray(batch.tokens_BT)[row]
    if part.trunk is not None:
        tokens = np.concatenate([np.asarray(part.trunk.tokens_BT)[row], tokens])
    edges = np.asarray(batch.term_edge_BM)[row, terms]
    sources = np.asarray(batch.edge_src_BE)[row, edges] + len(tokens) - batch.tokens_BT.shape[1]
    sampled = np.asarray(batch.edge_tgt_BE)[row, edges]
    index = np.arange(int(sources[-1]) + 1)
    seen = index[np.asarray(batch.attention.end)[row, index] > sources[-1]]
    context = seen[: np.searchsorted(seen, sources[0], side="right")]
    return tokens[context], _read_twice(sampled, tokens[seen[len(context) :]])


def _read_twice(predicted: TokenIds, fed: TokenIds) -> TokenIds:
    """A trained id is predicted at one node and fed at the next: -1 where the two differ."""
    if len(fed) != len(predicted) - 1:
        return np.full(len(predicted), -1, np.int32)
    agree = np.append(predicted[:-1] == fed, True)
    return np.where(agree, predicted, -1).astype(np.int32)


def _differences(trained: tuple[TokenIds, TokenIds], given: tuple[Ids, Ids] | None) -> int:
    if given is None:
        return sum(len(ids) for ids in trained)
    return sum(_mismatches(ours, theirs) for ours, theirs in zip(trained, given, strict=True))


def _mismatches(a: Ids, b: Ids) -> int:
    a, b = np.asarray(a), np.asarray(b)
    count = min(len(a), len(b))
    return int((a[:count] != b[:count]).sum()) + abs(len(a) - len(b))
