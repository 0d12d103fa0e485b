"""Two phases against the oracle: a trunk that runs once gives the gradient of samples that know of none."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from forgejax import sharding
from forgejax.errors import ConfigError
from forgejax.learner import assembling, phases
from forgejax.learner.batch import PackedStep
from forgejax.learner.drift import drift_tokens, trained_ids
from forgejax.learner.filling import Bin
from forgejax.learner.forest import Forest
from forgejax.learner.learner import Learner
from forgejax.learner.pack_config import EDGE_BUCKETS, PackConfig
from forgejax.learner.packing import pack
from forgejax.learner.samples import Sample
from forgejax.learner.step import StepConfig
from forgejax.learner.tree import PrefixTree
from forgejax.learner.trunk_plan import TrunkUnit, plan_trunks
from forgejax.learner.trunk_step import make_trunk_step
from forgejax.models import MoEConfig, PolicyConfig, abstract_policy, init_params

from .oracle import relative, unmerged
from .samples import random_group, sample

_ROOM = 32
_ROWS = PackConfig(row_length=16, rows=1, block_size=8)


@pytest.fixture(autouse=True)
def _one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch in the largest bucket, so that each function compiles once."""
    monkeypatch.setattr(assembling, "EDGE_BUCKETS", (1.0,))
    monkeypatch.setattr(assembling, "TERM_BUCKETS", (16,))


def _policy(dtype: str = "float32") -> PolicyConfig:
    return PolicyConfig(
        vocab_size=8,
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        d_ff=24,
        param_dtype=dtype,  # type: ignore[arg-type]
        compute_dtype=dtype,  # type: ignore[arg-type]
    )


def _drawn(rng: np.random.Generator, context: Sequence[int], count: int) -> Sample:
    return sample(
        context,
        rng.integers(0, 8, count).tolist(),
        name=f"r{rng.integers(2**60)}",
        advantage=float(rng.normal()),
        old_logp=rng.normal(-1.5, 1.5, count).tolist(),
        temperature=float(rng.choice([1.0, 0.7])),
    )


def _turns(rng: np.random.Generator, ids: Sequence[int], turns: Sequence[tuple[int, int]]) -> list[Sample]:
    """One sample for each turn (tokens of context, tokens sampled) of an episode that only ever grows."""
    return [
        sample(
            ids[:context],
            ids[context : context + count],
            name=f"r{rng.integers(2**60)}",
            advantage=float(rng.normal()),
            old_logp=rng.normal(-1.5, 1.5, count).tolist(),
        )
        for context, count in turns
    ]


