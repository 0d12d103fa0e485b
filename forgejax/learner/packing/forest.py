"""Some of a forest's samples as a forest of their own, cut out of it: no token is compared again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from forgejax.learner.packing.samples import Sample
from forgejax.learner.packing.tree import PrefixTree, build_tree, count_samples_through

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """Samples, merged, in DFS order; ``weights_R[i]`` is the loss weight of each term of sample i.

    A node lies in exactly one sample's share: the nodes that the sample does not have in common with the one before it.
    Shares lie behind one another, as samples do. The first ``above`` tokens, with which all samples begin, are no
    nodes; positions count them.
    """

    tree: PrefixTree
    weights_R: Float[np.ndarray, " R"]
    above: int = 0

    @staticmethod
    def of(samples: Sequence[Sample], weights_R: Float[np.ndarray, " R"]) -> Forest:
        """Merges samples with their weights, given in any order; at least one."""
        tree = build_tree(samples)
        return Forest(tree=tree, weights_R=weights_R[tree.order_R])

    @functools.cached_property
    def fed(self) -> NDArray[np.int64]:
        """The nodes that each sample is fed."""
        return np.array([sample.fed_tokens for sample in self.tree.samples], np.int64) - self.above

    @functools.cached_property
    def nodes(self) -> NDArray[np.int64]:
        """[R + 1] where the share of each sample begins."""
        return _sums(self.fed - self.tree.shared_R)

    @functools.cached_property
    def terms(self) -> NDArray[np.int64]:
        """[R + 1] where the terms of each sample begin."""
        return _sums([len(sample.token_ids) for sample in self.tree.samples])

    @functools.cached_property
    def distinct(self) -> NDArray[np.int64]:
        """[R + 1] how many different samples are among the first ones, by their tokens."""
        last = np.array([sample.token_ids[-1] for sample in self.tree.samples])
        fed, shared = self.fed, self.tree.shared_R
        same = (fed[1:] == fed[:-1]) & (fed[1:] == shared[1:]) & (last[1:] == last[:-1])
        return _sums(np.concatenate([[1], ~same]))

    @property
    def roots(self) -> list[Range]:
        """The samples of each tree."""
        begin = np.flatnonzero(self.tree.shared_R == 0).tolist()
        return list(itertools.pairwise([*begin, len(self.tree.samples)]))

    def size(self, start: int, stop: int) -> tuple[int, int, int]:
        """Nodes, edges and terms of the tree of samples start to stop."""
        found = self._sizes.get((start, stop))
        if found is None:
            found = self._sizes[start, stop] = self._measure(start, stop)
        return found

    def _measure(self, start: int, stop: int) -> tuple[int, int, int]:
        first, last = int(self.terms[start]), int(self.terms[stop])
        shared = int(self.tree.shared_R[start])
        if shared:
            edges = len(np.unique(self.tree.term_edge_M[first:last]))
        else:  # no edge of a whole tree is another's
            edges = int(self._edges[last] - self._edges[first])
        return shared + int(self.nodes[stop] - self.nodes[start]), edges, last - first

    def pairs(self, start: int, stop: int) -> int:
        """Query-key pairs of the tree of samples start to stop; tokens above the forest are keys, and no queries."""
        below = self.above + int(self.tree.shared_R[start])  # ancestors, repeated for this range
        repeated = below * (below + 1) // 2 - self.above * (self.above + 1) // 2
        return repeated + int(self._seen[stop] - self._seen[start])

    def part(self, start: int, stop: int) -> PrefixTree:
        """The tree of samples start to stop: what ``build_tree`` makes of them, but for the order of equal branches."""
        return self._cut(np.arange(start, stop), 0)

    def only(self, samples: NDArray[np.int64], above: int = 0) -> Forest:
        """The forest of some samples: at least one, ascending.

        ``above``: how many nodes are left out, on which all of these samples begin and none ends or is trained.
        """
        return Forest(tree=self._cut(samples, above), weights_R=self.weights_R[samples], above=self.above + above)

    def _cut(self, samples: NDArray[np.int64], above: int) -> PrefixTree:
        tree, start, stop = self.tree, int(samples[0]), int(samples[-1]) + 1
        ends = self.nodes[samples + 1] - 1  # the node at which each sample ends
        nodes = np.concatenate([self._ancestors(start), np.arange(self.nodes[start], self.nodes[stop])])
        terms = tree.term_edge_M[self.terms[start] : self.terms[stop]]
        shared = tree.shared_R[start:stop].copy()
        if len(samples) < stop - start:
            nodes = nodes[np.searchsorted(ends, tree.end_T[nodes]) > np.searchsorted(ends, nodes)]
            terms = terms[np.repeat(_mask(samples - start), np.diff(self.terms[start : stop + 1]))]
            shared = np.minimum.reduceat(shared, [0, *(samples[:-1] - start + 1)])
        nodes = nodes[above:]  # the first ones are a chain
        shared[0] = above
        edges, term_edge = np.unique(terms, return_inverse=True)
        end = np.searchsorted(nodes, tree.end_T[nodes]).astype(np.int32)
        return PrefixTree(
            samples=tuple([tree.samples[at] for at in samples.tolist()]),
            order_R=np.arange(len(samples)),
            tokens_T=tree.tokens_T[nodes],
            positions_T=tree.positions_T[nodes],
            end_T=end,
            parent_T=(np.searchsorted(nodes, tree.parent_T[nodes], side="right") - 1).astype(np.int32),
            samples_through_T=count_samples_through(np.searchsorted(nodes, ends), end),
            edge_src_E=np.searchsorted(nodes, tree.edge_src_E[edges]).astype(np.int32),
            edge_tgt_E=tree.edge_tgt_E[edges],
            edge_temperature_E=tree.edge_temperature_E[edges],
            term_edge_M=term_edge.astype(np.int32),
            shared_R=shared - np.int32(above),
        )

    def _ancestors(self, start: int) -> NDArray[np.int64]:
        """The nodes that the sample has in common with the one before it."""
        shared = self.tree.shared_R
        pieces = []
        while needed := int(shared[start]):
            start = self._lender[start]
            pieces.append(int(self.nodes[start]) + np.arange(needed - int(shared[start])))
        return np.concatenate([np.zeros(0, np.int64), *pieces[::-1]])

    @functools.cached_property
    def _lender(self) -> list[int]:
        """The last sample before each whose share has the deepest node that the two have in common."""
        shared = self.tree.shared_R.tolist()
        lenders: list[int] = []
        path: list[int] = []  # the samples whose shares make up the one before, each deeper than the last
        for at, common in enumerate(shared):
            while path and shared[path[-1]] >= common:
                path.pop()
            lenders.append(path[-1] if path else -1)
            path.append(at)
        return lenders

    @functools.cached_property
    def _sizes(self) -> dict[Range, tuple[int, int, int]]:
        """Those measured so far: rows are filled by them, and laid."""
        return {}

    @functools.cached_property
    def _seen(self) -> NDArray[np.int64]:
        """[R + 1] query-key pairs of the shares of the samples before each: a share is the lower end of a chain."""
        deep, shared = self.fed + self.above, self.tree.shared_R.astype(np.int64) + self.above
        return _sums((deep * (deep + 1) - shared * (shared + 1)) // 2)

    @functools.cached_property
    def _edges(self) -> NDArray[np.int64]:
        """[M + 1] how many different edges the terms before each have."""
        term_edge = self.tree.term_edge_M
        first = np.empty(len(self.tree.edge_src_E), np.int64)
        first[term_edge[::-1]] = np.arange(len(term_edge))[::-1]  # of several terms the last that is written counts
        return _sums(np.bincount(first, minlength=len(term_edge)))


def _sums(values: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Running sums: entry i is that of the first i values."""
    return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)


def _mask(true: NDArray[np.int64]) -> NDArray[np.bool_]:
    """False but at the indices, the last of which is the last entry."""
    mask = np.zeros(int(true[-1]) + 1, np.bool_)
    mask[true] = True
    return mask
