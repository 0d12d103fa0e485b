"""What is checked before a run costs anything or leaves anything behind: each refusal says what to set."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
import os
import re
import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from forgejax.agents import AgentConfig, make_scaffold
from forgejax.agents.scaffolds.children import find_program, quote_command
from forgejax.chat import ChatFormat
from forgejax.environments import Environment, make_environment
from forgejax.errors import AgentError, ConfigError, ForgejaxError, MeshError
from forgejax.learner import lay_empty
from forgejax.models import PolicyConfig, abstract_policy, check_weights, count_params
from forgejax.ops import Kernel, kernel_for
from forgejax.rollout import EngineConfig, RolloutConfig
from forgejax.run.config import TrainConfig, to_mapping
from forgejax.run.rundir import Attempt, list_changes
from forgejax.run.warm_start import make_demonstrations
from forgejax.sharding import (
    ALONE,
    EngineMesh,
    Layout,
    MeshPlan,
    Processes,
    build_engine_mesh,
    build_mesh,
    check_share,
    pick_engine_mesh,
    prepare_platform,
    resolve,
    spare_devices,
)

_CPU_DEVICES = 64  # fake ones: each brings threads of its own
_GIB = 2**30
_JOURNAL_BYTES = 2**26  # of disk, for journal, log and figures of a short run
_OWN_FILES = 128  # open at once besides those of the episodes: libraries, checkpoints being written, journal and log
_FILES_OF_EPISODE = {"process": 6, "worker": 2, "coroutine": 3}  # pipes, and a connection's ends in this process
_FILES_OF_WORKER = 4
_MOMENT_BYTES = 4  # of each of the optimizer's two figures a weight, and of its gradient


_IN_ORDER = "--xla_gpu_deterministic_ops"
_KEPT = (
    "policy.",
    "tasks.",
    "run.seed",
    "run.name",
    "run.deterministic",
)  # of a run: its parameters and all that they were trained on
_MAY_MOVE = ("policy.path", "policy.compute_dtype")


def check_run(config: TrainConfig, folder: Path, *, fresh: bool, processes: Processes = ALONE) -> None:
    """All that can be known of a run before it is made; the cheapest first, at last the agent program itself.

    Args:
        config: what is to run.
        folder: where its files will lie; it need not exist.
        fresh: whether it begins with its first weights, or goes on from a checkpoint.
        processes: this one among those of the job.

    Raises:
        ForgejaxError: it cannot be run, and why.
    """
    plan = resolve(config.mesh)
    check_repeatable(config, plan, os.environ.get("XLA_FLAGS", ""))
    check_servers(config.rollout, plan)
    check_memory(config, plan, find_memory())
    check_disk(config, folder, fresh=fresh)
    allow_open_files(config)
    check_mesh(config, processes)
    chat, environment = load_chat(config), make_environment(config.tasks)
    if fresh:
        check_beginning(config, environment, chat)
    check_sandbox(config)
    check_agent(config.agent)


def check_resumed(before: Mapping[str, Any], config: TrainConfig, attempts: Sequence[Attempt], tokenizer: str) -> None:
    """Raises ConfigError where a run would go on with another policy, other tasks, another seed, name or tokenizer.

    Args:
        before: the configuration that is saved in the run.
        config: the one it would go on with.
        attempts: the run's history.
        tokenizer: what ``digest_tokenizer`` says of it now.
    """
    changes = list_changes(before, to_mapping(config))
    refused = [key for key in changes if key.startswith(_KEPT) and key not in _MAY_MOVE]
    if refused:
        told = ", ".join(f"{key} ({json.dumps(changes[key][0])} so far)" for key in refused)
        raise ConfigError(
            f"a resumed run keeps its policy, tasks, seed, name and run.deterministic, and this would change {told}; "
            "leave it as it is, or start a new run"
        )
    begun = attempts[0].tokenizer if attempts else ""
    if begun and tokenizer != begun and Path(config.tokenizer_folder).is_dir():  # else it is told that it is missing
        raise ConfigError(
            f"the tokenizer in {config.tokenizer_folder} is not the one this run began with: its files differ; bring "
            "those back, or start a new run"
        )


def digest_tokenizer(folder: str) -> str:
    """What tells a tokenizer from others: a digest of its files and its chat template."""
    files = [file for pattern in ("tokenizer*", "chat_template*") for file in sorted(Path(folder).glob(pattern))]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def check_sandbox(config: TrainConfig) -> None:
    """Raises ConfigError where tasks are done in a sandbox and the agent would run outside of it, or where it could not
    reach them at all."""
    agent, tasks = config.agent, config.tasks
    if tasks.kind == "openenv" and agent.kind != "coroutine":
        raise ConfigError(
            f'agent.kind is "{agent.kind}" with tasks.kind "openenv", whose moves and tools no program can reach; set '
            'agent.kind = "coroutine" and agent.function = "forgejax.agents.white_box.player:play"'
        )
    outside = tasks.kind in ("reasoning_gym", "openenv") or tasks.sandbox.kind == "none"
    if outside or (agent.kind == "process" and not agent.preload):
        return
    given = "agent.preload" if agent.preload else f'agent.kind "{agent.kind}"'
    raise ConfigError(
        f'{given} with tasks.sandbox.kind "{tasks.sandbox.kind}": such a program is started before its episode and '
        'outside of its sandbox; set agent.kind = "process" without preload, or tasks.sandbox.kind = "none"'
    )


def check_repeatable(config: TrainConfig, plan: MeshPlan, xla_flags: str) -> None:
    """Raises ConfigError where a run is to be deterministic on GPUs whose programs may add in any order."""
    if config.run.deterministic and plan.platform == "gpu" and f"{_IN_ORDER}=true" not in xla_flags.split():
        raise ConfigError(
            f"run.deterministic is true and mesh {plan.name} is of GPUs, whose programs add in the order in which "
            f"their threads come; set XLA_FLAGS={_IN_ORDER}=true in the environment, or leave run.deterministic out"
        )


def check_servers(config: RolloutConfig, plan: MeshPlan) -> None:
    """Raises ConfigError where the trainer would start servers that find all devices taken by itself."""
    if isinstance(config.engines, int) and plan.platform != "cpu":
        raise ConfigError(
            f"rollout.engines is {config.engines} and the mesh {plan.name} holds this machine's devices: servers that "
            "the trainer starts run on a CPU; start scripts/serve.py --await-weights on devices of its own, and give "
            "its address as rollout.engines, or leave it at local"
        )


def check_memory(config: TrainConfig, plan: MeshPlan, host_bytes: int) -> None:
    """Raises ConfigError where the policy, the engine's pages or the rows alone take more memory than there is.

    What is counted is what no setting can avoid, so a run that passes may still need more than there is.
    """
    learner, mesh = _count_learner_bytes(config, plan), config.rollout.mesh
    engine = _count_engine_bytes(config.policy, config.engine, mesh)
    servers = config.rollout.engines
    if isinstance(servers, int):
        engine = {f"{name}, in rollout.engines {servers} servers": size * servers for name, size in engine.items()}
    if isinstance(servers, tuple):
        engine = {}  # elsewhere
    if plan.platform == "cpu":
        parts = {name: size * plan.devices for name, size in learner.items()}
        parts |= {name: size * mesh.devices for name, size in engine.items()}
        _require_memory(parts, host_bytes, "this machine")
    elif plan.chip.hbm_bytes is not None:
        _require_memory(learner, plan.chip.hbm_bytes, f"a device of {plan.name}")
        _require_memory(engine, plan.chip.hbm_bytes, f"a device of {plan.name}")


def check_engine_memory(
    policy: PolicyConfig, engine: EngineConfig, mesh: EngineMesh, *, there: int, place: str
) -> None:
    """Raises ConfigError where what an engine has of weights and pages on a device is more than ``there`` bytes."""
    _require_memory(_count_engine_bytes(policy, engine, mesh), there, place)


def find_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or what it is limited to."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        found.append(int(text))
    return min(size for size in found if size != resource.RLIM_INFINITY)


def check_disk(config: TrainConfig, folder: Path, *, fresh: bool) -> None:
    """Raises ConfigError where the disk has no room for the checkpoints of a new run, or for one more of an old one."""
    every = config.run.checkpoint_every
    saves = 1 + (config.run.steps // every if every else 0)
    weights = count_params(abstract_policy(config.policy)[1])
    each = weights * (jnp.dtype(config.policy.param_dtype).itemsize + 2 * _MOMENT_BYTES)
    number = min(saves, config.run.keep_checkpoints + 1) if fresh else 1  # the oldest goes once the newest is there
    needed = number * each + _JOURNAL_BYTES
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise ConfigError(f"the disk of {there} cannot be looked at: {error}; set --run.root") from error
    if free < needed:
        raise ConfigError(
            f"{folder} needs {needed / _GIB:.2g} GiB for {number} checkpoints and the journal at least, and its disk "
            f"has {free / _GIB:.2g} GiB free; make room there, set --run.root to another disk, or lower "
            "run.keep_checkpoints"
        )


def allow_open_files(config: TrainConfig) -> None:
    """Raises this process's limit of open files to what its episodes take.

    Raises ConfigError where the system does not allow as many.
    """
    workers = config.agent.workers * _FILES_OF_WORKER if config.agent.kind == "worker" else 0
    needed = _OWN_FILES + workers + config.episodes_at_once * _FILES_OF_EPISODE[config.agent.kind]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"{config.episodes_at_once} episodes at once of kind {config.agent.kind} take about {needed} open files, "
            f"and this process may have {hard}; raise the limit (ulimit -n {needed}), or lower "
            "pool.window.in_flight, run.group_size and run.eval_concurrency"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_mesh(config: TrainConfig, processes: Processes = ALONE) -> None:
    """Raises MeshError for a mesh that these processes cannot give, and ConfigError for rows or heads that the kernel
    of its devices cannot attend with: at once, before anything is created for the run."""
    plan = resolve(config.mesh)
    if plan.platform == "cpu" and plan.devices > _CPU_DEVICES:
        raise MeshError(
            f"mesh {plan.name} asks for {plan.devices} fake devices on this machine's CPU; expected {_CPU_DEVICES} at "
            f"most, as cpu-{_CPU_DEVICES}"
        )
    if processes.count > 1:
        check_share(processes, plan)
    else:
        prepare_platform(plan, extra_devices=config.rollout.mesh.devices)
    mesh = build_mesh(plan)
    check_kernel(kernel_for(mesh), config)
    if processes.count > 1:
        pick_engine_mesh(config.rollout.mesh, len(jax.local_devices()))
    elif config.rollout.engines == "local":
        lay_engine(config.rollout.mesh, mesh)


def lay_engine(config: EngineMesh, mesh: Mesh) -> Layout:
    """Where a run's own engine lies: outside the learner's mesh, for then their programs need not wait for each other.

    Where the mesh leaves too few devices free, it shares the mesh's first, ``Layout.shared`` if it has several: an
    engine of one device has no collectives. Raises MeshError where there are too few in all.
    """
    spare = spare_devices(mesh)
    if len(spare) >= config.devices:
        return Layout(mesh=build_engine_mesh(config, spare))
    if mesh.size < config.devices:
        raise MeshError(
            f"rollout.mesh takes {config.devices} devices and the learner's mesh has {mesh.size}; choose a larger "
            "--mesh, or a smaller rollout.mesh"
        )
    return Layout(mesh=build_engine_mesh(config, list(mesh.devices.flat)), shared=config.devices > 1)


def check_kernel(kernel: Kernel, config: TrainConfig) -> None:
    """Raises ConfigError, with what to set, where the learner could not attend with this kernel."""
    rows_of_a_device = lay_empty(config.packing).batches[0].attention
    try:
        kernel.check(rows_of_a_device, jnp.dtype(config.policy.compute_dtype), config.policy.head_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_chat(config: TrainConfig) -> ChatFormat:
    """The tokenizer and chat template of a run. Raises ConfigError where the policy has fewer tokens than they."""
    chat = ChatFormat.load(config.tokenizer_folder)
    if chat.vocab_size > config.policy.vocab_size:
        raise ConfigError(
            f"the tokenizer in {config.tokenizer_folder} has {chat.vocab_size} tokens and policy.vocab_size is "
            f"{config.policy.vocab_size}; raise it to at least that"
        )
    return chat


def check_beginning(config: TrainConfig, environment: Environment, chat: ChatFormat) -> None:
    """What a run begins with: weights in ``policy.path``, and a demonstrator that makes its first demonstration.

    Raises ForgejaxError where one of them cannot be had.
    """
    if config.policy.path:
        check_weights(config.policy)
    if not config.warm_start.steps:
        return
    demonstrations = make_demonstrations(config.warm_start, environment, chat, config.run.seed)
    try:
        demonstrations.samples(0)
    except ForgejaxError:
        raise
    except Exception as error:  # a boundary: the demonstrator is the user's code
        raise ConfigError(
            f"warm_start.demonstrator {config.warm_start.demonstrator} could not make the first demonstration: "
            f"{type(error).__name__}: {error}; correct it, or its warm_start.options"
        ) from error


def check_agent(config: AgentConfig) -> None:
    """Raises ConfigError or AgentError where the agent's function or program is not there, or a worker of it does not
    start: one is started and ended again."""
    make_scaffold(config)
    if config.kind == "coroutine":
        return
    try:
        find_program(config.command)
    except AgentError as error:
        if not config.recipe:
            raise
        raise AgentError(
            f'{error}; what a recipe needs is installed by: make scaffolds ARGS="{config.recipe}"'
        ) from error
    script = config.command[1] if len(config.command) > 1 else "-"
    by_python = re.fullmatch(r"python[\d.]*", Path(config.command[0]).name) is not None
    if by_python and not script.startswith("-") and "{" not in script and not Path(script).exists():
        raise ConfigError(
            f"agent command {quote_command(config.command)}: there is no file {script} in {Path.cwd()}; correct it, or "
            "give its full path"
        )
    if config.kind == "worker":
        asyncio.run(_start_once(dataclasses.replace(config, workers=1)))


async def _start_once(config: AgentConfig) -> None:
    scaffold = make_scaffold(config)
    try:
        await scaffold.start()
    finally:
        await scaffold.close()


def _count_learner_bytes(config: TrainConfig, plan: MeshPlan) -> dict[str, int]:
    """Bytes on each device of the mesh, by what they are for."""
    policy, rows = config.policy, config.packing
    params = abstract_policy(policy)[1]
    shards = plan.fsdp * plan.tensor * (plan.expert if policy.moe.num_experts else 1)
    number, width = count_params(params), jnp.dtype(policy.param_dtype).itemsize
    stream = rows.rows * rows.row_length * policy.d_model * jnp.dtype(policy.compute_dtype).itemsize
    return {
        f"{number:,} weights, their gradient and the optimizer ([policy])": (
            number * (width + 3 * _MOMENT_BYTES) // shards
        ),
        f"packing.rows {rows.rows} of packing.row_length {rows.row_length}": stream // (plan.context * plan.tensor),
    }


def _count_engine_bytes(policy: PolicyConfig, engine: EngineConfig, mesh: EngineMesh) -> dict[str, int]:
    """Bytes on each device of an engine, by what they are for."""
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_policy(policy)[1]))
    of_token = 2 * policy.num_layers * max(policy.num_kv_heads // mesh.tensor, 1) * policy.head_size
    pages = of_token * engine.page_tokens * engine.pool_pages * jnp.dtype(policy.compute_dtype).itemsize
    asked = f"engine.kv_pages {engine.kv_pages}"
    derived = f"engine.slots {engine.slots} of engine.max_context {engine.max_context} (engine.kv_pages bounds it)"
    return {"the engine's copy of the weights": weights // mesh.devices, asked if engine.kv_pages else derived: pages}


def _require_memory(parts: dict[str, int], there: int, place: str) -> None:
    if (needed := sum(parts.values())) <= there:
        return
    largest = sorted(parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{size / _GIB:,.1f} GiB for {name}" for name, size in largest if size > needed / 20)
    raise ConfigError(
        f"this needs {needed / _GIB:,.1f} GiB of memory at least, and {place} has {there / _GIB:,.1f} GiB: {told}; "
        "make that smaller, or choose a mesh with more memory"
    )
