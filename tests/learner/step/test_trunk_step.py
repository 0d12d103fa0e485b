"""Two phases against the oracle: a trunk that runs once gives the gradient of samples that know of none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from forgejax import sharding
from forgejax.errors import ConfigError
from forgejax.learner.learner import Learner
from forgejax.learner.pack import pack
from forgejax.learner.packing import lay
from forgejax.learner.packing.batch import PackedStep
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.drift import count_drift, read_trained_ids
from forgejax.learner.packing.samples import Sample
from forgejax.learner.step.train_step import StepConfig
from forgejax.learner.step.trunk_step import make_trunk_step
from forgejax.models import Kept, MoEConfig, PolicyConfig, abstract_policy, init_params
from tests.learner.oracle import relative, unmerged
from tests.learner.samples import random_group, sample

_ROOM = 32
_ROWS = PackConfig(row_length=16, rows=1, block_size=8)


@pytest.fixture(autouse=True)
def _one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch in the largest bucket, so that each function compiles once."""
    monkeypatch.setattr(lay, "EDGE_BUCKETS", (1.0,))
    monkeypatch.setattr(lay, "TERM_BUCKETS", (16,))


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
    total = learner.gradient(packed, 0)
    return float(total.tally.loss), jax.device_get(total.grads)


_SHARED: list[Learner] = []


def _learner() -> Learner:
    """One learner for all tests, so that it compiles once; whoever changes its state puts it back."""
    if not _SHARED:
        _SHARED.append(Learner(abstract_policy(_policy())[0], init_params(_policy()), StepConfig()))
    return _SHARED[0]


def _check_against_oracle(learner: Learner, bound: float, examples: int) -> None:
    params = learner.weights
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


@pytest.mark.parametrize(("split", "keep"), [({"fsdp": 2, "tensor": 2}, "products"), ({"tensor": 4}, "share")])
def test_a_mesh_of_rows_weights_and_heads_gives_the_same_gradient(split: dict[str, int], keep: Kept) -> None:
    layout = sharding.Layout(mesh=sharding.build_mesh(sharding.resolve(sharding.MeshConfig(name="cpu-4", **split))))
    learner = Learner(
        abstract_policy(_policy())[0], init_params(_policy(), layout), StepConfig(keep=keep), layout=layout
    )
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
        found.append({k: float(v) for k, v in learner.update(packed, 0).items()})
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

    ours, exact = (learner.gradient(each, 0) for each in (split, cut))

    assert float(ours.tally.router.weight) == float(exact.tally.router.weight) == 8 * 16
    np.testing.assert_allclose(ours.tally.router.load_LX, exact.tally.router.load_LX, rtol=1e-5)
    assert relative(jax.device_get(ours.grads), jax.device_get(exact.grads)) <= 1e-5


def test_scores_and_ids_are_those_of_longer_rows() -> None:
    learner, groups = _learner(), _long_groups(11)
    found = []
    for packed in (_pack(groups), pack(groups, dataclasses.replace(_ROWS, row_length=32))):
        scored = [np.asarray(scores) for scores in learner.score(packed)]
        assert len(scored) == len(packed.parts)
        found.append({at.request_id: scored[at.batch][at.row, at.start : at.stop] for at in packed.placements})
        given = {one.request_id: (one.context_ids, one.token_ids) for members in groups for one in members}
        assert count_drift(packed, given) == 0

    split, whole = found
    assert split.keys() == whole.keys()
    for name, scores in split.items():
        np.testing.assert_allclose(scores, whole[name], rtol=1e-5, atol=1e-5)


def test_a_wrong_token_in_a_trunk_drifts_once_for_every_sample_behind_it() -> None:
    prompt = list(range(12))
    group = [sample(prompt, [n, 1, 2, 3, 4], name=f"r{n}") for n in range(8)]
    packed = _pack([group])
    packed.trunks[0].trunk.tokens_BT[0, 3] += 1

    assert count_drift(packed, {one.request_id: (one.context_ids, one.token_ids) for one in group}) == 8


def test_a_mesh_that_splits_rows_by_length_is_refused_with_what_to_set() -> None:
    layout = sharding.Layout(mesh=sharding.build_mesh(sharding.resolve(sharding.MeshConfig(name="cpu-2", context=2))))

    with pytest.raises(ConfigError, match=r"context.*packing.trunks = false"):
        make_trunk_step(*abstract_policy(_policy()), StepConfig(), start=_learner()._step.start, layout=layout)


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
        context, sampled = read_trained_ids(part, at)
        assert (context.tolist(), sampled.tolist()) == (one.context_ids.tolist(), one.token_ids.tolist())
        assert part.batch.old_logp_BM[at.row, at.start : at.stop].tolist() == one.old_logp.tolist()
    masks = [part.batch.term_mask_BM.sum() for part in packed.parts]
    assert sum(masks) == packed.stats.trained_tokens == sum(len(one.token_ids) for members in groups for one in members)
    assert sum(part.batch.samples_through_BT.sum() for part in packed.parts) == packed.stats.unmerged_tokens
    assert sum(part.batch.weight_BM.sum() for part in packed.parts) == pytest.approx(1.0, abs=1e-6)
    assert packed.stats.padded_tokens == sum(part.batch.tokens_BT.size for part in packed.parts)
    assert packed.stats.pair_imbalance >= 1.0
