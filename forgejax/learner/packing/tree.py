"""Prefix trees: the samples of a step merged, so that every shared token is computed once.

Nodes lie in DFS pre-order, heaviest child first. A token's log-probability is read at its parent, and the loss lives on
the edges; each sample keeps its own terms, summed and never averaged, so plain autodiff over the tree gives exactly the
gradient of the unmerged samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32, Int64
from numpy.typing import NDArray

from forgejax.learner.packing.samples import Sample

Ints = NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTree:
    """A forest of T nodes, E unique edges and M terms of R samples.

    Attributes:
        samples: in DFS order of the node at which they end.
        order_R: which of the samples given to ``build_tree`` each is.
        tokens_T: node tokens; the last token of a sample is predicted but never fed, so it is no node by itself.
        positions_T: depth of the node, which the rotary embedding uses.
        end_T: index after the node's subtree.
        parent_T: index of the parent, -1 at a root.
        samples_through_T: how many samples are fed through the node; identical samples count each.
        edge_src_E: the node at which an edge's log-probability is read.
        edge_tgt_E: the token predicted there.
        edge_temperature_E: edges are unique in (source, target, temperature).
        term_edge_M: the edge of each trained token, samples one after another.
        shared_R: how many leading nodes each sample shares with the sample before it.
    """

    samples: tuple[Sample, ...]
    order_R: Int64[np.ndarray, " R"]
    tokens_T: Int32[np.ndarray, " T"]
    positions_T: Int32[np.ndarray, " T"]
    end_T: Int32[np.ndarray, " T"]
    parent_T: Int32[np.ndarray, " T"]
    samples_through_T: Int32[np.ndarray, " T"]
    edge_src_E: Int32[np.ndarray, " E"]
    edge_tgt_E: Int32[np.ndarray, " E"]
    edge_temperature_E: Float32[np.ndarray, " E"]
    term_edge_M: Int32[np.ndarray, " M"]
    shared_R: Int32[np.ndarray, " R"]

    @property
    def attention_pairs(self) -> int:
        """Query-key pairs: every node sees itself and its ancestors."""
        return int((self.positions_T.astype(np.int64) + 1).sum())


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class _Run:
    """A run of nodes without a branch: depths ``start`` to ``stop`` of sequence ``source``."""

    source: int
    start: int
    stop: int
    parent: _Run | None
    children: list[_Run] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)  # sequences that end with this run
    size: int = 0  # nodes of the whole subtree
    first: int = 0  # packed index of the node at depth `start`


def build_tree(samples: Sequence[Sample]) -> PrefixTree:
    """Merges samples. Time is that of sorting them: no Python runs per token.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a tree of no samples; expected at least one")
    sequences = [sample.fed_ids for sample in samples]
    root = _merge(sequences, [int(sample.token_ids[-1]) for sample in samples])
    runs = _pre_order(root)
    order, shared = _sample_order(runs)
    tokens, positions, end, parent = _nodes(runs, sequences)

    ordered = [samples[i] for i in order]
    fed = [len(sequences[i]) for i in order]
    # A sample's own nodes lie behind those of the one before it.
    end_of_share = np.cumsum(np.array(fed, np.int64) - shared)
    term_src = _sources(ordered, fed, shared, end_of_share)
    term_tgt = np.concatenate([sample.token_ids for sample in ordered])
    term_temperature = np.repeat(
        np.array([sample.temperature for sample in ordered], np.float32), [len(sample.token_ids) for sample in ordered]
    )
    temperatures, which = np.unique(term_temperature, return_inverse=True)
    key = ((which.astype(np.int64) * len(tokens) + term_src) << 32) | term_tgt
    _, first, term_edge = np.unique(key, return_index=True, return_inverse=True)
    return PrefixTree(
        samples=tuple(ordered),
        order_R=np.array(order),
        tokens_T=tokens,
        positions_T=positions,
        end_T=end,
        parent_T=parent,
        samples_through_T=count_samples_through(end_of_share - 1, end),
        edge_src_E=term_src[first].astype(np.int32),
        edge_tgt_E=term_tgt[first].astype(np.int32),
        edge_temperature_E=temperatures[which[first]],
        term_edge_M=term_edge.astype(np.int32),
        shared_R=shared,
    )


def count_samples_through(terminals: NDArray[np.int64], end: Ints) -> Ints:
    """How many samples end inside each node's subtree, of those that end at ``terminals``."""
    before = np.concatenate([[0], np.bincount(terminals, minlength=len(end)).cumsum()])
    return (before[end] - before[:-1]).astype(np.int32)


