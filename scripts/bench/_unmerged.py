"""Samples as chains of their own: what a trainer without prefix trees computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.learner import Sample
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.tree import PrefixTree, build_tree


def unmerged_forest(samples: Sequence[Sample]) -> Forest:
    """A forest of as many trees, whatever they have in common; each trained token weighs the same."""
    trees = [build_tree([sample]) for sample in samples]
    node = np.cumsum([0, *(len(tree.tokens) for tree in trees)])
    edge = np.cumsum([0, *(len(tree.edge_src) for tree in trees)])
    roots = np.repeat(node[:-1], np.diff(node))

    def joined(name: str, offset: np.ndarray | None = None) -> np.ndarray:
        arrays = [getattr(tree, name) for tree in trees]
        moved = arrays if offset is None else [array + at for array, at in zip(arrays, offset, strict=False)]
        return np.concatenate(moved).astype(arrays[0].dtype)

    tree = PrefixTree(
        samples=tuple(samples),
        order=np.arange(len(samples)),
        tokens=joined("tokens"),
        positions=joined("positions"),
        end=joined("end", node),
        parent=np.where(joined("parent") < 0, -1, joined("parent") + roots).astype(np.int32),
        samples_through=joined("samples_through"),
        edge_src=joined("edge_src", node),
        edge_tgt=joined("edge_tgt"),
        edge_temperature=joined("edge_temperature"),
        term_edge=joined("term_edge", edge),
        shared=joined("shared"),
    )
    return Forest(tree=tree, weights=np.full(len(samples), 1 / len(tree.term_edge)))
