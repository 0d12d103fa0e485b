"""What lies on each chip while a run goes on, counted from shapes: the same figures on any machine."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from forgejax.errors import MeshError
from forgejax.learner import OptimizerConfig, StepConfig
from forgejax.learner.step.optimizer import make_optimizer
from forgejax.models import PolicyConfig, abstract_policy
from forgejax.ops.paged.attention import count_kept_heads
from forgejax.run.config import TrainConfig
from forgejax.run.plan.chips import count_host_devices, describe_chips
from forgejax.sharding import EngineMesh, Layout, MeshConfig, MeshPlan, build_engine_mesh, build_mesh, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A configuration on its mesh: where weights, batches and engines lie, on chips that need not be there.

    Attributes:
        config: the run.
        plan: its mesh.
        learner: the learner's layout.
        engine: that of the engine on each host, over chips of one host; None where the engines are elsewhere.
        replica: where each host has all weights as they are published, to its own engine or to those elsewhere.
        hosts: how many the mesh has; each has an engine, over all its chips, where there are several.
    """

    config: TrainConfig
    plan: MeshPlan
    learner: Layout
    engine: Layout | None
    replica: Layout
    hosts: int

    @staticmethod
    def of(config: TrainConfig) -> Site:
        """Raises MeshError or ConfigError where something does not divide by the mesh."""
        plan = resolve(config.mesh)
        of_host = count_host_devices(plan)
        hosts = plan.devices // of_host
        learner = Layout(mesh=build_mesh(plan, describe_chips(plan)))
        local = config.rollout.engines == "local"
        own = pick_replica(config.rollout.mesh, of_host if hosts > 1 else 1)
        if local and plan.platform != "cpu" and own.devices not in (1, of_host if hosts > 1 else 1):
            raise MeshError(
                f"rollout.mesh takes {own.devices} devices and a host of {plan.name} has {of_host}, "
                f"{'all of them' if hosts > 1 else 'and the learner takes them all'}: leave rollout.mesh out, or "
                "set rollout.engines to the addresses of servers elsewhere"
            )
        replica = Layout(mesh=build_engine_mesh(own, _describe_host(plan)))
        engine = replica if local else None
        return Site(config=config, plan=plan, learner=learner, engine=engine, replica=replica, hosts=hosts)

    @property
    def abstract(self) -> tuple[Any, Any]:
        """The policy's structure, and its weights as shapes."""
        return _abstract(self.config.policy)

    @property
    def step_config(self) -> StepConfig:
        """The step of the whole run."""
        return self.config.step.ending_at(max(self.config.run.steps, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residents:
    """Bytes on each chip; ``replica`` are those of weights that are being published."""

    weights: int
    masters: int
    moments: int
    gradients: int
    engine: int
    replica: int
    page: int
    pages: int

    @property
    def pool(self) -> int:
        """The engine's keys and values."""
        return self.page * self.pages


def pick_replica(asked: EngineMesh, host_devices: int) -> EngineMesh:
    """The engine of each host: over all its devices where the job has several hosts and none was asked for."""
    return EngineMesh(tensor=host_devices) if asked == EngineMesh() and host_devices > 1 else asked


def count_residents(site: Site) -> Residents:
    """Raises MeshError where a weight does not divide by the mesh."""
    params, policy = site.abstract[1], site.config.policy
    weights = bytes_of(site.learner, params)
    narrow = jnp.dtype(policy.param_dtype)
    wide = jnp.promote_types(narrow, jnp.float32)
    masters = weights * wide.itemsize // narrow.itemsize
    passes = (
        site.engine is not None or site.hosts > 1
    )  # a single host reads weights for engines elsewhere off the chips
    replica = bytes_of(site.replica, params) if passes else 0
    return Residents(
        weights=weights if narrow != wide else 0,  # the masters themselves run where they are as wide
        masters=masters,
        moments=round(masters * _count_moments(policy, site.step_config.optimizer)),
        gradients=masters,
        engine=0 if site.engine is None else replica,
        replica=replica,
        page=0 if site.engine is None else count_page_bytes(site.config, site.engine),
        pages=0 if site.engine is None else site.config.engine.pool_pages,
    )


@functools.lru_cache(maxsize=8)
def _count_moments(policy: PolicyConfig, config: OptimizerConfig) -> float:
    """The optimizer's state over the masters, which are split alike."""
    wide = jax.eval_shape(
        lambda tree: jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree),
        _abstract(policy)[1],
    )
    state = jax.eval_shape(make_optimizer(config).init, wide)
    sizes = (sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (state, wide))
    return next(sizes) / next(sizes)


@functools.lru_cache(maxsize=8)
def _abstract(policy: PolicyConfig) -> tuple[Any, Any]:
    return abstract_policy(policy)


def bytes_of(layout: Layout, tree: Any) -> int:
    """What one device has of a tree of shapes."""
    leaves, places = jax.tree.leaves(tree), jax.tree.leaves(layout.placements(tree))
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )


def count_page_bytes(config: TrainConfig, engine: Layout) -> int:
    """Of one page of the pool, on each of the engine's devices."""
    axis = engine.axis("heads")
    shards = engine.devices(axis) if axis else 1
    heads = count_kept_heads(config.policy.num_kv_heads, shards) // shards
    each = heads * config.policy.head_size * jnp.dtype(config.policy.compute_dtype).itemsize
    return 2 * config.policy.num_layers * each * config.engine.page_tokens


def join_hosts(learner: Layout, replica: EngineMesh) -> Layout:
    """The replicas of all hosts as one layout, whose data axis counts the hosts; devices in the learner's order."""
    mesh = learner.mesh
    assert mesh is not None
    devices = mesh.devices.reshape(-1, 1, 1, replica.expert, replica.tensor)
    return Layout(mesh=Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types))


def _describe_host(plan: MeshPlan) -> tuple[Any, ...]:
    """The chips of one host, as a slice of their own: what an engine's programs are compiled for."""
    count = count_host_devices(plan) // plan.chip.devices_per_chip * plan.chip.counted_per_chip
    return describe_chips(resolve(MeshConfig(name=f"{plan.chip.name}-{count}")))
