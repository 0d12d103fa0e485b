"""Meshes and partition rules: the only place a mesh axis or a chip is spelled."""

from forgejax.sharding.mesh import build_mesh, has_accelerator, prepare_platform, spare_devices
from forgejax.sharding.rules import (
    Rules,
    batch_sharding,
    constrain,
    current_scope,
    heads_axis,
    kv_heads_axis,
    length_axis,
    length_shards,
    param_shardings,
    replicated,
    rows_axes,
    rows_shards,
    scope,
    split_axes,
)
from forgejax.sharding.topology import CHIPS, Chip, MeshConfig, MeshPlan, resolve

__all__ = [
    "CHIPS",
    "Chip",
    "MeshConfig",
    "MeshPlan",
    "Rules",
    "batch_sharding",
    "build_mesh",
    "constrain",
    "current_scope",
    "has_accelerator",
    "heads_axis",
    "kv_heads_axis",
    "length_axis",
    "length_shards",
    "param_shardings",
    "prepare_platform",
    "replicated",
    "resolve",
    "rows_axes",
    "rows_shards",
    "scope",
    "spare_devices",
    "split_axes",
]
