"""Rows that several devices share: what they compute is what one device computes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from forgejax import sharding
from forgejax.learner.learner import Learner
from forgejax.learner.pack import pack
from forgejax.learner.packing.batch import PackedStep
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.deal import batch_axes, deal_rows
from forgejax.learner.packing.samples import Sample
from forgejax.learner.step.train_step import StepConfig
from forgejax.models import Kept, MoEConfig, PolicyConfig, abstract_policy, init_params
from forgejax.ops import SplitMeta
from tests.learner.oracle import relative
from tests.learner.samples import random_group, sample

_CONFIG = PackConfig(row_length=128, rows=1, block_size=8, trunks=False)


def _policy(*, experts: int = 0) -> PolicyConfig:
    moe = MoEConfig(num_experts=experts, experts_per_token=2, d_ff=8) if experts else MoEConfig()
    return PolicyConfig(vocab_size=32, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, moe=moe)


def _groups(seed: int) -> list[list[Sample]]:
    """Deep trees over few tokens and shallow ones over many; half of the rows is padding."""
    rng = np.random.default_rng(seed)
    return [random_group(rng, vocab=vocab, samples=8, longest=24) for vocab in (2, 3, 32, 32)]


def _packed(seed: int, rows: int) -> PackedStep:
    return pack(_groups(seed), _CONFIG, row_shards=rows)


def _learner(policy: PolicyConfig, keep: Kept = "products", /, **axes: int) -> Learner:
    """On a mesh of those axes; of none, on one device. Two chunks of logits or more."""
    step = StepConfig(keep=keep, vocab_chunk=6)
    if not axes:
        return Learner(abstract_policy(policy)[0], init_params(policy), step)
    sizes = dict.fromkeys(("data", "fsdp", "context", "tensor", "expert"), 1) | axes
    config = sharding.MeshConfig(name=f"cpu-{int(np.prod(list(axes.values())))}", **sizes)
    layout = sharding.Layout(mesh=sharding.build_mesh(sharding.resolve(config)))
    return Learner(abstract_policy(policy)[0], init_params(policy, layout), step, layout=layout)


@functools.cache
def _alone(experts: int) -> Learner:
    return _learner(_policy(experts=experts))


@pytest.mark.parametrize(
    ("experts", "axes"),
    [
        (0, {"context": 2}),
        (0, {"context": 4, "tensor": 2}),
        (0, {"context": 8}),
        (0, {"context": 2, "tensor": 4}),  # twice as many shards as key heads
        (0, {"context": 2, "fsdp": 2, "data": 2}),
        (4, {"context": 2, "expert": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_devices_that_share_rows_find_the_loss_and_the_gradient_of_one(experts: int, axes: dict[str, int]) -> None:
    alone, shared = _alone(experts), _learner(_policy(experts=experts), **axes)
    packed = _packed(0, shared.row_shards)
    expected, found = (jax.device_get(each.gradient(packed, 0)) for each in (alone, shared))

    assert found.tally.loss == pytest.approx(expected.tally.loss, rel=1e-5, abs=1e-6)
    assert relative(found.grads, expected.grads) <= 1e-5
    for ours, theirs in zip(jax.tree.leaves(found.tally), jax.tree.leaves(expected.tally), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_devices_that_share_rows_score_as_one() -> None:
    alone, shared = _alone(0), _learner(_policy(), context=4, tensor=2)
    packed = _packed(1, shared.row_shards)
    scored, expected = (np.asarray(each.score(packed)[0]) for each in (shared, alone))
    mask = packed.batches[0].term_mask_BM

    np.testing.assert_allclose(scored[mask], expected[mask], rtol=1e-5)


@pytest.mark.parametrize("axes", [{"context": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_devices_that_keep_shares_of_a_layers_input_find_the_gradient_of_one(axes: dict[str, int]) -> None:
    alone, shared = _alone(0), _learner(_policy(), "share", **axes)
    packed = _packed(0, shared.row_shards)
    expected, found = (jax.device_get(each.gradient(packed, 0)) for each in (alone, shared))

    assert relative(found.grads, expected.grads) <= 1e-5


def test_a_shard_may_have_more_edges_than_tokens() -> None:
    """28 answers of one token: all are read at the prompt's last node, which lies with a shard of 16 tokens."""
    group = [sample([1, 2, 3], [token], name=str(token)) for token in range(4, 32)]
    packed = pack([group], _CONFIG, row_shards=1)
    alone, shared = _alone(0), _learner(_policy(), context=8)
    expected, found = (jax.device_get(each.gradient(packed, 0)) for each in (alone, shared))

    assert found.tally.terms == len(group) > 128 // 8
    assert relative(found.grads, expected.grads) <= 1e-5


def test_all_arrays_are_split_by_rows_and_those_of_tokens_and_edges_by_length_once_it_is_dealt() -> None:
    whole = _packed(0, 1).batches[0]
    dealt = deal_rows(whole, 2)
    assert {*jax.tree.leaves(batch_axes(whole))} == {"rows"}

    axes = batch_axes(dealt)
    assert axes.tokens_BT == axes.edge_src_BE == axes.edge_tgt_BE == axes.edge_temperature_BE == ("rows", "length")
    assert axes.positions_BT == axes.samples_through_BT == ("rows", "length")
    assert isinstance(axes.attention, SplitMeta)
    assert axes.term_edge_BM == axes.weight_BM == axes.attention.stored_at == ("rows",)
    jax.tree.map(lambda array, names: array.shape[: len(names)], dealt, axes)  # raises where the structures differ
