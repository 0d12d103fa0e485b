"""Which samples are worth a pass of their own for the tokens they begin with: see ``trunk_step``.

Where the samples below a branching point exceed a row, they are cut, and each row repeats their common prefix of p
tokens: r tokens below it take about ``r / (t - p)`` rows of t tokens. Behind a trunk they take ``r / t`` rows, and the
trunk itself one, of which the forward pass runs twice: 4 units of work where the rest takes 3. The plan with the fewest
rows so counted is chosen, over all branching points at once. Samples of more than t tokens have no choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.forest import Forest

TRUNK_COST = 4 / 3
"""Rows that a row of trunk counts for."""
WORTHWHILE = 0.1
"""The share of the rows that trunks must save, beyond those of samples too long for a row. Rows behind a trunk run in
micro-batches of one a shard, ordinary ones in ``PackConfig.rows``: weights are gathered and their gradients added that
many times as often, by further programs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkUnit:
    """Samples ``start`` to ``stop`` of the forest, in DFS order, that begin with the same ``length`` tokens, or end in
    them.

    Every trained token is predicted in the trunk if its sample ends there, else behind it: a sample's terms stay
    together.
    """

    start: int
    stop: int
    length: int


def plan_trunks(forest: Forest, config: PackConfig, *, needed: bool = False) -> list[TrunkUnit]:
    """The units that save rows, in order and apart; samples in none of them go into ordinary rows.

    ``needed``: only units that hold a sample too long for a row. Time is linear in the number of samples. Each sample
    is one that ``config.fits``.
    """
    contexts = [len(sample.context_ids) for sample in forest.tree.samples]
    search = _Search(
        fed=forest.fed.tolist(),
        contexts=contexts,
        shared=forest.tree.shared_R.tolist(),
        nodes=forest.nodes.tolist(),
        row=config.row_length,
        needed=needed,
    )
    units = []
    for start, stop in forest.roots:
        held = max(search.fed[start:stop]) if needed else search.nodes[stop] - search.nodes[start]
        if held > config.row_length:
            units += search.best(start, stop)
    return _with_prefixes(units, forest)


@dataclasses.dataclass(kw_only=True)
class _Node:
    """A branching point at ``depth``, or the samples that end there; samples ``start`` to ``stop`` lie below it."""

    depth: int
    start: int
    ends: bool
    children: list[_Node] = dataclasses.field(default_factory=list)
    # Filled in when the node is closed:
    tokens: int = 0  # nodes from the root to here and below it
    longest: int = 0  # tokens that the longest sample is fed
    first_source: int = 0  # the shallowest node at which a sample below is trained
    cut_rows: float = 0.0  # in ordinary rows, without any trunk
    rows: float = 0.0  # at best
    units: list[TrunkUnit] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """The branching points of one tree, visited children first."""

    fed: Sequence[int]
    contexts: Sequence[int]
    shared: Sequence[int]
    nodes: Sequence[int]
    row: int
    needed: bool

    def best(self, start: int, stop: int) -> list[TrunkUnit]:
        """The units of the tree of samples start to stop."""
        path: list[_Node] = []  # open nodes, each below the one before it
        for index in range(start, stop):
            common = self.shared[index] if index > start else 0
            while path and path[-1].depth > common:
                self._close(path, common, index)
            if path and path[-1].depth == common == self.fed[index] and path[-1].ends:
                continue  # the same tokens again
            if path and path[-1].depth == common and path[-1].ends:  # the samples here end where others go on
                self._close(path, common, index)
            path.append(_Node(depth=self.fed[index], start=index, ends=True))
        while path[-1].depth > 0:
            self._close(path, 0, stop)
        return path[0].children[0].units

    def _close(self, path: list[_Node], common: int, stop: int) -> None:
        """Takes the last node off the path and hangs it under one no shallower than ``common``."""
        node = path.pop()
        self._weigh(node, stop)
        if not path or path[-1].depth < common or path[-1].ends:
            path.append(_Node(depth=common, start=node.start, ends=False))
        path[-1].children.append(node)

    def _weigh(self, node: _Node, stop: int) -> None:
        samples = range(node.start, stop)
        node.tokens = self.fed[node.start] + self.nodes[stop] - self.nodes[node.start + 1]
        if node.ends:
            node.longest = node.depth
            node.first_source = min(self.contexts[index] for index in samples) - 1
            node.cut_rows = node.rows = node.tokens / self.row if node.longest <= self.row else math.inf
        else:
            node.longest = max(child.longest for child in node.children)
            node.first_source = min(child.first_source for child in node.children)
            node.cut_rows = self._cut_rows(node.depth, node.children)
            served = [child for child in node.children if child.units]
            apart = self._cut_rows(node.depth, [child for child in node.children if not child.units])
            apart += sum([child.rows for child in served])
            parted = [unit for child in served for unit in child.units]
            node.rows, node.units = (apart, parted) if parted and apart < node.cut_rows else (node.cut_rows, [])
        length = 0 if self.needed and node.longest <= self.row else self._length(node)
        if length > 0 and node.longest - length <= self.row:
            rows = TRUNK_COST + math.ceil(self._leaf_rows(node, length))
            if rows < node.rows:
                node.rows, node.units = rows, [TrunkUnit(start=node.start, stop=stop, length=length)]

    def _length(self, node: _Node) -> int:
        """Of the trunk that ends at the node, or above it where the node is too deep or a sample is trained before."""
        beyond = [child.first_source for child in node.children if child.depth > node.depth]
        if beyond and node.depth <= min(self.row, *beyond):
            return node.depth
        return min(node.depth, self.row, node.first_source)

    def _cut_rows(self, depth: int, children: Sequence[_Node]) -> float:
        """Ordinary rows of some that branch at a depth. What ends there adds none: it goes wherever its path is."""
        if max([child.longest for child in children], default=0) > self.row:
            return math.inf
        below = sum([child.tokens - depth for child in children])
        if below == 0:
            return 0.0
        if depth + below <= self.row:
            return (depth + below) / self.row
        return max(below / (self.row - depth), self._rows_of_large(children, 0))

    def _leaf_rows(self, node: _Node, length: int) -> float:
        return max((node.tokens - length) / self.row, self._rows_of_large(node.children, length))

    def _rows_of_large(self, children: Sequence[_Node], length: int) -> float:
        """Rows of the children that are cut again below a trunk, for they exceed a row."""
        large = [child for child in children if child.tokens - length > self.row]
        return sum([(child.tokens - child.depth) / (self.row + length - child.depth) for child in large], 0.0)


def _with_prefixes(units: Sequence[TrunkUnit], forest: Forest) -> list[TrunkUnit]:
    """The units, each with the samples just before it that end in its trunk."""
    grown: list[TrunkUnit] = []
    for unit in units:
        start, common = unit.start, unit.length
        lowest = grown[-1].stop if grown else 0
        while start > lowest and (common := min(common, int(forest.tree.shared_R[start]))) == forest.fed[start - 1]:
            start -= 1
        grown.append(dataclasses.replace(unit, start=start))
    return grown
