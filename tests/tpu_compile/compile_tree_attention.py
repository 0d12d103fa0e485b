"""The tree attention kernels through the real TPU compiler, for chips that are described and not there.

Runs on any machine without a TPU, in an environment of its own: ``make tpu-compile``.
"""

from __future__ import annotations

import os

# Before jax is imported: no TPU is looked for, and other processes may compile at the same time.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from forgejax.ops import TreeMeta, tree_attention, tree_meta
from forgejax.ops.tree.attention import kernel_for
from forgejax.ops.tree.tpu import TpuKernel

_KERNEL_CALL = 'custom_call_target="tpu_custom_call"'


def _mesh(topology: str, rows: int, heads: int) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    grid: np.ndarray = np.array(devices[: rows * heads]).reshape(rows, heads)
    return Mesh(grid, ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)


def _compiled(
    mesh: Mesh, q: tuple[int, ...], kv_heads: int, dtype: str, block: int, *, window: int | None = None
) -> jax.stages.Compiled:
    """Output and gradients for queries of shape ``q``, compiled for the mesh."""
    B, T, H, C = q
    split_keys = kv_heads % mesh.shape["heads"] == 0

    def shape(heads: int, axis: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec("rows", None, axis, None))
        return jax.ShapeDtypeStruct((B, T, heads, C), dtype, sharding=sharding)

    by_row = NamedSharding(mesh, PartitionSpec("rows"))
    chain, positions = np.full((B, T), T, np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    meta = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row),
        tree_meta(chain, np.full(B, T), block, window=window, positions=positions),
    )

    def step(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta, d_out: jax.Array) -> object:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return tree_attention(q, k, v, meta, mesh=mesh, row_axes=("rows",), head_axis="heads")

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(d_out)

    queries, keys = shape(H, "heads"), shape(kv_heads, "heads" if split_keys else None)
    return jax.jit(step).trace(queries, keys, keys, meta, queries).lower(lowering_platforms=("tpu",)).compile()


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None
    return text


def test_the_devices_of_a_described_slice_choose_the_tpu_kernels() -> None:
    assert kernel_for(_mesh("v5e:2x2", 2, 2)) == TpuKernel()


@pytest.mark.parametrize(
    ("q", "kv_heads", "dtype", "block"),
    [
        ((2, 1024, 9, 64), 3, "float32", 128),  # SmolLM2-135M
        ((1, 2048, 8, 128), 2, "bfloat16", 512),  # a shard of an 8B model: groups of 4
        ((1, 2048, 6, 128), 1, "bfloat16", 1024),  # the largest block
        ((1, 1024, 2, 96), 2, "bfloat16", 256),  # no grouping, heads narrower than the lanes
        ((1, 1024, 2, 256), 1, "bfloat16", 512),  # and wider
    ],
)
def test_forward_and_backward_compile_for_v5e(q: tuple[int, ...], kv_heads: int, dtype: str, block: int) -> None:
    compiled = _compiled(_mesh("v5e:2x2", 1, 1), q, kv_heads, dtype, block)

    assert _text(compiled).count(_KERNEL_CALL) == 3


@pytest.mark.parametrize(
    ("q", "kv_heads", "dtype", "block"),
    [((2, 1024, 9, 64), 3, "float32", 128), ((1, 2048, 6, 128), 1, "bfloat16", 1024)],
)
def test_a_window_compiles_for_v5e(q: tuple[int, ...], kv_heads: int, dtype: str, block: int) -> None:
    compiled = _compiled(_mesh("v5e:2x2", 1, 1), q, kv_heads, dtype, block, window=300)

    assert _text(compiled).count(_KERNEL_CALL) == 3


def test_rows_and_heads_of_a_mesh_compile_without_a_collective() -> None:
    text = _text(_compiled(_mesh("v5e:2x4", 2, 4), (2, 2048, 8, 128), 4, "bfloat16", 512))

    assert text.count(_KERNEL_CALL) == 3
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_a_row_of_two_hundred_thousand_tokens_compiles_with_memory_linear_in_its_length() -> None:
    length = 391 * 512
    compiled = _compiled(_mesh("v5e:2x2", 1, 1), (1, length, 4, 128), 1, "bfloat16", 512)

    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * length * 4 * 128 * 2  # four arrays like the queries
