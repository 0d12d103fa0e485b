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
    node = np.cumsum([0, *(len(tree.tokens_T) for tree in trees)])
    edge = np.cumsum([0, *(len(tree.edge_src_E) for tree in trees)])
    roots = np.repeat(node[:-1], np.diff(node))

    def joined(name: str, offset: np.ndarray | None = None) -> np.ndarray:
        arrays = [getattr(tree, name) for tree in trees]
        moved = arrays if offset is None else [array + at for array, at in zip(arrays, offset, strict=False)]
        return np.concatenate(moved).astype(arrays[0].dtype)

    tree = PrefixTree(
        samples=tuple(samples),
        order_R=np.arange(len(samples)),
        tokens_T=joined("tokens_T"),
        positions_T=joined("positions_T"),
        end_T=joined("end_T", node),
        parent_T=np.where(joined("parent_T") < 0, -1, joined("parent_T") + roots).astype(np.int32),
        samples_through_T=joined("samples_through_T"),
        edge_src_E=joined("edge_src_E", node),
        edge_tgt_E=joined("edge_tgt_E"),
        edge_temperature_E=joined("edge_temperature_E"),
        term_edge_M=joined("term_edge_M", edge),
        shared_R=joined("shared_R"),
    )
    return Forest(tree=tree, weights_R=np.full(len(samples), 1 / len(tree.term_edge_M)))
