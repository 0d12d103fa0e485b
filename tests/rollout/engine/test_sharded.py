"""Laws of an engine over a mesh: on two and four devices it draws what it draws on one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from forgejax.errors import MeshError
from forgejax.models import MoEConfig, Params, PolicyConfig, init_params
from forgejax.rollout import Driver, EngineConfig, PolicyEngine
from forgejax.sharding import EngineMesh, Layout, MeshConfig, build_engine_mesh, build_mesh, resolve
from forgejax.types import Completion, SamplingLaw
from tests.rollout import tiny
from tests.rollout.driving import sample_all

_DENSE = PolicyConfig(vocab_size=48, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=32)
_MIXTURE = dataclasses.replace(_DENSE, moe=MoEConfig(num_experts=4, experts_per_token=2, d_ff=8))
_CONFIG = EngineConfig(slots=4, max_context=64, tokens_per_step=2, prefill_buckets=(16,), page_tokens=4, kv_pages=64)


def _on(**sizes: int) -> Layout:
    return Layout(mesh=build_engine_mesh(EngineMesh(**sizes), jax.devices()[1:]))


async def _draw(policy: PolicyConfig, layout: Layout, params: Params) -> list[Completion]:
    """Five requests over four slots, that share a prompt, under every kind of law; and a turn that goes on from one."""
    shared = tiny.prompt(0, 21) % policy.vocab_size
    laws = [SamplingLaw(), SamplingLaw(temperature=0.0), SamplingLaw(top_k=5), SamplingLaw(top_p=0.7), SamplingLaw()]
    requests = [tiny.request(f"a{i}", [*shared, i], 9 + i, seed=i, law=law) for i, law in enumerate(laws)]
    with Driver(PolicyEngine(policy, _CONFIG, layout), params) as driver:
        turns = await sample_all(driver, requests)
        later = tiny.request("b", [*turns[0].prompt_ids, *turns[0].token_ids, 7], 8, seed=7)
        return turns + await sample_all(driver, [later])


_alone: dict[PolicyConfig, list[Completion]] = {}


@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        pytest.param(_DENSE, {"tensor": 2}, id="as many devices as key heads"),
        pytest.param(_DENSE, {"tensor": 4}, id="each key head on two devices"),
        pytest.param(_MIXTURE, {"expert": 2, "tensor": 2}, id="experts and their widths"),
    ],
)
async def test_tokens_and_logprobs_are_those_of_one_device(policy: PolicyConfig, sizes: dict[str, int]) -> None:
    params = init_params(policy, seed=1)
    if policy not in _alone:
        _alone[policy] = await _draw(policy, _on(), params)
    split = await _draw(policy, _on(**sizes), params)
    assert [turn.cached_tokens for turn in split] == [turn.cached_tokens for turn in _alone[policy]]
    for one, other in zip(_alone[policy], split, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_each_device_keeps_its_key_heads_and_its_part_of_the_weights() -> None:
    def held(sizes: dict[str, int]) -> tuple[set[Any], int]:
        engine = PolicyEngine(_DENSE, _CONFIG, _on(**sizes))
        weights, slots = engine.load_params().current.params, engine.make_slots()
        largest = weights["blocks"]["gate"].get_value()
        return {shard.data.shape for shard in slots._pool.addressable_shards}, largest.addressable_shards[0].data.size

    assert held({}) == ({(2, 65, 2, 2, 4, 4)}, 2 * 16 * 32)
    assert held({"tensor": 2}) == ({(2, 65, 2, 1, 4, 4)}, 2 * 16 * 16)
    assert held({"tensor": 4}) == ({(2, 65, 2, 1, 4, 4)}, 2 * 16 * 8)


def test_a_learners_weights_reach_the_engines_devices_in_its_own_split_and_outlive_them() -> None:
    learner = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-4", fsdp=2, tensor=2))))
    given = init_params(_DENSE, learner, seed=3)
    expected = jax.tree.map(np.asarray, given)
    engine = PolicyEngine(_DENSE, _CONFIG, Layout(mesh=build_engine_mesh(EngineMesh(tensor=4), jax.devices()[2:])))
    box = engine.load_params()
    box.publish(given, 1)
    jax.tree.map(lambda x: x.delete(), given)
    found = box.current.params
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found), expected)
    placed = jax.tree.leaves(engine.layout.placements(engine.abstract_params))
    assert [leaf.sharding for leaf in jax.tree.leaves(found)] == placed


def test_no_program_is_compiled_again_for_arrays_that_an_earlier_one_left() -> None:
    engine = PolicyEngine(_DENSE, _CONFIG, _on(tensor=2))
    weights, slots = engine.load_params().current, engine.make_slots()
    before = jax.tree.map(lambda x: x.sharding, (slots._pool, slots._state))
    assert slots.begin(0, tiny.prompt(0, 5)) is not None
    slots.extend(weights, 0, tiny.prompt(0, 4), 0)
    slots.grow(0, 8)
    slots.generate(weights, 4)
    slots.stop([0])
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), (slots._pool, slots._state), before)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("policy", "layout", "message"),
    [
        (_DENSE, _on(expert=2), "expert 2 for a policy without experts; set expert to 1"),
        (_DENSE, Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-2", fsdp=2)))), "2 devices along others"),
        (
            dataclasses.replace(_DENSE, num_heads=6, num_kv_heads=3, head_dim=4),
            _on(tensor=2),
            "kv_heads dimension 3 does not div",
        ),
    ],
)
def test_a_mesh_that_splits_nothing_of_the_policy_or_cannot_split_it_is_refused(
    policy: PolicyConfig, layout: Layout, message: str
) -> None:
    with pytest.raises(MeshError, match=message):
        PolicyEngine(policy, _CONFIG, layout)
