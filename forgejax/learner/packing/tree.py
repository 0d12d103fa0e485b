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
    """A run of nodes without a branch: depths ``start`` to ``stop`` of what sample ``source`` is fed."""

    source: int
    start: int
    stop: int
    parent: _Run | None
    children: dict[int, _Run] = dataclasses.field(default_factory=dict)  # by their first token
    ends: list[int] = dataclasses.field(default_factory=list)  # samples that end with this run
    size: int = 0  # nodes of the whole subtree
    first: int = 0  # packed index of the node at depth `start`


def build_tree(samples: Sequence[Sample]) -> PrefixTree:
    """Merges samples. Memory is that of the tree and of the trained tokens, however often the samples repeat a prefix.

    No Python runs per token: a sample costs a comparison with each run it begins with.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a tree of no samples; expected at least one")
    runs = _pre_order(_merge(samples))
    order, shared = _sample_order(runs, samples)
    tokens, positions, end, parent = _nodes(runs, samples)

    ordered = [samples[i] for i in order]
    fed = [sample.fed_tokens for sample in ordered]
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


def _merge(samples: Sequence[Sample]) -> _Run:
    """The trie of what the samples are fed, branchless runs as one, under an empty root."""
    root = _Run(source=0, start=0, stop=0, parent=None)
    for index, sample in enumerate(samples):
        run, depth, fed = root, 0, sample.fed_tokens
        while depth < fed:
            first = _token(sample, depth)
            child = run.children.get(first)
            if child is None:
                run.children[first] = child = _Run(source=index, start=depth, stop=fed, parent=run)
            else:
                stop = min(child.stop, fed)
                own, other = (_fed_ids(each, depth, stop) for each in (sample, samples[child.source]))
                if own.tobytes() != other.tobytes():
                    stop = depth + int(np.argmax(own != other))
                child = _split(child, samples[child.source], stop) if stop < child.stop else child
            run, depth = child, child.stop
        run.ends.append(index)
    return root


def _token(sample: Sample, depth: int) -> int:
    context = len(sample.context_ids)
    return int(sample.context_ids[depth] if depth < context else sample.token_ids[depth - context])


def _fed_ids(sample: Sample, start: int, stop: int) -> Ints:
    """``sample.fed_ids[start:stop]``, copied only where it lies on both sides of the context's end."""
    context = len(sample.context_ids)
    if stop <= context:
        return sample.context_ids[start:stop]
    if start >= context:
        return sample.token_ids[start - context : stop - context]
    return np.concatenate([sample.context_ids[start:], sample.token_ids[: stop - context]])


def _split(run: _Run, sample: Sample, depth: int) -> _Run:
    """Cuts a run of a sample at a depth inside it; returns the upper part, now its parent."""
    assert run.parent is not None
    upper = _Run(source=run.source, start=run.start, stop=depth, parent=run.parent)
    run.parent.children[_token(sample, run.start)] = upper
    upper.children[_token(sample, depth)] = run
    run.start, run.parent = depth, upper
    return upper


def _pre_order(root: _Run) -> list[_Run]:
    """All runs but the empty root, heaviest child first, with ``size`` and ``first`` filled in."""
    found, stack = [], [root]
    while stack:
        run = stack.pop()
        found.append(run)
        stack.extend(run.children.values())
    for run in reversed(found):  # children before their parent
        run.size = run.stop - run.start + sum([child.size for child in run.children.values()])

    ordered, stack, index = [], _by_weight(root), 0
    while stack:
        run = stack.pop()
        run.first = index
        index += run.stop - run.start
        ordered.append(run)
        stack.extend(_by_weight(run))  # the heaviest is last, and popped first
    return ordered


def _by_weight(run: _Run) -> list[_Run]:
    """A run's children, lightest first; of equal ones that with the smaller first token."""
    if len(run.children) < 2:
        return list(run.children.values())
    return [child for _, child in sorted(run.children.items(), key=lambda item: (item[1].size, item[0]))]


def _sample_order(runs: Sequence[_Run], samples: Sequence[Sample]) -> tuple[list[int], Ints]:
    """The samples in DFS order, and how many nodes each shares with the one before it.

    Of those that are fed the same the last ids, which are not fed, decide: identical samples are neighbours.
    """
    order: list[int] = []
    shared: list[int] = []
    common = 0
    for run in runs:
        common = min(common, run.start)
        ends = run.ends if len(run.ends) < 2 else sorted(run.ends, key=lambda at: int(samples[at].token_ids[-1]))
        for sample in ends:
            order.append(sample)
            shared.append(common)
            common = run.stop
    return order, np.array(shared, np.int32)


def _nodes(runs: Sequence[_Run], samples: Sequence[Sample]) -> tuple[Ints, Ints, Ints, Ints]:
    """Token, depth, subtree end and parent of every node."""
    lengths = [run.stop - run.start for run in runs]
    tokens = np.concatenate([_fed_ids(samples[run.source], run.start, run.stop) for run in runs], dtype=np.int32)
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
