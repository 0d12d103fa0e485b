"""Serves a policy, token ids in and token ids out, over HTTP and over JetStream's gRPC service.

- ``python scripts/serve.py --policy.path models/SmolLM2-135M`` serves a Hugging Face folder, or a .gguf file;
- ``python scripts/serve.py --run runs/quickstart-1 --step 120`` what a run has trained, without --step the newest;
- ``python scripts/serve.py --weights weights --policy.num-layers 2`` bare weights, and the policy they belong to;
- ``python scripts/serve.py --policy.vocab-size 640 --tokenizer examples/quickstart/tokenizer`` random weights, to try
  programs against.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc  # type: ignore[import-untyped]
import jax
import tyro
from aiohttp import web

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError, ForgejaxError
from forgejax.grammar import GrammarCompiler
from forgejax.models import Params, PolicyConfig, abstract_policy, init_params, read_policy_config
from forgejax.models import load_params as load_pretrained
from forgejax.report.storage import write_atomic
from forgejax.rollout import PolicyEngine, RequestLog
from forgejax.rollout.engine._jetstream import jetstream_pb2_grpc
from forgejax.rollout.server.access import BearerInterceptor, make_bearer_check
from forgejax.rollout.server.admin import PublishRoot
from forgejax.rollout.server.announcer import announce
from forgejax.rollout.server.grpc_service import OrchestratorService
from forgejax.rollout.server.http import RolloutServer
from forgejax.rollout.server.leash import hold_to_parent
from forgejax.rollout.server.served import ServedEngine
from forgejax.run import rundir
from forgejax.run.checkpoint import load_trained, load_tree
from forgejax.run.config import load_saved
from forgejax.run.preflight import check_engine_memory, find_memory
from forgejax.run.serving.options import ServeConfig
from forgejax.sharding import Layout, build_engine_mesh, prepare_engine
from forgejax.types import SamplingLaw

_GIB = 2**30
_QUIET_S = 15.0


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy, its weights and their version."""

    policy: PolicyConfig
    params: Params
    version: int


def find_policy(config: ServeConfig) -> PolicyConfig:
    """The policy that the configuration names. Raises ForgejaxError."""
    if config.run is not None:
        # The saved configuration is complete: the folder that the run began with may be gone.
        return load_saved(rundir.saved_config(config.run), str(config.run)).policy
    return read_policy_config(config.policy.path, config.policy) if config.policy.path else config.policy


def load_served(config: ServeConfig) -> LoadedPolicy:
    """The policy with its weights. Raises ForgejaxError."""
    policy = find_policy(config)
    if config.run is not None:
        step, params = load_trained(rundir.checkpoints_of(config.run), config.step, abstract_policy(policy)[1])
        return LoadedPolicy(policy=policy, params=params, version=step if config.version is None else config.version)
    if config.weights is not None:
        params = load_tree(config.weights, abstract_policy(policy)[1])
    elif policy.path:
        params = load_pretrained(policy)
    else:
        params = init_params(policy, seed=config.seed)
    return LoadedPolicy(policy=policy, params=params, version=config.version or 0)


def make_engine(config: ServeConfig) -> PolicyEngine:
    """The engine, without weights. Raises ForgejaxError for what cannot be served."""
    if config.mesh.devices > 1:
        prepare_engine(config.device + config.mesh.devices)
    devices = jax.devices()
    if not 0 <= config.device < len(devices):
        raise ConfigError(f"device {config.device} was asked for; this machine has 0 to {len(devices) - 1}")
    mesh = build_engine_mesh(config.mesh, devices[config.device :])
    device = devices[config.device]
    there = find_memory() if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    settings = config.engine
    if config.await_weights and config.run is not None:
        settings = load_saved(rundir.saved_config(config.run), str(config.run)).engine
    policy = find_policy(config)
    if there is not None:
        check_engine_memory(policy, settings, config.mesh, there=there, place=f"device {config.device}")
    return PolicyEngine(policy, settings, Layout(mesh=mesh))


def make_served(config: ServeConfig) -> ServedEngine:
    """What is served, without weights. Raises ForgejaxError for what cannot be served."""
    engine = make_engine(config)
    log = RequestLog(config.request_log) if config.request_log is not None else None
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.abstract_params))
    if config.weights_gib is not None and size > config.weights_gib * _GIB:
        raise ConfigError(
            f"weights_gib is {config.weights_gib:g} and the policy has {size / _GIB:.2g} GiB of weights; raise it"
        )
    beside = config.weights_gib is None or 2 * size <= config.weights_gib * _GIB
    return ServedEngine(engine, log, beside=beside, grammars=_make_grammars(config))


