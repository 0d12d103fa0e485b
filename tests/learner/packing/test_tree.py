from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner.packing.tree import PrefixTree, build_tree
from tests.learner.samples import random_group, sample


def _paths(tree: PrefixTree) -> list[tuple[int, ...]]:
    """The token path from the root to every node, along the parents."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens_T, tree.parent_T, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
    return paths


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9), vocab=st.integers(1, 4), count=st.integers(1, 10))
def test_a_tree_has_every_prefix_once_and_every_term_reads_its_own_context(seed: int, vocab: int, count: int) -> None:
    samples = random_group(np.random.default_rng(seed), vocab=vocab, samples=count, temperatures=(1.0, 0.5))
    tree = build_tree(samples)

    paths = _paths(tree)
    fed = [tuple(int(i) for i in one.fed_ids) for one in samples]
    assert sorted(paths) == sorted({ids[:n] for ids in fed for n in range(1, len(ids) + 1)})
    assert sorted(map(id, tree.samples)) == sorted(map(id, samples))

    triples = list(zip(tree.edge_src_E, tree.edge_tgt_E, tree.edge_temperature_E, strict=True))
    assert len(set(triples)) == len(triples)
    term = 0
    for one in tree.samples:
        ids = (*one.context_ids.tolist(), *one.token_ids.tolist())
        for t, target in enumerate(one.token_ids):
            edge = tree.term_edge_M[term]
            assert paths[tree.edge_src_E[edge]] == ids[: len(one.context_ids) + t]
            assert tree.edge_tgt_E[edge] == target
            assert tree.edge_temperature_E[edge] == np.float32(one.temperature)
            term += 1
    assert term == len(tree.term_edge_M)
    assert set(tree.term_edge_M) == set(range(len(triples)))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 10))
def test_one_integer_a_node_says_who_sees_it(seed: int, count: int) -> None:
    tree = build_tree(random_group(np.random.default_rng(seed), vocab=3, samples=count))

    paths = _paths(tree)
    index = np.arange(len(paths))
    sees = (index[None] <= index[:, None]) & (index[:, None] < tree.end_T[None])
    for i, path in enumerate(paths):
        ancestors = [j for j, other in enumerate(paths) if path[: len(other)] == other]
        assert np.flatnonzero(sees[i]).tolist() == ancestors
        assert tree.positions_T[i] == len(path) - 1
    assert tree.attention_pairs == sees.sum()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9), vocab=st.integers(1, 3), count=st.integers(1, 10))
def test_each_node_counts_the_samples_that_pass_through_it(seed: int, vocab: int, count: int) -> None:
    samples = random_group(np.random.default_rng(seed), vocab=vocab, samples=count)
    samples = [*samples, *samples[: count // 2]]
    tree = build_tree(samples)

    fed = [tuple(one.fed_ids.tolist()) for one in samples]
    assert tree.samples_through_T.tolist() == [sum(ids[: len(path)] == path for ids in fed) for path in _paths(tree)]
    assert tree.samples_through_T.sum() == sum(one.fed_tokens for one in samples)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 10))
def test_the_heaviest_child_comes_first_and_neighbours_know_what_they_share(seed: int, count: int) -> None:
    tree = build_tree(random_group(np.random.default_rng(seed), vocab=3, samples=count))

    sizes = tree.end_T - np.arange(len(tree.end_T))
    for parent in range(-1, len(tree.end_T)):
        children = np.flatnonzero(tree.parent_T == parent)
        assert (np.diff(sizes[children]) <= 0).all()
    for left, right, shared in zip(tree.samples, tree.samples[1:], tree.shared_R[1:], strict=False):
        pairs = zip(left.fed_ids, right.fed_ids, strict=False)
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(left.fed_tokens, right.fed_tokens))
        assert shared == common
    assert tree.shared_R[0] == 0


def test_identical_samples_share_edges_and_keep_their_own_terms() -> None:
    tree = build_tree([sample([1, 2], [3, 4], advantage=1.0), sample([1, 2], [3, 4], advantage=-1.0)])

    assert tree.tokens_T.tolist() == [1, 2, 3]
    assert len(tree.edge_src_E) == 2
    assert tree.term_edge_M.tolist() == [0, 1, 0, 1]


def test_merging_time_follows_the_tokens() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, 4000)
    samples = [sample(np.r_[prompt, n, rng.integers(0, 1000, 999)].tolist(), [1, 2, 3]) for n in range(64)]

    start = time.process_time()
    tree = build_tree(samples)
    spent = time.process_time() - start

    assert len(tree.tokens_T) == 4000 + 64 * 1002
    assert spent < 1.0  # 320,000 tokens; a Python loop over them takes longer
