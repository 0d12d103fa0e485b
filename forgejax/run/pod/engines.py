"""The inference side of a job of several processes: an engine on every host, or servers elsewhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax

from forgejax.grammar import GrammarCompiler
from forgejax.learner import Learner
from forgejax.models import abstract_policy
from forgejax.rollout import Archive, Launch, PolicyEngine, ServerEngines
from forgejax.rollout.fleet.channel import Publication
from forgejax.run.config import TrainConfig
from forgejax.run.pod.host_engine import HostEngine
from forgejax.run.pod.lead import hand_over_everywhere
from forgejax.run.pod.leader import Leader
from forgejax.run.rundir import RunDir, read_history
from forgejax.sharding import Layout, Replicas, pick_engine_mesh

_TOKEN_ENV = "FORGEJAX_POD_TOKEN"
_LOOPBACK = "127.0.0.1"


def make_pod_engines(
    config: TrainConfig,
    place: RunDir,
    learner: Learner,
    step: int,
    *,
    leader: Leader,
    layout: Layout,
    launches: list[Launch],
    former: Archive,
    grammars: GrammarCompiler,
    stack: ExitStack,
) -> ServerEngines:
    """``ServerEngines`` over the engine of every host, or over those that ``rollout.engines`` names. ``layout``: the
    learner's. ``stack`` ends the engine of this host."""
    abstract = abstract_policy(config.policy)[1]
    mesh = pick_engine_mesh(config.rollout.mesh, len(jax.local_devices()))
    replicas = Replicas(mesh, layout, abstract)
    rollout = config.rollout
    prepare: Callable[[Any, int], Any]
    if rollout.engines == "local":
        folder = place.servers / f"attempt-{len(read_history(place.path))}"  # its logs are new: older ones are former
        own = HostEngine(
            PolicyEngine(config.policy, config.engine, replicas.engine),
            folder / "process-0" / "requests.log",
            host=_LOOPBACK,
            secret=leader.secret,
            grammars=grammars,
        )
        stack.enter_context(own)
        urls = (own.url, *leader.ask("serve", str(folder.absolute())))
        os.environ[_TOKEN_ENV] = leader.secret
        rollout = dataclasses.replace(rollout, engines=urls, mesh=type(mesh)(), token_env=_TOKEN_ENV)
        prepare = hand_over_everywhere(leader, lambda name, params, at: own.hand_over(name, replicas.take(params), at))
    else:

        def prepare(params: Any, version: int) -> Publication:
            leader.give("gather")
            return Publication(replicas.take(params), version, rollout.folder)

    return ServerEngines(
        rollout,
        learner.weights,
        step,
        request_deadline_s=config.engine.request_deadline_s,
        launches=launches,
        former=former,
        prepare=prepare,
    )
