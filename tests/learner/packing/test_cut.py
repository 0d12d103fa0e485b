"""Cuts against all cuts there are."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner.packing.cut import cut_samples
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.tree import build_tree
from tests.learner.samples import random_group, sample


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 7), room=st.integers(12, 24))
def test_a_cut_takes_the_fewest_tokens_of_all_cuts(seed: int, count: int, room: int) -> None:
    forest = Forest.of(random_group(np.random.default_rng(seed), samples=count, longest=8), np.ones(count))
    tree_samples = forest.tree.samples
    if max(one.fed_tokens for one in tree_samples) > room:
        return

    @functools.cache
    def nodes(start: int, stop: int) -> int:
        return len(build_tree(tree_samples[start:stop]).tokens_T)

    @functools.cache
    def feasible(start: int, stop: int) -> bool:
        terms = sum(len(one.token_ids) for one in tree_samples[start:stop])
        distinct = len({(*one.context_ids, *one.token_ids) for one in tree_samples[start:stop]})
        size = nodes(start, stop)
        return size <= room and min(terms, size - 1 + distinct) <= room

    costs = []  # tokens, ranges
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, count), n) for n in range(count)):
        ranges = list(itertools.pairwise([0, *cuts, count]))
        if all(feasible(*one) for one in ranges):
            costs.append((sum(nodes(*one) for one in ranges), len(ranges)))

    laws: list[tuple[Literal["tokens", "ranges"], tuple[int, int]]] = [
        ("tokens", min(costs)),
        ("ranges", min(costs, key=lambda cost: cost[::-1])),
    ]
    for fewest, best in laws:
        found = cut_samples(forest, (0, count), room, 10**6, fewest=fewest)

        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == count
        assert all(feasible(*one) for one in found)
        assert (sum(nodes(*one) for one in found), len(found)) == best


def test_cutting_time_follows_the_samples() -> None:
    rng = np.random.default_rng(0)
    samples = [sample([1, 2, 3, n], [4, 5], name=str(n)) for n in rng.permutation(3000).tolist()]
    forest = Forest.of(samples, np.ones(3000))

    start = time.process_time()
    ranges = cut_samples(forest, (0, 3000), 3 + 2 * 2500, 10**6)
    spent = time.process_time() - start

    assert len(ranges) == 2
    assert spent < 1.0  # a row holds 2,500 of the samples: trying every pair of ends takes far longer
