"""The whole train step through the real TPU compiler: what it needs of a chip's memory, and what it exchanges."""

from __future__ import annotations

import os

# Before jax is imported: no TPU is looked for, and other processes may compile at the same time.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from forgejax.learner import PackConfig, PackedBatch, StepConfig, empty_batch, make_train_step
from forgejax.learner.context import batch_shardings, spread
from forgejax.models import PolicyConfig, abstract_policy
from forgejax.sharding import (
    MeshConfig,
    Rules,
    build_mesh,
    length_shards,
    param_shardings,
    replicated,
    resolve,
    rows_shards,
)

_USABLE = 15.75 * 2**30  # of the 16 GiB of a v5e


def _mesh(topology: str, config: MeshConfig) -> Mesh:
    return build_mesh(resolve(config), topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def _placed(tree: Any, shardings: Any) -> Any:
    def one(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings)


def _batch(config: PackConfig, mesh: Mesh) -> PackedBatch:
    """A batch of those rows, as its shapes on the mesh."""
    batch = empty_batch(config, row_shards=rows_shards(mesh, Rules()))
    if (shards := length_shards(mesh, Rules())) > 1:
        batch = spread(batch, shards)
    return _placed(batch, batch_shardings(batch, mesh, Rules()))


def _compiled(
    policy: PolicyConfig, step_config: StepConfig, packing: PackConfig, mesh: Mesh
) -> dict[str, jax.stages.Compiled]:
    graphdef, params = abstract_policy(policy)
    params = _placed(params, param_shardings(params, mesh, Rules()))
    step = make_train_step(graphdef, params, step_config, mesh=mesh)
    scalar = replicated(mesh)

    def on_mesh(tree: Any) -> Any:
        return _placed(tree, param_shardings(tree, mesh, Rules()))

    accumulated, state = on_mesh(jax.eval_shape(step.start, params)), on_mesh(jax.eval_shape(step.init, params))
    version = jax.ShapeDtypeStruct((), np.int32, sharding=scalar)
    calls = {
        "accumulate": (step.accumulate, (params, accumulated, _batch(packing, mesh), version)),
        "apply": (step.apply, (state, accumulated)),
    }
    return {
        name: function.trace(*args).lower(lowering_platforms=("tpu",)).compile()  # type: ignore[attr-defined]
        for name, (function, args) in calls.items()
    }


def _peak(compiled: jax.stages.Compiled) -> int:
    """Bytes of a chip's memory while the program runs."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
