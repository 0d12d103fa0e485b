"""Serves a policy, token ids in and token ids out, over HTTP and over JetStream's gRPC service.

python scripts/serve.py --policy.path models/SmolLM2-135M       a Hugging Face folder, or a .gguf file
python scripts/serve.py --run runs/quickstart-1 --step 120      what a run has trained; without --step the newest
python scripts/serve.py --weights weights --policy.num-layers 2 bare weights, and the policy they belong to
"""

from __future__ import annotations

import asyncio
import signal
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import jax
import tyro
from aiohttp import web

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError, EngineError, ForgejaxError
from forgejax.grammar import GrammarCompiler
from forgejax.models import Params, PolicyConfig, abstract_policy, init_params, read_policy_config
from forgejax.models import load_params as load_pretrained
from forgejax.rollout import Driver, EngineConfig, PolicyEngine, RequestLog, make_warm_ups
from forgejax.rollout.engine._jetstream import jetstream_pb2_grpc
from forgejax.rollout.server.grpc_service import OrchestratorService
from forgejax.rollout.server.http import Publishing, RolloutServer
from forgejax.run import rundir
from forgejax.run.checkpoint import load_trained, load_tree
from forgejax.run.config import load_saved
from forgejax.run.preflight import check_engine_memory, find_memory
from forgejax.types import SamplingLaw

_WARM_UP_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A rollout server."""

    host: str = "127.0.0.1"
    """Address to listen on. The server has no authentication: keep it on a private network."""
    port: int = 8800
    """HTTP port (POST /generate, of token ids, GET /health, GET /metrics, POST /publish); 0 takes a free one."""
    grpc_port: int = 8802
    """Port of JetStream's Orchestrator service; 0 takes a free one."""
    run: Path | None = None
    """Folder of a run: its policy is served, from its checkpoint."""
    step: int | None = None
    """Checkpoint of the run; the newest if left out."""
    weights: Path | None = None
    """Bare weights of the policy given by --policy, instead of those at policy.path."""
    version: int | None = None
    """Policy version of the weights served first; the run's step, or 0, if left out."""
    seed: int = 0
    """Seed of random weights, served where none of run, weights and policy.path is given."""
    device: int = 0
    """Index of the device the engine runs on."""
    publish_root: Path | None = None
    """Directory below which POST /publish may load new weights, bare ones or runs/NAME/checkpoints/STEP; without it
    they are refused."""
    tokenizer: Path | None = None
    """Tokenizer folder of the policy; requests with a grammar are refused without it."""
    request_log: Path | None = None
    """File that keeps the ids of every request."""
    grpc_stop_ids: tuple[int, ...] = ()
    """Ids that end a gRPC generation (its protocol cannot carry any)."""
    grpc_temperature: float = 1.0
    """Sampling temperature of gRPC requests."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a port from 1 to 65535, or 0 for a free one")
        if self.run is not None and (self.weights is not None or self.policy != PolicyConfig()):
            raise ConfigError("run was given together with weights or policy; a run brings its own, so leave them out")
        if self.step is not None and self.run is None:
            raise ConfigError(f"step {self.step} was given without a run; name the run's folder with --run")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        try:
            SamplingLaw(temperature=self.grpc_temperature)
        except ValueError as error:
            raise ConfigError(f"grpc_temperature: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Served:
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


def load_served(config: ServeConfig) -> Served:
    """The policy with its weights. Raises ForgejaxError."""
    policy = find_policy(config)
    if config.run is not None:
        step, params = load_trained(rundir.checkpoints_of(config.run), config.step, abstract_policy(policy)[1])
        return Served(policy=policy, params=params, version=step if config.version is None else config.version)
    if config.weights is not None:
        params = load_tree(config.weights, abstract_policy(policy)[1])
    elif policy.path:
        params = load_pretrained(policy)
    else:
        params = init_params(policy, seed=config.seed)
    return Served(policy=policy, params=params, version=config.version or 0)


def make_driver(config: ServeConfig) -> Driver:
    """The driver, not yet started. Raises ForgejaxError for what cannot be served."""
    devices = jax.devices()
    if not 0 <= config.device < len(devices):
        raise ConfigError(f"device {config.device} was asked for; this machine has 0 to {len(devices) - 1}")
    device = devices[config.device]
    there = find_memory() if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    if there is not None:
        check_engine_memory(find_policy(config), config.engine, there, f"device {config.device}")
    served = load_served(config)
    engine = PolicyEngine(served.policy, config.engine, device)
    grammars = None
    if config.tokenizer is not None:
        grammars = GrammarCompiler(ChatFormat.load(config.tokenizer).codec.spell_vocabulary())
    log = RequestLog(config.request_log) if config.request_log is not None else None
    return Driver(engine, served.params, served.version, log, grammars)


async def serve(config: ServeConfig, stop: asyncio.Event) -> None:
    """Serves until ``stop`` is set."""
    driver = make_driver(config)
    law = SamplingLaw(temperature=config.grpc_temperature)
    service = OrchestratorService(driver, law=law, stop_ids=frozenset(config.grpc_stop_ids))
    publishing = None if config.publish_root is None else Publishing(root=config.publish_root, read=load_tree)
    runner = web.AppRunner(RolloutServer(driver, publishing).make_app(), handler_cancellation=True)
    grpc_server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))  # a second one would share the port in silence
    jetstream_pb2_grpc.add_OrchestratorServicer_to_server(service, grpc_server)
    try:
        grpc_port = await _listen(config, runner, grpc_server)
        port = runner.addresses[0][1]
        driver.start()
        print("compiling the engine's programs ...", flush=True)
        if await _warm_up(driver, config.engine, stop):
            print(f"serving http://{config.host}:{port} and grpc {config.host}:{grpc_port}", flush=True)
            await stop.wait()
    finally:
        try:
            await asyncio.to_thread(driver.stop)
        finally:
            await grpc_server.stop(grace=1.0)
            await runner.cleanup()
            if driver.request_log is not None:
                driver.request_log.close()


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


async def _warm_up(driver: Driver, config: EngineConfig, stop: asyncio.Event) -> bool:
    """Has every program compiled, so that no request waits for it; False where ``stop`` came first."""
    stopped = asyncio.create_task(stop.wait())
    for batch in make_warm_ups(config, uuid.uuid4().hex, grammars=driver.grammars is not None):
        drawn = asyncio.gather(*(asyncio.wrap_future(driver.submit(request)) for request in batch))
        waits: set[asyncio.Future[Any]] = {drawn, stopped}
        await asyncio.wait(waits, timeout=_WARM_UP_S, return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            drawn.cancel()
            if not stopped.done():
                raise EngineError(
                    f"the engine has not compiled its programs within {_WARM_UP_S:g} s; its log says more"
                )
            return False
        await drawn
    stopped.cancel()
    return True


async def _serve_until_signal(config: ServeConfig) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await serve(config, stop)


def main() -> int:
    try:
        asyncio.run(_serve_until_signal(tyro.cli(ServeConfig, description=__doc__)))
    except (ForgejaxError, OSError, RuntimeError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
