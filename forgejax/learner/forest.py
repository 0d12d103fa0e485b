"""Ranges of a forest's samples as trees of their own, cut out of it: no token is compared again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from forgejax.learner.samples import Sample
from forgejax.learner.tree import PrefixTree, build_tree, samples_through

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """All samples of a step, merged, in DFS order; ``weights[i]`` is the loss weight of each term of sample i.

    A node lies in exactly one sample's share: the nodes that the sample does not have in common with the one before it.
    Shares lie behind one another, as samples do.
    """

    tree: PrefixTree
    weights: Float[np.ndarray, " S"]

    @staticmethod
    def of(samples: Sequence[Sample], weights: Float[np.ndarray, " S"]) -> Forest:
        """Merges samples with their weights, given in any order; at least one."""
        tree = build_tree(samples)
        return Forest(tree=tree, weights=weights[tree.order])

    @functools.cached_property
    def fed(self) -> NDArray[np.int64]:
        """[S] tokens each sample is fed."""
        return np.array([sample.fed_tokens for sample in self.tree.samples], np.int64)

    @functools.cached_property
    def nodes(self) -> NDArray[np.int64]:
        """[S + 1] where the share of each sample begins."""
        return np.concatenate([[0], np.cumsum(self.fed - self.tree.shared)])

    @functools.cached_property
    def terms(self) -> NDArray[np.int64]:
        """[S + 1] where the terms of each sample begin."""
        return np.concatenate([[0], np.cumsum([len(sample.token_ids) for sample in self.tree.samples])])

    @property
    def roots(self) -> list[Range]:
        """The samples of each tree."""
        begin = np.flatnonzero(self.tree.shared == 0).tolist()
        return list(itertools.pairwise([*begin, len(self.tree.samples)]))

    def size(self, start: int, stop: int) -> tuple[int, int, int]:
        """Nodes, edges and terms of the tree of samples start to stop."""
        first, last = int(self.terms[start]), int(self.terms[stop])
        shared = int(self.tree.shared[start])
        if shared:
            edges = len(np.unique(self.tree.term_edge[first:last]))
        else:  # no edge of a whole tree is another's
            edges = int(self._edges[last] - self._edges[first])
        return shared + int(self.nodes[stop] - self.nodes[start]), edges, last - first

    def part(self, start: int, stop: int) -> PrefixTree:
        """The tree of samples start to stop: what ``build_tree`` makes of them, but for the order of equal branches."""
        tree, low, high = self.tree, int(self.nodes[start]), int(self.nodes[stop])
        ancestors = self._ancestors(start)
        above = len(ancestors)
        kept = np.concatenate([ancestors, np.arange(low, high)])
        parent, position = tree.parent[kept], tree.positions[kept]
        end = (np.minimum(tree.end[kept], high) - low + above).astype(np.int32)
        last = self.nodes[start + 1 : stop + 1] - 1  # where each sample ends
        edges, term_edge = np.unique(tree.term_edge[self.terms[start] : self.terms[stop]], return_inverse=True)
        source = tree.edge_src[edges]
        shared = tree.shared[start:stop].copy()
        shared[0] = 0
        return PrefixTree(
            samples=tree.samples[start:stop],
            order=np.arange(stop - start),
            tokens=tree.tokens[kept],
            positions=position,
            end=end,
            parent=np.where(parent >= low, parent - low + above, position - 1).astype(np.int32),
            samples_through=samples_through(last - low + above, end),
            # A node above is found at its depth: there is one for each.
            edge_src=np.where(source >= low, source - low + above, tree.positions[source]).astype(np.int32),
            edge_tgt=tree.edge_tgt[edges],
            edge_temperature=tree.edge_temperature[edges],
            term_edge=term_edge.astype(np.int32),
            shared=shared,
        )

    def _ancestors(self, start: int) -> NDArray[np.int64]:
        """The nodes that the sample has in common with the one before it."""
        shared = int(self.tree.shared[start])
        if not shared:
            return np.zeros(0, np.int64)
        last = int(self.nodes[start + 1]) - 1
        root = int(self._root_nodes[np.searchsorted(self._root_nodes, last, side="right") - 1])
        return root + np.flatnonzero(self.tree.end[root : last + 1] > last)[:shared]

    @functools.cached_property
    def _edges(self) -> NDArray[np.int64]:
        """[M + 1] how many different edges the terms before each have."""
        term_edge = self.tree.term_edge
        first = np.empty(len(self.tree.edge_src), np.int64)
        first[term_edge[::-1]] = np.arange(len(term_edge))[::-1]  # of several terms the last that is written counts
        return np.concatenate([[0], np.cumsum(np.bincount(first, minlength=len(term_edge)))])

    @functools.cached_property
    def _root_nodes(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.tree.positions == 0)
