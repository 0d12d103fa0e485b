from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from forgejax.learner.batch import PackedBatch
from forgejax.learner.memory import activation_bytes, recomputes
from forgejax.learner.pack_config import PackConfig
from forgejax.learner.packing import empty_batch
from forgejax.learner.step import StepConfig, make_train_step
from forgejax.models import PolicyConfig, abstract_policy

_POLICY = PolicyConfig(vocab_size=8, num_layers=8, d_model=32, num_heads=4, num_kv_heads=2, d_ff=96)


def _temporary_bytes(config: StepConfig, batch: PackedBatch) -> int:
    graphdef, params = abstract_policy(_POLICY)
    step: Any = make_train_step(graphdef, params, config)
    accumulated = jax.eval_shape(step.start, params)
    compiled = step.accumulate.lower(params, accumulated, batch, np.int32(0)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def test_the_model_of_memory_is_what_the_compiler_allocates() -> None:
    batch = empty_batch(PackConfig(row_length=1024, rows=1, block_size=64))
    kept, recomputed = (_temporary_bytes(StepConfig(remat=remat), batch) for remat in (False, True))
    # With recomputation, each layer still keeps its input.
    inputs = 4 * 1024 * _POLICY.num_layers * _POLICY.d_model

    assert kept - recomputed + inputs == pytest.approx(activation_bytes(_POLICY, 1024), rel=0.25)


def test_layers_are_recomputed_where_the_budget_does_not_hold_them() -> None:
    need = activation_bytes(_POLICY, 1024) / 2**30

    assert not recomputes(_POLICY, 1024, need * 1.01)
    assert recomputes(_POLICY, 1024, need * 0.99)
