from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.lay import lay_empty
from forgejax.learner.step.memory import choose_kept, count_activation_bytes
from forgejax.learner.step.train_step import StepConfig, make_train_step
from forgejax.models import Kept, PolicyConfig, abstract_policy
from forgejax.models.moe import MoEConfig
from forgejax.sharding import ONE_DEVICE, Layout, MeshConfig, build_mesh, resolve

_POLICY = PolicyConfig(vocab_size=8, num_layers=8, d_model=32, num_heads=4, num_kv_heads=2, d_ff=96)
_MIXTURE = dataclasses.replace(_POLICY, moe=MoEConfig(num_experts=4, experts_per_token=2))


def _layout(name: str, **axes: int) -> Layout:
    return Layout(mesh=build_mesh(resolve(MeshConfig(name=name, **axes))))


def _temporary_bytes(keep: Kept, layers: int, layout: Layout = ONE_DEVICE, policy: PolicyConfig = _POLICY) -> int:
    """What the gradient of a micro-batch needs on a device besides its inputs and outputs."""
    graphdef, params = abstract_policy(dataclasses.replace(policy, num_layers=layers))
    step: Any = make_train_step(graphdef, params, StepConfig(keep=keep), layout=layout)
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
    layout = _layout(f"cpu-{tensor}", tensor=tensor) if tensor > 1 else ONE_DEVICE
    # Eight more layers: what a step needs besides what its layers keep is the same for any number of them, for their
    # gradients are added to the sum where it lies.
    for_eight = _temporary_bytes(keep, 12, layout, policy) - _temporary_bytes(keep, 4, layout, policy)

    assert for_eight == pytest.approx(count_activation_bytes(policy, 1024, keep, layout=layout), rel=0.03)


def test_devices_that_split_heads_keep_a_share_of_the_input_each() -> None:
    layout = _layout("cpu-2", tensor=2)
    whole, share = (
        _temporary_bytes(keep, 12, layout) - _temporary_bytes(keep, 4, layout) for keep in ("nothing", "share")
    )

    assert whole - share == pytest.approx(count_activation_bytes(_POLICY, 1024, "nothing") / 2, rel=0.03)


def test_layers_keep_the_most_that_the_budget_holds() -> None:
    products = count_activation_bytes(_POLICY, 1024, "products") / 2**30
    attention = count_activation_bytes(_POLICY, 1024, "attention") / 2**30

    assert choose_kept(_POLICY, 1024, products * 1.01) == "products"
    assert choose_kept(_POLICY, 1024, products * 0.99) == "attention"
    assert choose_kept(_POLICY, 1024, attention * 0.99) == "nothing"


def test_a_mesh_holds_as_much_more_as_it_splits_tokens_and_heads() -> None:
    layout = _layout("cpu-8", data=2, context=2, tensor=2)
    products = count_activation_bytes(_POLICY, 1024 // 4, "products", layout=layout) / 2**30

    assert choose_kept(_POLICY, 1024, products * 1.01, layout=layout) == "products"
    assert choose_kept(_POLICY, 1024, products * 0.99, layout=layout) == "attention"


def test_a_device_that_has_all_key_heads_keeps_all_of_them() -> None:
    layout = _layout("cpu-4", tensor=4)
    more_heads = dataclasses.replace(_POLICY, num_kv_heads=4)

    found = [count_activation_bytes(policy, 1024, "attention", layout=layout) for policy in (_POLICY, more_heads)]

    # Two whole heads of keys and values against one of four.
    assert found[0] - found[1] == 2 * 8 * 4 * 8 * 1024


def test_where_nothing_fits_devices_that_split_heads_keep_shares() -> None:
    with_heads, without = (_layout("cpu-2", **split) for split in ({"tensor": 2}, {"tensor": 1, "fsdp": 2}))

    assert choose_kept(_POLICY, 1024, 0.0, layout=with_heads) == "share"
    assert choose_kept(_POLICY, 1024, 0.0, layout=without) == choose_kept(_POLICY, 1024, 0.0) == "nothing"