def _make_grammars(config: ServeConfig) -> GrammarCompiler | None:
    """Masks of the policy's vocabulary, where it is known. Raises ForgejaxError."""
    folder = None if config.tokenizer is None else str(config.tokenizer)
    if folder is None and config.run is not None:
        folder = load_saved(rundir.saved_config(config.run), str(config.run)).tokenizer_folder
    return None if folder is None else GrammarCompiler(ChatFormat.load(folder).codec.spell_vocabulary())


async def serve(config: ServeConfig, end: asyncio.Event) -> None:
    """Serves until ``end`` is set, and drains."""
    served = make_served(config)
    law = SamplingLaw(temperature=config.grpc_temperature)
    service = OrchestratorService(served, law=law, stop_ids=frozenset(config.grpc_stop_ids))
    root = None if config.publish_root is None else PublishRoot(root=config.publish_root, read=load_tree)
    checks = [make_bearer_check(config.token)] if config.token else []
    runner = web.AppRunner(RolloutServer(served, root).make_app(*checks), handler_cancellation=True)
    grpc_server = grpc.aio.server(
        options=(("grpc.so_reuseport", 0),),  # a second one would share the port in silence
        interceptors=[BearerInterceptor(config.token)] if config.token else [],
    )
    jetstream_pb2_grpc.add_OrchestratorServicer_to_server(service, grpc_server)
    announcing: asyncio.Task[None] | None = None
    try:
        grpc_port = await _listen(config, runner, grpc_server)
        address = f"http://{config.host}:{runner.addresses[0][1]}"
        if config.address_file is not None:
            write_atomic(config.address_file, address.encode())
        if config.register:
            announcing = asyncio.create_task(announce(config.register, config.announce or address, config.token))
        if config.await_weights:
            print(f"waiting for weights at {address}", flush=True)
            await served.start(end)
        else:
            async with _tell("loading the weights"):
                loaded = await asyncio.to_thread(load_served, config)
                await served.publish(loaded.params, loaded.version, "", idle_s=0.0)
            async with _tell("compiling the engine's programs"):
                await served.start(end)
        if not end.is_set():
            print(f"serving {address} and grpc {config.host}:{grpc_port}", flush=True)
            await end.wait()
        print(f"stopping: new requests are refused, open ones have {config.drain_s:g} s to end", flush=True)
        if cut_off := await served.drain(config.drain_s):
            print(f"{cut_off} requests are cut off after {config.drain_s:g} s", flush=True)
    finally:
        try:
            if announcing is not None:
                announcing.cancel()
            await served.stop()
        finally:
            await grpc_server.stop(grace=1.0)
            await runner.cleanup()
            if served.request_log is not None:
                served.request_log.close()


@contextlib.asynccontextmanager
async def _tell(what: str) -> AsyncIterator[None]:
    """Says that this goes on, and says it again where it takes long."""

    async def repeat() -> None:
        for times in itertools.count(1):
            await asyncio.sleep(_QUIET_S)
            print(f"{what}, for {times * _QUIET_S:g} s so far", flush=True)

    print(f"{what} ...", flush=True)
    telling = asyncio.create_task(repeat())
    try:
        yield
    finally:
        telling.cancel()


async def _listen(config: ServeConfig, runner: web.AppRunner, grpc_server: grpc.aio.Server) -> int:
    """Opens both ports and gives the one of gRPC. Raises ConfigError with the option that names another."""
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        raise ConfigError(_word_refusal("port", config.host, config.port, error)) from error
    try:
        grpc_port: int = grpc_server.add_insecure_port(f"{config.host}:{config.grpc_port}")
    except RuntimeError as error:
        raise ConfigError(_word_refusal("grpc-port", config.host, config.grpc_port, error)) from error
    await grpc_server.start()
    return grpc_port


def _word_refusal(option: str, host: str, port: int, error: Exception) -> str:
    return (
        f"nothing can listen at {host}:{port}: {error}; where another program has it, give another port with "
        f"--{option}, 0 for a free one, or another address of this machine with --host"
    )


async def _serve_until_told(config: ServeConfig) -> None:
    end = asyncio.Event()
    if config.leashed:
        hold_to_parent(end)
    else:
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, end.set)
    await serve(config, end)


def run_server() -> int:
    """The entry point of ``scripts/serve.py``."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve_until_told(tyro.cli(ServeConfig, prog="serve.py", description=__doc__)))
    except (ForgejaxError, OSError, RuntimeError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_server())
