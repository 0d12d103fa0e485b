"""Meshes and partition rules: the only place a mesh axis or a chip is spelled."""

from forgejax.sharding.layout import ONE_DEVICE, Layout, constrain, current_layout
from forgejax.sharding.mesh import (
    build_engine_mesh,
    build_mesh,
    has_accelerator,
    prepare_engine,
    prepare_platform,
    spare_devices,
)
from forgejax.sharding.reshard import copy_shards
from forgejax.sharding.rules import Rules
from forgejax.sharding.topology import CHIPS, Chip, EngineMesh, MeshConfig, MeshPlan, resolve

__all__ = [
    "CHIPS",
    "ONE_DEVICE",
    "Chip",
    "EngineMesh",
    "Layout",
    "MeshConfig",
    "MeshPlan",
    "Rules",
    "build_engine_mesh",
    "build_mesh",
    "constrain",
    "copy_shards",
    "current_layout",
    "has_accelerator",
    "prepare_engine",
    "prepare_platform",
    "resolve",
    "spare_devices",
]
