from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.tree import PrefixTree, build_tree
from tests.learner.samples import random_group, sample


def _facts(tree: PrefixTree) -> dict[str, list]:
    """What a tree says, whatever the order of its branches: of every node, edge and term by its path of tokens."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens_T, tree.parent_T, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
    below = [sorted(paths[i] for i in range(at, end)) for at, end in enumerate(tree.end_T)]
    edges = [
        (paths[source], int(target), float(temperature))
        for source, target, temperature in zip(tree.edge_src_E, tree.edge_tgt_E, tree.edge_temperature_E, strict=True)
    ]
    term_owner = np.repeat(np.arange(len(tree.samples)), [len(one.token_ids) for one in tree.samples])
    return {
        "nodes": sorted(zip(paths, tree.positions_T.tolist(), tree.samples_through_T.tolist(), below, strict=True)),
        "edges": sorted(edges),
        "terms": sorted(
            (tree.samples[owner].request_id, *edges[edge])
            for owner, edge in zip(term_owner, tree.term_edge_M, strict=True)
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
    assert forest.size(start, stop) == (len(built.tokens_T), len(built.edge_src_E), len(built.term_edge_M))
    lengths = [one.fed_tokens for one in part.samples]
    assert len(part.tokens_T) == sum(lengths) - part.shared_R.sum()
    assert [one.request_id for one in part.samples] == [
        group[int(at)].request_id for at in forest.weights_R[start:stop]
    ]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 12), data=st.data())
def test_some_samples_of_a_forest_are_the_forest_of_them(seed: int, count: int, data: st.DataObject) -> None:
    group = random_group(np.random.default_rng(seed), vocab=3, samples=count, temperatures=(1.0, 0.5))
    forest = Forest.of(group, np.arange(count, dtype=np.float64))
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))

    some = forest.only(np.array(kept))
    built = build_tree([forest.tree.samples[at] for at in kept])

    assert _facts(some.tree) == _facts(built)
    assert [one.request_id for one in some.tree.samples] == [group[int(at)].request_id for at in some.weights_R]
    start = data.draw(st.integers(0, len(kept) - 1))
    stop = data.draw(st.integers(start + 1, len(kept)))
    assert _facts(some.part(start, stop)) == _facts(build_tree(some.tree.samples[start:stop]))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 8), above=st.integers(1, 5), data=st.data())
def test_a_forest_behind_some_nodes_is_the_one_of_samples_without_them(
    seed: int, count: int, above: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    trunk = rng.integers(0, 3, above).astype(np.int32)
    behind = random_group(rng, vocab=3, samples=count)
    whole = [dataclasses.replace(one, context_ids=np.concatenate([trunk, one.context_ids])) for one in behind]
    other = sample([9, 9], [9])  # before or after the others, which are no tree of their own then
    forest = Forest.of([*whole, other], np.arange(count + 1, dtype=np.float64))

    cut = forest.only(np.array([at for at in range(count + 1) if forest.tree.samples[at] is not other]), above)

    short = [behind[int(at)] for at in cut.weights_R]
    assert [one.request_id for one in cut.tree.samples] == [one.request_id for one in short]
    assert cut.fed.tolist() == [one.fed_tokens for one in short]
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    for tree, samples in ((cut.tree, short), (cut.part(start, stop), short[start:stop])):
        lower = dataclasses.replace(tree, positions_T=tree.positions_T - np.int32(above))
        assert _facts(lower) == _facts(build_tree(samples))
        assert cut.size(0, count) == (len(cut.tree.tokens_T), len(cut.tree.edge_src_E), len(cut.tree.term_edge_M))
