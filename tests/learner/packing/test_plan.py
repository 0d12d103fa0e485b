"""A plan says as ranges what lies where; what is laid is what was planned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.lay import lay_plan
from forgejax.learner.packing.plan import Bin, RowPlan, StepPlan, TrunkPlan, plan_step
from forgejax.learner.packing.samples import Sample
from tests.learner.samples import random_group, sample


def _forest(samples: Sequence[Sample]) -> Forest:
    return Forest.of(samples, np.ones(len(samples)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shards", [1, 2])
def test_each_sample_lies_in_exactly_one_bin_and_no_row_is_overfull(seed: int, shards: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [one for _ in range(6) for one in random_group(rng, vocab=3, samples=6, longest=40)]
    config = PackConfig(row_length=32, rows=2, block_size=8)
    samples = [one for one in samples if config.fits(one.fed_tokens, len(one.token_ids))]

    plan = plan_step(_forest(samples), config, row_shards=shards)

    planned = [one.request_id for bin in plan.bins() for one in bin.forest.tree.samples[bin.start : bin.stop]]
    assert sorted(planned) == sorted(one.request_id for one in samples)
    batches = [*plan.batches, *(batch for each in plan.trunks for batch in (each.trunk, *each.leaves))]
    assert {len(batch) for batch in batches} == {shards}
    assert all(len(rows) == len(batch[0]) for batch in batches for rows in batch)
    rows = [row for batch in batches for shard in batch for row in shard]
    assert max(row.tokens for row in rows) <= 32
    assert max(row.edges for row in rows) <= 32


def test_a_bin_weighs_what_its_tree_does() -> None:
    rng = np.random.default_rng(0)
    forest = _forest([one for _ in range(3) for one in random_group(rng, vocab=3, samples=6, longest=20)])
    count = len(forest.tree.samples)

    for start, stop in itertools.combinations(range(count + 1), 2):
        tree, bin = forest.part(start, stop), Bin(forest=forest, start=start, stop=stop)
        assert bin.size == (len(tree.tokens_T), len(tree.edge_src_E), len(tree.term_edge_M))
        assert bin.pairs == tree.attention_pairs


def test_a_plan_made_by_hand_is_laid_as_it_says() -> None:
    """Two answers behind a trunk of three tokens, in a row each, and one sample that ends in the trunk."""
    config = PackConfig(row_length=8, rows=1, block_size=8)
    forest = _forest([sample([1, 2], [9], name="ended"), *(sample([1, 2, 3, 4], [5, n], name=f"a{n}") for n in (6, 7))])
    behind = forest.only(np.array([1, 2]), 3)
    trunk = RowPlan(bins=(Bin(forest=forest, start=0, stop=1),), path=np.array([1, 2, 3], np.int32), continued=2)
    leaves = tuple(((RowPlan(bins=(Bin(forest=behind, start=at, stop=at + 1),)),),) for at in range(2))

    step = lay_plan(StepPlan(batches=(), trunks=(TrunkPlan(trunk=((trunk,),), leaves=leaves),)), config)

    (laid,) = step.trunks
    assert laid.trunk.tokens_BT[0, :3].tolist() == [1, 2, 3]
    assert laid.trunk.samples_through_BT[0, :4].tolist() == [3, 3, 2, 0]
    assert [leaf.tokens_BT[0, :2].tolist() for leaf in laid.leaves] == [[4, 5], [4, 5]]
    assert [leaf.positions_BT[0, :2].tolist() for leaf in laid.leaves] == [[3, 4], [3, 4]]
    assert [leaf.edge_tgt_BE[0, :2].tolist() for leaf in laid.leaves] == [[5, 6], [5, 7]]
    assert [(at.request_id, at.batch, at.row, at.start, at.stop) for at in step.placements] == [
        ("ended", 0, 0, 0, 1),
        ("a6", 1, 0, 0, 2),
        ("a7", 2, 0, 0, 2),
    ]
    assert (step.stats.samples, step.stats.trained_tokens) == (3, 5)
    assert (step.stats.tree_tokens, step.stats.unmerged_tokens) == (3 + 2 + 2, 2 + 5 + 5)
    assert (step.stats.tree_pairs, step.stats.awaited_pairs) == (6 + 2 * (4 + 5), 6 + 2 * (4 + 5))
