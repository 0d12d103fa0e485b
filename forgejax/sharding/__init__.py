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
from forgejax.sharding.processes import ALONE, DistributedConfig, Processes, check_share, join_processes
from forgejax.sharding.replicas import Replicas, pick_engine_mesh
from forgejax.sharding.reshard import copy_shards
from forgejax.sharding.rules import Rules
from forgejax.sharding.topology import CHIPS, Chip, EngineMesh, MeshConfig, MeshPlan, resolve

__all__ = [
    "ALONE",
    "CHIPS",
    "ONE_DEVICE",
    "Chip",
    "DistributedConfig",
    "EngineMesh",
    "Layout",
    "MeshConfig",
    "MeshPlan",
    "Processes",
    "Replicas",
    "Rules",
    "build_engine_mesh",
    "build_mesh",
    "check_share",
    "constrain",
    "copy_shards",
    "current_layout",
    "has_accelerator",
    "join_processes",
    "pick_engine_mesh",
    "prepare_engine",
    "prepare_platform",
    "resolve",
    "spare_devices",
]