def _merge(sequences: Sequence[Ints], last_ids: Sequence[int]) -> _Run:
    """The trie of the sequences, branchless runs as one: sorted, each sequence adds what it does not share.

    Among equal sequences the last ids, which are not fed, decide: identical samples are neighbours.
    """
    # Big-endian bytes sort as the integers do.
    keys = [(ids.astype(">u4").tobytes(), last) for ids, last in zip(sequences, last_ids, strict=True)]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    root = _Run(source=order[0], start=0, stop=0, parent=None)
    path = [root]  # the runs of the sequence before, root first
    for index, common in zip(order, _shared_with_previous([sequences[index] for index in order]), strict=True):
        last = None
        while path[-1].stop > common:
            last = path.pop()
        if path[-1].stop < common:
            assert last is not None  # the sequence before is at least `common` long
            path.append(_split(last, common))
        if len(sequences[index]) > common:
            run = _Run(source=index, start=common, stop=len(sequences[index]), parent=path[-1])
            path[-1].children.append(run)
            path.append(run)
        path[-1].ends.append(index)
    return root


def _shared_with_previous(sequences: Sequence[Ints]) -> list[int]:
    """Length of the longest common prefix of each sequence with the one before it; 0 for the first."""
    lengths = np.array([len(ids) for ids in sequences])
    flat = np.concatenate(sequences)
    begin = np.cumsum(lengths) - lengths
    compared = np.minimum(lengths[1:], lengths[:-1])  # at least 1
    offset = np.cumsum(compared) - compared
    at = np.arange(int(compared.sum()))
    differs = flat[at + np.repeat(begin[1:] - offset, compared)] != flat[at + np.repeat(begin[:-1] - offset, compared)]
    within = at - np.repeat(offset, compared)
    common = np.minimum.reduceat(np.where(differs, within, len(flat)), offset) if len(offset) else offset
    return [0, *np.minimum(common, compared).tolist()]


def _split(run: _Run, depth: int) -> _Run:
    """Cuts a run, the last child of its parent, at a depth inside it; returns the upper part, now its parent."""
    assert run.parent is not None
    upper = _Run(source=run.source, start=run.start, stop=depth, parent=run.parent, children=[run])
    run.parent.children[-1] = upper
    run.start, run.parent = depth, upper
    return upper


def _pre_order(root: _Run) -> list[_Run]:
    """All runs but the empty root, heaviest child first, with ``size`` and ``first`` filled in."""
    found, stack = [], [root]
    while stack:
        run = stack.pop()
        found.append(run)
        stack.extend(run.children)
    for run in reversed(found):  # children before their parent
        run.size = run.stop - run.start
        if run.children:
            run.size += sum([child.size for child in run.children])
            run.children.sort(key=lambda child: child.size)

    ordered, stack, index = [], list(root.children), 0
    while stack:
        run = stack.pop()
        run.first = index
        index += run.stop - run.start
        ordered.append(run)
        stack.extend(run.children)  # the heaviest is last, and popped first
    return ordered


def _sample_order(runs: Sequence[_Run]) -> tuple[list[int], Ints]:
    """The sequences in DFS order, and how many nodes each shares with the one before it."""
    order: list[int] = []
    shared: list[int] = []
    common = 0
    for run in runs:
        common = min(common, run.start)
        for sample in run.ends:
            order.append(sample)
            shared.append(common)
            common = run.stop
    return order, np.array(shared, np.int32)


def _nodes(runs: Sequence[_Run], sequences: Sequence[Ints]) -> tuple[Ints, Ints, Ints, Ints]:
    """Token, depth, subtree end and parent of every node."""
    lengths = [run.stop - run.start for run in runs]
    tokens = np.concatenate([sequences[run.source][run.start : run.stop] for run in runs])
    positions = np.concatenate([np.arange(run.start, run.stop, dtype=np.int32) for run in runs])
    end = np.repeat(np.array([run.first + run.size for run in runs], np.int32), lengths)
    parent = np.arange(-1, len(tokens) - 1, dtype=np.int32)
    parent[[run.first for run in runs]] = [-1 if run.start == 0 else _last(run.parent) for run in runs]
    return tokens, positions, end, parent


def _last(run: _Run | None) -> int:
    assert run is not None
    return run.first + run.stop - run.start - 1


def _sources(samples: Sequence[Sample], fed: Sequence[int], shared: Ints, end_of_share: NDArray[np.int64]) -> Ints:
    """The nodes at which the trained tokens of the samples, in DFS order, are predicted."""
    path = np.empty(max(fed), np.int32)  # the nodes of one sample
    pieces = []
    for sample, length, common, end in zip(samples, fed, shared.tolist(), end_of_share.tolist(), strict=True):
        path[common:length] = np.arange(end - length + common, end, dtype=np.int32)
        pieces.append(path[len(sample.context_ids) - 1 : length].copy())
    return np.concatenate(pieces)
