"""An engine's programs through the real TPU compiler: what they need of a chip's memory, and what chips exchange.

Qwen3-8B on a described host of four v5e, Qwen3-30B-A3B on eight; 64 slots of 32k and of 200k tokens, whose pool of
pages fills what weights and programs leave of each chip's memory.
"""

from __future__ import annotations

import os

# Before jax is imported: no TPU is looked for, and other processes may compile at the same time.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from forgejax.models import PolicyConfig, abstract_policy
from forgejax.ops.paged.attention import pick_paged_kernel
from forgejax.rollout import EngineConfig
from forgejax.rollout.engine.engine import spread_experts
from forgejax.rollout.engine.programs import Programs
from forgejax.sharding import EngineMesh, Layout, build_engine_mesh
from tests.tpu_compile.policies import COLLECTIVES, GIB, QWEN3_8B, QWEN3_30B_A3B, USABLE

_SLOTS, _CHUNK = 64, 512
_SPARE = 1.75 * GIB  # of a chip: what the programs may take beside weights and pool


@dataclasses.dataclass(frozen=True)
class _Case:
    """A policy on the chips of a topology, and the longest sequence."""

    name: str
    topology: str
    mesh: EngineMesh
    context: int
    page_tokens: int
    tokens_per_step: int

    @property
    def policy(self) -> PolicyConfig:
        return {"8B": QWEN3_8B, "30B-A3B": QWEN3_30B_A3B}[self.name]


_CASES = (
    _Case("8B", "v5e:2x2", EngineMesh(tensor=4), 32_768, 64, 4),
    _Case("8B", "v5e:2x2", EngineMesh(tensor=4), 200_704, 128, 4),
    _Case("30B-A3B", "v5e:2x4", EngineMesh(tensor=4, expert=2), 32_768, 64, 4),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Engine:
    """An engine's programs as compiled, and the bytes of weights and pool on each chip."""

    programs: dict[str, jax.stages.Compiled]
    weights: int
    pool: int
    kv_tokens: int


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _bytes(tree: Any) -> int:
    """On each chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def _compiled(case: _Case) -> _Engine:
    """What it needs is printed, for docs/results/tpu_memory.md (``ARGS=-s``)."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    layout = spread_experts(case.policy, Layout(mesh=build_engine_mesh(case.mesh, devices)))
    abstract = abstract_policy(case.policy)[1]
    params = _placed(abstract, layout.placements(abstract))
    programs = Programs(
        policy=case.policy,
        kernel=pick_paged_kernel("tpu"),
        layout=layout,
        page_tokens=case.page_tokens,
        tokens_per_step=case.tokens_per_step,
    )
    heads = max(case.policy.num_kv_heads // case.mesh.tensor, 1)
    of_page = 2 * case.policy.num_layers * heads * case.policy.head_size * 2 * case.page_tokens
    pages = int((USABLE - _SPARE - _bytes(params)) // of_page)
    config = EngineConfig(
        slots=_SLOTS,
        max_context=case.context,
        page_tokens=case.page_tokens,
        kv_pages=pages - 1,
        prefill_buckets=(_CHUNK,),
    )

    def whole(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding())

    pool, slots = jax.eval_shape(functools.partial(Programs.make, programs, config))
    pool = jax.tree.map(lambda x: _placed(x, layout.sharding(None, None, None, "heads")), pool)
    slots = jax.tree.map(lambda x: _placed(x, layout.sharding()), slots)
    M = config.context_pages
    calls = {
        "decode": (Programs.generate, _SLOTS, params, (pool, slots), (whole(_SLOTS, M), None), whole()),
        "prefill": (Programs.extend, params, pool, whole(_CHUNK), whole(M), (whole(), whole())),
    }
    found = {}
    for name, (function, *args) in calls.items():
        start = time.process_time()
        found[name] = function.trace(programs, *args).lower(lowering_platforms=("tpu",)).compile()
        took = time.process_time() - start
        memory = found[name].memory_analysis()
        assert memory is not None
        print(
            f"\n{case.name} on {case.topology}, {case.context:,} tokens, {name}: temporaries "
            f"{memory.temp_size_in_bytes / GIB:.2f}, in all {_peak(found[name]) / GIB:.2f} GiB a chip, "
            f"{took:.0f} s of CPU",
            end="",
        )
    engine = _Engine(
        programs=found, weights=_bytes(params), pool=_bytes(pool), kv_tokens=(pages - 1) * case.page_tokens
    )
    print(
        f"\n{case.name} on {case.topology}, {case.context:,} tokens: weights {engine.weights / GIB:.2f}, pool "
        f"{engine.pool / GIB:.2f} GiB a chip, room for {engine.kv_tokens:,} tokens"
    )
    return engine


def _peak(compiled: jax.stages.Compiled) -> int:
    """Bytes of a chip's memory while the program runs: arguments, results in no argument's place, temporaries, code."""
    memory = compiled.memory_analysis()
    assert memory is not None
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _exchanged(compiled: jax.stages.Compiled) -> list[int]:
    """The size of every array that some collective gives a chip."""
    text = compiled.as_text()
    assert text is not None
    results = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", text)
    return [math.prod(map(int, dims.split(","))) for each in results for dims in re.findall(r"\w\[([\d,]+)\]", each)]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case.name}-{case.context}")
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_an_engine_fits_its_chips_and_changes_its_pool_in_place(case: _Case, program: str) -> None:
    engine = _compiled(case)
    compiled = engine.programs[program]
    memory = compiled.memory_analysis()

    assert memory is not None and memory.alias_size_in_bytes >= engine.pool
    assert memory.temp_size_in_bytes < engine.pool / 4
    assert _peak(compiled) < USABLE
    assert engine.kv_tokens >= case.context


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case.name}-{case.context}")
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_chips_exchange_activations_and_logits_but_neither_pool_nor_weights(case: _Case, program: str) -> None:
    policy, tokens = case.policy, {"decode": _SLOTS, "prefill": _CHUNK}[program]
    activations = tokens * max(policy.d_model, policy.num_heads * policy.head_size)
    logits = _SLOTS * policy.vocab_size // case.mesh.devices

    exchanged = _exchanged(_compiled(case).programs[program])
    assert exchanged
    assert max(exchanged) <= max(activations, logits if program == "decode" else 0)
