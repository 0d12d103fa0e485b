from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner.forest import Forest
from forgejax.learner.tree import PrefixTree, build_tree

from .samples import random_group


def _facts(tree: PrefixTree) -> dict[str, list]:
    """What a tree says, whatever the order of its branches: of every node, edge and term by its path of tokens."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parent, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
    below = [sorted(paths[i] for i in range(at, end)) for at, end in enumerate(tree.end)]
    edges = [
        (paths[source], int(target), float(temperature))
        for source, target, temperature in zip(tree.edge_src, tree.edge_tgt, tree.edge_temperature, strict=True)
    ]
    term_owner = np.repeat(np.arange(len(tree.samples)), [len(one.token_ids) for one in tree.samples])
    return {
        "nodes": sorted(zip(paths, tree.positions.tolist(), tree.samples_through.tolist(), below, strict=True)),
        "edges": sorted(edges),
        "terms": sorted(
            (tree.samples[owner].request_id, *edges[edge])
            for owner, edge in zip(term_owner, tree.term_edge, strict=True)
        ),
    }


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 12), data=st.data())
def test_a_part_of_a_forest_is_the_tree_of_its_samples(seed: int, count: int, data: st.DataObject) -> None:
    group = random_group(np.random.default_rng(seed), vocab=3, samples=count, temperatures=(1.0, 0.5))
    forest = Forest.of(group, np.arange(count, dtype=np.float64))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))

    part = forest.part(start, stop)
    built = build_tree(forest.tree.samples[start:stop])

    assert part.samples == forest.tree.samples[start:stop]
    assert _facts(part) == _facts(built)
    assert forest.size(start, stop) == (len(built.tokens), len(built.edge_src), len(built.term_edge))
    lengths = [one.fed_tokens for one in part.samples]
    assert len(part.tokens) == sum(lengths) - part.shared.sum()
    assert [one.request_id for one in part.samples] == [group[int(at)].request_id for at in forest.weights[start:stop]]
