from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.lay import lay_empty
from forgejax.learner.step.memory import activation_bytes, kept_within
from forgejax.learner.step.train_step import StepConfig, make_train_step
from forgejax.models import Kept, PolicyConfig, abstract_policy
from forgejax.models.moe import MoEConfig
from forgejax.sharding import MeshConfig, build_mesh, resolve

_POLICY = PolicyConfig(vocab_size=8, num_layers=8, d_model=32, num_heads=4, num_kv_heads=2, d_ff=96)
_MIXTURE = dataclasses.replace(_POLICY, moe=MoEConfig(num_experts=4, experts_per_token=2))


def _temporary_bytes(keep: Kept, layers: int, mesh: Mesh | None = None, policy: PolicyConfig = _POLICY) -> int:
    """What the gradient of a micro-batch needs on a device besides its inputs and outputs."""
    graphdef, params = abstract_policy(dataclasses.replace(policy, num_layers=layers))
    step: Any = make_train_step(graphdef, params, StepConfig(keep=keep), mesh=mesh)
    accumulated = jax.eval_shape(step.start, params)
    (batch,) = lay_empty(PackConfig(row_length=1024, rows=1, block_size=64)).batches
    compiled = step.accumulate.lower(params, accumulated, batch, np.int32(0)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize(
    ("policy", "tensor", "keep"),
    [
        *((_POLICY, 1, keep) for keep in ("products", "attention", "nothing")),
        (_POLICY, 2, "products"),
        *((_MIXTURE, tensor, "products") for tensor in (1, 2)),
    ],
)
def test_the_model_of_memory_is_what_the_compiler_allocates(policy: PolicyConfig, tensor: int, keep: Kept) -> None:
    mesh = build_mesh(resolve(MeshConfig(name=f"cpu-{tensor}", tensor=tensor))) if tensor > 1 else None
    # Eight more layers: what a step needs besides what its layers keep is the same for any number of them, for their
    # gradients are added to the sum where it lies.
    for_eight = _temporary_bytes(keep, 12, mesh, policy) - _temporary_bytes(keep, 4, mesh, policy)

    assert for_eight == pytest.approx(activation_bytes(policy, 1024, keep, mesh=mesh), rel=0.03)


def test_devices_that_split_heads_keep_a_share_of_the_input_each() -> None:
    mesh = build_mesh(resolve(MeshConfig(name="cpu-2", tensor=2)))
    whole, share = (_temporary_bytes(keep, 12, mesh) - _temporary_bytes(keep, 4, mesh) for keep in ("nothing", "share"))

    assert whole - share == pytest.approx(activation_bytes(_POLICY, 1024, "nothing") / 2, rel=0.03)


def test_layers_keep_the_most_that_the_budget_holds() -> None:
    products = activation_bytes(_POLICY, 1024, "products") / 2**30
    attention = activation_bytes(_POLICY, 1024, "attention") / 2**30

    assert kept_within(_POLICY, 1024, products * 1.01) == "products"
    assert kept_within(_POLICY, 1024, products * 0.99) == "attention"
    assert kept_within(_POLICY, 1024, attention * 0.99) == "nothing"


def test_a_mesh_holds_as_much_more_as_it_splits_tokens_and_heads() -> None:
    mesh = build_mesh(resolve(MeshConfig(name="cpu-8", data=2, context=2, tensor=2)))
    products = activation_bytes(_POLICY, 1024 // 4, "products", mesh=mesh) / 2**30

    assert kept_within(_POLICY, 1024, products * 1.01, mesh=mesh) == "products"
    assert kept_within(_POLICY, 1024, products * 0.99, mesh=mesh) == "attention"


def test_a_device_that_has_all_key_heads_keeps_all_of_them() -> None:
    mesh = build_mesh(resolve(MeshConfig(name="cpu-4", tensor=4)))
    more_heads = dataclasses.replace(_POLICY, num_kv_heads=4)

    found = [activation_bytes(policy, 1024, "attention", mesh=mesh) for policy in (_POLICY, more_heads)]

    # Two whole heads of keys and values against one of four.
    assert found[0] - found[1] == 2 * 8 * 4 * 8 * 1024


def test_where_nothing_fits_devices_that_split_heads_keep_shares() -> None:
    with_heads, without = (
        build_mesh(resolve(MeshConfig(name="cpu-2", **split))) for split in ({"tensor": 2}, {"tensor": 1, "fsdp": 2})
    )

    assert kept_within(_POLICY, 1024, 0.0, mesh=with_heads) == "share"
    assert kept_within(_POLICY, 1024, 0.0, mesh=without) == kept_within(_POLICY, 1024, 0.0) == "nothing"
