"""Laws of what a step reports of the routers of a mixture of experts."""

from typing import Any

import jax
import numpy as np
import pytest

from forgejax.learner import PackConfig, pack
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.lay import lay_plan
from forgejax.learner.packing.plan import plan_step
from forgejax.learner.packing.samples import Sample
from forgejax.learner.step.train_step import StepConfig, TrainStep, make_train_step
from forgejax.models import PolicyConfig, abstract_policy, init_params
from forgejax.models.moe import MoEConfig
from tests.learner.samples import random_group

_POLICY = PolicyConfig(
    vocab_size=8, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=12, param_dtype="float64",
    compute_dtype="float64", moe=MoEConfig(num_experts=6, experts_per_token=2),
)  # fmt: skip
_PACK = PackConfig(row_length=64, rows=2, block_size=16, trunks=False)


def _accumulated(step: TrainStep, params: Any, forests: list[Forest]) -> Any:
    total = step.start(params)
    for batch in (batch for forest in forests for batch in lay_plan(plan_step(forest, _PACK), _PACK).batches):
        total = step.accumulate(params, total, batch, np.int32(0))
    return jax.device_get(total)


def test_a_merged_group_routes_and_learns_as_its_samples_do_one_by_one() -> None:
    samples = random_group(np.random.default_rng(3), vocab=2, samples=8, longest=12)
    weights = np.full(8, 1 / sum(len(one.token_ids) for one in samples))
    together, alone = Forest.of(samples, weights), [Forest.of([one], weights[:1]) for one in samples]
    assert len(together.tree.tokens_T) < sum(len(each.tree.tokens_T) for each in alone)
    with jax.enable_x64(True):
        params = init_params(_POLICY)
        step = make_train_step(abstract_policy(_POLICY)[0], params, StepConfig(vocab_chunk=16))
        merged, apart = (_accumulated(step, params, forests) for forests in ([together], alone))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), merged.grads, apart.grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged.tally.router, apart.tally.router)

        fed = sum(one.fed_tokens for one in samples)
        assert float(merged.tally.router.weight) == fed
        np.testing.assert_allclose(merged.tally.router.load_LX.sum(axis=1), [2 * fed] * 2)
        metrics = step.apply(step.init(params), step.accumulate(params, step.start(params), *_first(samples)))[1]
        assert 1 / 6 <= float(metrics["router/load_max"]) <= 0.5
        assert float(metrics["router/load_max_over_mean"]) == pytest.approx(6 * float(metrics["router/load_max"]))
        assert 0.0 < float(metrics["router/entropy"]) <= np.log(6) + 1e-6


def _first(samples: list[Sample]) -> tuple[Any, Any]:
    return pack([samples], _PACK).batches[0], np.int32(0)
