from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner.pack import pack
from forgejax.learner.packing.batch import Part
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.drift import read_trained_ids
from forgejax.learner.packing.lay import lay_empty
from tests.learner.samples import random_group, sample


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), groups=st.integers(1, 5), shards=st.sampled_from([1, 2]))
def test_every_term_lies_in_exactly_one_place_with_its_own_numbers(seed: int, groups: int, shards: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = [random_group(rng, samples=int(rng.integers(1, 9))) for _ in range(groups)]
    batch_of = [[one for one in members if one.fed_tokens <= 16] for members in drawn]  # the first always fits
    for number, members in enumerate(batch_of):
        for index, one in enumerate(members):
            object.__setattr__(one, "request_id", f"{number}-{index}")
    by_id = {one.request_id: one for members in batch_of for one in members}

    packed = pack(batch_of, PackConfig(row_length=16, rows=1, block_size=8, trunks=False), row_shards=shards)

    assert sorted(place.request_id for place in packed.placements) == sorted(by_id)
    for place in packed.placements:
        one, batch = by_id[place.request_id], packed.batches[place.batch]
        context, sampled = read_trained_ids(Part(batch=batch), place)
        assert context.tolist() == one.context_ids.tolist()
        assert sampled.tolist() == one.token_ids.tolist()
        terms = (place.row, slice(place.start, place.stop))
        assert batch.old_logp_BM[terms].tolist() == one.old_logp.tolist()
        assert set(batch.advantage_BM[terms].tolist()) == {float(np.float32(one.advantage))}
        assert batch.term_mask_BM[terms].all()
    assert sum(int(batch.term_mask_BM.sum()) for batch in packed.batches) == packed.stats.trained_tokens
    assert sum(float(batch.weight_BM.sum()) for batch in packed.batches) == pytest.approx(1.0, abs=1e-6)
    assert all(batch.tokens_BT.shape == (shards, 16) for batch in packed.batches)


def test_trees_are_cut_to_fill_rows_only_where_that_saves_rows() -> None:
    groups = [[sample([n, 1, 2, m], [3], name=f"{n}-{m}") for m in range(4)] for n in range(3)]  # 7 nodes
    roomy = PackConfig(row_length=8, rows=1, block_size=8)
    tight = PackConfig(row_length=12, rows=1, block_size=4, trunks=False)

    whole, cut_up = pack(groups, roomy), pack(groups, tight)

    assert (len(whole.batches), whole.stats.tree_tokens) == (3, 21)
    assert (len(cut_up.batches), cut_up.stats.tree_tokens) == (2, 24)  # one group in two rows: its 3 shared nodes twice
    assert cut_up.stats.row_fill == 1.0
    weights = [sum(float(batch.weight_BM.sum()) for batch in step.batches) for step in (whole, cut_up)]
    np.testing.assert_allclose(weights, 1.0, rtol=1e-6)


def test_the_last_micro_batch_of_few_rows_is_a_half_or_a_quarter_as_tall() -> None:
    config = PackConfig(row_length=8, rows=4, block_size=8)

    heights = [
        [len(batch.tokens_BT) for batch in pack([[sample([n] * 8, [1])] for n in range(count)], config).batches]
        for count in (1, 2, 3, 4, 5, 8, 10)
    ]

    assert heights == [[1], [2], [4], [4], [4, 1], [4, 4], [4, 4, 2]]


def test_imbalance_compares_the_busiest_shard_with_an_even_spread() -> None:
    groups = [[sample([n] * length, [1])] for n, length in enumerate((16, 8))]

    packed = pack(groups, PackConfig(row_length=16, rows=1, block_size=8), row_shards=2)

    assert packed.stats.tree_pairs == 136 + 36
    assert packed.stats.pair_imbalance == pytest.approx(2 * 136 / 172)


def test_the_normaliser_counts_unmerged_tokens_of_the_samples_own_group() -> None:
    first = [sample([1], [2, 3]), sample([1], [2, 3])]  # merged: 2 edges, unmerged: 4 tokens
    second = [sample([1], [2])]

    by_group = pack([first, second], PackConfig(row_length=16, block_size=8)).batches[0]
    by_batch = pack([first, second], PackConfig(row_length=16, block_size=8, loss_norm="batch")).batches[0]

    assert sorted(by_group.weight_BM[by_group.term_mask_BM].tolist()) == [0.125] * 4 + [0.5]
    np.testing.assert_allclose(by_batch.weight_BM[by_batch.term_mask_BM], 0.2)


def test_by_sample_each_counts_alike_whatever_its_length() -> None:
    first = [sample([1], [2, 3, 4, 5]), sample([1], [6])]
    second = [sample([1], [7, 8])]

    batch = pack([first, second], PackConfig(row_length=16, block_size=8, loss_norm="sample")).batches[0]

    weights = batch.weight_BM[batch.term_mask_BM].tolist()
    assert sorted(weights) == [0.0625] * 4 + [0.25] * 3  # 1/4 of the step to each of two samples, 1/2 to the third


def test_duplicates_beyond_the_term_limit_open_another_row() -> None:
    copies = [sample([1], [2, 3, 4, 5, 6, 7, 8], name=str(n)) for n in range(40)]  # 7 edges, 280 terms
    config = PackConfig(row_length=8, rows=1, block_size=8, trunks=False)

    packed = pack([copies], config)

    assert config.term_limit == 128
    assert len(packed.batches) == 3  # 128 terms are 18 copies
    assert packed.stats.trained_tokens == 280
    assert packed.stats.tree_tokens == 21


def test_copies_of_a_sample_as_long_as_a_row_share_rows_up_to_the_term_limit() -> None:
    copies = [sample(range(6), [6, 7, 8], name=str(n)) for n in range(300)]  # 8 nodes, 3 edges, 900 terms

    packed = pack([copies], PackConfig(row_length=8, rows=1, block_size=8, trunks=False))

    assert len(packed.batches) == 8  # of 128 terms, which are 42 copies


def test_padding_counts_no_sample_and_every_fed_token_counts_once_for_its_sample() -> None:
    shared, alone = [sample([1, 2, 3], [n, 5, 6]) for n in (4, 4, 7)], [sample([9, 9], [8])]

    packed = pack([shared, alone], PackConfig(row_length=16, rows=1, block_size=8))

    (batch,) = packed.batches
    assert batch.samples_through_BT[0].tolist() == [3, 3, 3, 1, 1, 2, 2, 1, 1, *[0] * 7]
    assert batch.samples_through_BT.sum() == packed.stats.unmerged_tokens


def test_a_sample_longer_than_a_row_is_refused_by_name() -> None:
    config = PackConfig(row_length=16, block_size=8, trunks=False)

    with pytest.raises(ValueError, match=r"sample long feeds 20 tokens and trains 1; a row holds 16"):
        pack([[sample(list(range(20)), [1], name="long")]], config)


@pytest.mark.parametrize(
    ("fed", "trained", "fits"), [(16, 16, True), (17, 16, True), (32, 16, True), (33, 1, False), (20, 17, False)]
)
def test_a_sample_of_two_rows_fits_behind_a_trunk_if_a_row_holds_what_is_trained(
    fed: int, trained: int, fits: bool
) -> None:
    assert PackConfig(row_length=16, block_size=8).fits(fed, trained) == fits
    assert PackConfig(row_length=16, block_size=8, trunks=False).fits(fed, trained) == (fed <= 16)


def test_a_prefix_that_groups_share_lies_in_a_row_once() -> None:
    groups = [[sample([1, 2, 3, 4, n], [m], name=f"{n}-{m}") for m in range(2)] for n in range(3)]

    packed = pack(groups, PackConfig(row_length=16, rows=1, block_size=8))

    assert packed.stats.tree_tokens == 4 + 3
    assert packed.stats.tree_token_ratio == pytest.approx(6 * 5 / 7)
    (batch,) = packed.batches
    weight_of = {one.request_id: batch.weight_BM[one.row, one.start] for one in packed.placements}
    assert set(weight_of.values()) == {np.float32(1 / 6)}


def test_shards_of_a_micro_batch_get_like_work() -> None:
    groups = [[sample(list(range(100 * n, 101 * n)), [1])] for n in (60, 59, 40, 39, 20, 19, 10, 9)]

    packed = pack(groups, PackConfig(row_length=64, rows=1, block_size=8, token_cost=0.0, pair_cost=1.0), row_shards=2)

    pairs = [batch.attention.n_pairs.tolist() for batch in packed.batches]
    assert all(abs(left - right) <= 12 for left, right in pairs)
    assert sum(map(sum, pairs)) > 60


def test_ratios_compare_trees_with_unmerged_chains() -> None:
    prompt = list(range(50))
    packed = pack([[sample([*prompt, n], [1, 2]) for n in range(4)]], PackConfig(row_length=64, block_size=8))

    assert packed.stats.unmerged_tokens == 4 * 52
    assert packed.stats.tree_tokens == 50 + 4 * 2
    assert packed.stats.tree_token_ratio == pytest.approx(208 / 58)
    assert packed.stats.attention_pair_ratio == pytest.approx(4 * 52 * 53 / 2 / (50 * 51 / 2 + 4 * (51 + 52)))


def test_an_empty_batch_has_the_shapes_of_one_that_trains_half_of_its_tokens() -> None:
    config = PackConfig(row_length=16, rows=2, block_size=8)
    (batch,) = lay_empty(config, row_shards=2).batches
    real = pack([[sample([n] * 8, [3, 4, 5, 6, 7, 8])] for n in range(4)], config, row_shards=2).batches[0]

    assert [x.shape for x in vars(batch).values() if isinstance(x, np.ndarray)] == [
        x.shape for x in vars(real).values() if isinstance(x, np.ndarray)
    ]
    assert batch.attention.n_pairs.sum() == 0