def _long_groups(seed: int) -> list[list[Sample]]:
    """Eight answers to one prompt, two of them the same; an episode of growing turns, beyond a row; a small tree."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 8, int(rng.integers(9, 15))).tolist()
    answers = [_drawn(rng, prompt, int(rng.integers(1, 9))) for _ in range(7)]
    twin = dataclasses.replace(answers[0], advantage=-0.5, request_id="twin")
    ids = rng.integers(0, 8, 30).tolist()
    start = int(rng.integers(2, 5))
    episode = _turns(rng, ids, [(start, 3), (start + 6, 2), (start + 11, 3), (start + 17, 2), (start + 20, 4)])
    return [[*answers, twin], [*episode, _drawn(rng, ids[:12], 4)], random_group(rng, vocab=3, samples=5, longest=10)]


def _pack(groups: Sequence[Sequence[Sample]], *, rows: PackConfig = _ROWS, shards: int = 1) -> PackedStep:
    packed = pack(groups, rows, row_shards=shards)
    assert packed.trunks
    return packed


def _gradient(learner: Learner, packed: PackedStep) -> tuple[float, Any]:
    total = learner.gradient(packed.batches, 0, trunks=packed.trunks)
    return float(total.tally.loss), jax.device_get(total.grads)


_SHARED: list[Learner] = []


def _learner() -> Learner:
    """One learner for all tests, so that it compiles once; whoever changes its state puts it back."""
    if not _SHARED:
        _SHARED.append(Learner(abstract_policy(_policy())[0], init_params(_policy()), StepConfig()))
    return _SHARED[0]


def _check_against_oracle(learner: Learner, bound: float, examples: int) -> None:
    params = learner.state.params
    oracle = unmerged(abstract_policy(_policy(str(jax.tree.leaves(params)[0].dtype)))[0], _ROOM)

    @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(seed=st.integers(0, 10**9))
    def equal(seed: int) -> None:
        groups = _long_groups(seed)
        ours, grads = _gradient(learner, _pack(groups))
        loss, exact = oracle(params, groups)

        assert abs(ours - float(loss)) <= bound * max(1.0, abs(float(loss)))
        assert relative(grads, jax.device_get(exact)) <= bound

    equal()


def test_the_gradient_in_two_phases_is_the_unmerged_one_to_1e12_in_fp64() -> None:
    with jax.enable_x64(True):
        graphdef, _ = abstract_policy(_policy("float64"))
        learner = Learner(graphdef, init_params(_policy("float64")), StepConfig(vocab_chunk=8))
        _check_against_oracle(learner, 1e-12, 12)


def test_the_gradient_in_two_phases_is_the_unmerged_one_to_1e5_in_fp32() -> None:
    _check_against_oracle(_learner(), 1e-5, 8)


def test_leaves_may_come_in_any_order() -> None:
    packed = _pack(_long_groups(3))
    turned = tuple(dataclasses.replace(each, leaves=each.leaves[::-1]) for each in packed.trunks[::-1])
    assert max(len(each.leaves) for each in turned) > 1

    loss, grads = _gradient(_learner(), packed)
    other_loss, other_grads = _gradient(_learner(), dataclasses.replace(packed, trunks=turned))

    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert relative(other_grads, grads) <= 1e-6


@pytest.mark.parametrize("split", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}])
def test_a_mesh_of_rows_weights_and_heads_gives_the_same_gradient(split: dict[str, int]) -> None:
    mesh = sharding.build_mesh(sharding.resolve(sharding.MeshConfig(name="cpu-4", **split)), jax.devices())
    learner = Learner(abstract_policy(_policy())[0], init_params(_policy(), mesh), StepConfig(), mesh=mesh)
    groups = _long_groups(5)

    loss, grads = _gradient(_learner(), _pack(groups))
    split_loss, split_grads = _gradient(learner, _pack(groups, shards=learner.row_shards))

    assert learner.row_shards == split.get("data", 1) * split.get("fsdp", 1)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert relative(split_grads, grads) <= 1e-5


def test_an_update_reports_what_one_of_longer_rows_reports() -> None:
    learner, groups = _learner(), _long_groups(7)
    before = jax.device_get(learner.state)
    found = []
    for packed in (_pack(groups), pack(groups, dataclasses.replace(_ROWS, row_length=32))):
        learner.state = jax.device_put(before)
        found.append({k: float(v) for k, v in learner.update(packed.batches, 0, trunks=packed.trunks).items()})
    learner.state = jax.device_put(before)

    split, whole = found
    for name in ("loss", "grad_norm", "entropy", "gap_max", "gap_sum", "trained_terms", "clip_fraction", "ratio_mean"):
        assert split[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6)
    assert split["probability_correlation"] == pytest.approx(whole["probability_correlation"], abs=1e-5)


def test_a_router_counts_each_token_of_each_sample_once() -> None:
    moe = dataclasses.replace(_policy(), moe=MoEConfig(num_experts=4, experts_per_token=2, d_ff=8))
    learner = Learner(abstract_policy(moe)[0], init_params(moe), StepConfig())
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 8, 12).tolist()
    group = [_drawn(rng, prompt, 5) for _ in range(8)]
    split, cut = _pack([group]), pack([group], dataclasses.replace(_ROWS, trunks=False))
    assert not split.batches

    ours, exact = (learner.gradient(each.batches, 0, trunks=each.trunks) for each in (split, cut))

    assert float(ours.tally.router.weight) == float(exact.tally.router.weight) == 8 * 16
    np.testing.assert_allclose(ours.tally.router.load_LX, exact.tally.router.load_LX, rtol=1e-5)
    assert relative(jax.device_get(ours.grads), jax.device_get(exact.grads)) <= 1e-5


def test_scores_and_ids_are_those_of_longer_rows() -> None:
    learner, groups = _learner(), _long_groups(11)
    found = []
    for packed in (_pack(groups), pack(groups, dataclasses.replace(_ROWS, row_length=32))):
        scored = [np.asarray(scores) for scores in learner.score_step(packed)]
        assert len(scored) == len(packed.parts)
        found.append({at.request_id: scored[at.batch][at.row, at.start : at.stop] for at in packed.placements})
        given = {one.request_id: (one.context_ids, one.token_ids) for members in groups for one in members}
        assert drift_tokens(packed, given) == 0

    split, whole = found
    assert split.keys() == whole.keys()
    for name, scores in split.items():
        np.testing.assert_allclose(scores, whole[name], rtol=1e-5, atol=1e-5)


def test_a_wrong_token_in_a_trunk_drifts_once_for_every_sample_behind_it() -> None:
    prompt = list(range(12))
    group = [sample(prompt, [n, 1, 2, 3, 4], name=f"r{n}") for n in range(8)]
    packed = _pack([group])
    packed.trunks[0].trunk.tokens[0, 3] += 1

    assert drift_tokens(packed, {one.request_id: (one.context_ids, one.token_ids) for one in group}) == 8


def test_a_mesh_that_splits_rows_by_length_is_refused_with_what_to_set() -> None:
    mesh = sharding.build_mesh(sharding.resolve(sharding.MeshConfig(name="cpu-2", context=2)), jax.devices())
    graphdef, params = abstract_policy(_policy())

    with pytest.raises(ConfigError, match=r"context.*packing.trunks = false"):
        make_trunk_step(graphdef, params, StepConfig(), start=_learner()._step.start, mesh=mesh)


def _forest(samples: Sequence[Sample]) -> Forest:
    return Forest.of(samples, np.ones(len(samples)))


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
    packed = _pack([alone, group], rows=config)

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

    monkeypatch.setattr(phases, "plan_trunks", counted)

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

    packed = _pack([group], rows=PackConfig(row_length=128, rows=1, block_size=8))

    assert packed.batches
    assert sorted(at.request_id for at in packed.placements) == sorted(one.request_id for one in group)
    assert packed.stats.trained_tokens == sum(len(one.token_ids) for one in group)
    assert packed.trunks[0].trunk.term_mask.any()
    assert drift_tokens(packed, {one.request_id: (one.context_ids, one.token_ids) for one in group}) == 0


def test_a_row_beyond_the_largest_bucket_is_an_error_that_says_so() -> None:
    forest = _forest([sample([1, 2], [3], temperature=1.0 + n, name=f"r{n}") for n in range(9)])
    row = [Bin.of(forest, 0, 9)]

    with pytest.raises(ValueError, match="a row has 9 edges; the largest bucket holds 8"):
        assembling.shape_of([row], PackConfig(row_length=8, block_size=8))


@pytest.mark.parametrize("room", [2, 3])
def test_rows_of_two_or_three_tokens_have_an_edge_in_every_batch(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "EDGE_BUCKETS", EDGE_BUCKETS)

    packed = _pack([[sample(range(room + 1), [n]) for n in range(2)]], rows=PackConfig(row_length=room, block_size=1))

    assert min(part.batch.edge_src.shape[1] for part in packed.parts) == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), shards=st.sampled_from([1, 2, 4]))
def test_every_term_lies_in_one_place_and_every_token_counts_once_for_its_sample(seed: int, shards: int) -> None:
    groups = _long_groups(seed)
    packed = pack(groups, _ROWS, row_shards=shards)
    by_id = {one.request_id: one for members in groups[:2] for one in members}

    assert len(packed.placements) == sum(len(members) for members in groups) == packed.stats.samples
    for at in packed.placements:
        if at.request_id not in by_id:
            continue
        one, part = by_id[at.request_id], packed.parts[at.batch]
        context, sampled = trained_ids(part, at)
        assert (context.tolist(), sampled.tolist()) == (one.context_ids.tolist(), one.token_ids.tolist())
        assert part.batch.old_logp[at.row, at.start : at.stop].tolist() == one.old_logp.tolist()
    masks = [part.batch.term_mask.sum() for part in packed.parts]
    assert sum(masks) == packed.stats.trained_tokens == sum(len(one.token_ids) for members in groups for one in members)
    assert sum(part.batch.samples_through.sum() for part in packed.parts) == packed.stats.unmerged_tokens
    assert sum(part.batch.weight.sum() for part in packed.parts) == pytest.approx(1.0, abs=1e-6)
    assert packed.stats.padded_tokens == sum(part.batch.tokens.size for part in packed.parts)
    assert packed.stats.pair_imbalance >= 1.0
