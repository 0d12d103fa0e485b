"""Which samples run behind trunks, and what that leaves to ordinary rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.learner.pack import pack
from forgejax.learner.packing import plan
from forgejax.learner.packing.batch import PackedStep
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.drift import count_drift
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.lay import choose_shape
from forgejax.learner.packing.plan import Bin, RowPlan
from forgejax.learner.packing.samples import Sample
from forgejax.learner.packing.tree import PrefixTree
from forgejax.learner.packing.trunks import TrunkUnit, plan_trunks
from tests.learner.samples import random_group, sample


def _forest(samples: Sequence[Sample]) -> Forest:
    return Forest.of(samples, np.ones(len(samples)))


def _with_trunks(groups: Sequence[Sequence[Sample]], rows: PackConfig) -> PackedStep:
    packed = pack(groups, rows)
    assert packed.trunks
    return packed


@pytest.mark.parametrize(
    ("prompt", "answers", "expected"),
    [
        (60, [40] * 8, [TrunkUnit(start=0, stop=8, length=59)]),  # 8 rows of 99 tokens, or 4/3 + 4 with a trunk
        (60, [10] * 4, []),  # a row holds the tree
        (60, [40] * 3, []),  # 3 rows, or 4/3 + 2
        (20, [60] * 6, []),  # 6 rows of 80 at most, or 4/3 + 4 and no room to spare
        (120, [40], [TrunkUnit(start=0, stop=1, length=100)]),  # too long for a row, so there is no choice
        (150, [40, 40], [TrunkUnit(start=0, stop=2, length=100)]),  # a trunk has room for no more
    ],
)
def test_a_prefix_becomes_a_trunk_where_that_saves_rows(
    prompt: int, answers: list[int], expected: list[TrunkUnit]
) -> None:
    group = [sample(range(prompt), [n] * count) for n, count in enumerate(answers)]

    assert plan_trunks(_forest(group), PackConfig(row_length=100, block_size=10)) == expected


def test_the_deepest_prefix_worth_it_wins_over_what_all_groups_share() -> None:
    system = list(range(20))
    groups = [[sample([*system, *[100 + g] * 60], [n] * 20) for n in range(8)] for g in range(3)]

    units = plan_trunks(
        _forest([one for members in groups for one in members]), PackConfig(row_length=100, block_size=10)
    )

    assert units == [TrunkUnit(start=8 * g, stop=8 * g + 8, length=79) for g in range(3)]


def test_lone_samples_beside_a_group_are_rows_that_a_trunk_for_all_saves() -> None:
    rng = np.random.default_rng(0)
    system, prompt = (rng.integers(0, 1000, n).tolist() for n in (50, 25))
    alone = [sample([*system, 1000 + n], rng.integers(0, 1000, 26).tolist(), name=f"a{n}") for n in range(20)]
    group = [sample([*system, *prompt], rng.integers(0, 1000, 20).tolist(), name=f"g{n}") for n in range(8)]
    config = PackConfig(row_length=100, rows=1, block_size=10)

    units = plan_trunks(_forest([*alone, *group]), config)
    packed = _with_trunks([alone, group], config)

    assert units == [TrunkUnit(start=0, stop=28, length=50)]
    assert not packed.batches
    assert [len(each.leaves) for each in packed.trunks] == [10]  # a trunk for the group alone leaves the others 20 rows


def _sharing(count: int, shared: int, own: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 1000, shared).tolist()
    return [sample([*begin, *range(1000 + n * own, 1000 + (n + 1) * own)], [1], name=f"r{n}") for n in range(count)]


def test_a_trunk_that_saves_less_than_a_tenth_of_the_rows_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PackConfig(row_length=64, rows=1, block_size=8)
    planned: list[bool] = []

    def counted(forest: Forest, config: PackConfig, *, needed: bool = False) -> list[TrunkUnit]:
        planned.append(needed)
        return plan_trunks(forest, config, needed=needed)

    monkeypatch.setattr(plan, "plan_trunks", counted)

    few, many = (pack([_sharing(480, shared, 4)], rows) for shared in (4, 16))

    assert (len(few.batches), len(few.trunks)) == (32, 0)  # 30 behind a trunk, which costs 4/3
    assert (len(many.batches), len(many.trunks)) == (0, 1)  # 30 and a trunk, where rows of their own are 40
    assert planned == [True, True, False]  # that nothing can save a tenth of 32 shows before


def test_a_sample_too_long_for_a_row_brings_no_other_behind_a_trunk() -> None:
    long = sample(range(2000, 2150), [1], name="long")
    others = _sharing(40, 10, 40)  # two a row, with or without a trunk of 10 tokens

    packed = pack([[long], others], PackConfig(row_length=100, rows=1, block_size=10))

    assert len(packed.batches) == 20
    assert [len(each.leaves) for each in packed.trunks] == [1]


def test_trees_are_made_for_the_plan_that_wins_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    part = Forest.part

    def counted(self: Forest, start: int, stop: int) -> PrefixTree:
        made.append((start, stop))
        return part(self, start, stop)

    monkeypatch.setattr(Forest, "part", counted)

    packed = pack([_sharing(480, 16, 4)], PackConfig(row_length=64, rows=1, block_size=8))

    assert packed.trunks
    made.sort()
    assert [start for start, _ in made] == [0, *(stop for _, stop in made[:-1])]  # each sample is in one of them
    assert made[-1][1] == 480


def test_samples_that_end_in_a_trunk_are_trained_in_it() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 150).tolist()
    turns = [sample(ids[:n], ids[n : n + 8]) for n in range(20, 140, 20)]  # feed 27, 47, 67, 87, 107 and 127

    (unit,) = plan_trunks(_forest(turns), PackConfig(row_length=100, block_size=10))

    assert unit == TrunkUnit(start=0, stop=6, length=99)  # the fifth is trained from node 99 on


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9), vocab=st.integers(1, 4), room=st.integers(4, 16))
def test_trunks_hold_every_sample_that_is_too_long_and_split_none(seed: int, vocab: int, room: int) -> None:
    config = PackConfig(row_length=room, rows=1, block_size=1)
    drawn = random_group(np.random.default_rng(seed), vocab=vocab, samples=12, longest=2 * room)
    samples = [one for one in drawn if config.fits(one.fed_tokens, len(one.token_ids))]
    if not samples:
        return
    forest = _forest(samples)

    units = plan_trunks(forest, config)

    assert all(before.stop <= after.start for before, after in itertools.pairwise(units))
    inside = {at: unit for unit in units for at in range(unit.start, unit.stop)}
    for at, one in enumerate(forest.tree.samples):
        if at not in inside:
            assert one.fed_tokens <= room
            continue
        unit = inside[at]
        path = forest.tree.samples[unit.stop - 1].fed_ids[: unit.length]
        assert 0 < unit.length <= room
        assert np.array_equal(one.fed_ids[: unit.length], path[: one.fed_tokens])
        if one.fed_tokens > unit.length:
            assert unit.length < len(one.context_ids)
            assert one.fed_tokens - unit.length <= room


def _ended(kind: str) -> list[Sample]:
    """Samples that end in a trunk of 128 tokens and are more than a row of it holds, and two that go on behind it."""
    ids = np.random.default_rng(0).integers(0, 8, 230).tolist()
    if kind == "terms":  # 40 x 100, where 16 x 128 fit
        ended = [sample(ids[:20], ids[20:120], name=f"r{n}") for n in range(40)]
    elif kind == "temperatures":  # 2 x 90 edges
        ended = [sample(ids[:30], ids[30:120], name=f"r{n}", temperature=(1.0, 0.7)[n % 2]) for n in range(4)]
    else:  # an edge each
        ended = [sample(ids[:128], [n], name=f"r{n}") for n in range(150)]
    return [*ended, *(sample(ids[:200], ids[200 : 220 + n], name=f"last{n}") for n in range(2))]


@pytest.mark.parametrize("kind", ["terms", "temperatures", "edges"])
def test_samples_that_end_in_a_trunk_beyond_what_its_row_holds_go_into_ordinary_rows(kind: str) -> None:
    group = _ended(kind)

    packed = _with_trunks([group], PackConfig(row_length=128, rows=1, block_size=8))

    assert packed.batches
    assert sorted(at.request_id for at in packed.placements) == sorted(one.request_id for one in group)
    assert packed.stats.trained_tokens == sum(len(one.token_ids) for one in group)
    assert packed.trunks[0].trunk.term_mask_BM.any()
    assert count_drift(packed, {one.request_id: (one.context_ids, one.token_ids) for one in group}) == 0


def test_a_row_beyond_the_largest_bucket_is_an_error_that_says_so() -> None:
    forest = _forest([sample([1, 2], [3], temperature=1.0 + n, name=f"r{n}") for n in range(9)])
    row = RowPlan(bins=(Bin(forest=forest, start=0, stop=9),))

    with pytest.raises(ValueError, match="a row has 9 edges; the largest bucket holds 8"):
        choose_shape([row], PackConfig(row_length=8, block_size=8))


@pytest.mark.parametrize("room", [2, 3])
def test_rows_of_two_or_three_tokens_have_an_edge_in_every_batch(room: int) -> None:
    packed = _with_trunks([[sample(range(room + 1), [n]) for n in range(2)]], PackConfig(row_length=room, block_size=1))

    assert min(part.batch.edge_src_BE.shape[1] for part in packed.parts) == 1
