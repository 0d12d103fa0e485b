"""What a rollout server is told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from forgejax.errors import ConfigError
from forgejax.models import PolicyConfig
from forgejax.rollout import EngineConfig
from forgejax.rollout.fleet.registry import check_address
from forgejax.rollout.server.access import check_exposure
from forgejax.sharding import EngineMesh
from forgejax.types import SamplingLaw


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A rollout server."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own loopback wants a token."""
    port: int = 8800
    """HTTP port (POST /generate, of token ids, GET /health, /ready and /metrics; docs/serving.md); 0 takes a free
    one."""
    grpc_port: int = 8802
    """Port of JetStream's Orchestrator service; 0 takes a free one."""
    token_env: str = "FORGEJAX_SERVER_TOKEN"
    """Environment variable with the token that requests must bring, as `Authorization: Bearer TOKEN`; where it is not
    set, anybody on this machine may ask."""
    run: Path | None = None
    """Folder of a run: its policy is served, from its checkpoint."""
    step: int | None = None
    """Checkpoint of the run; the newest if left out."""
    weights: Path | None = None
    """Bare weights of the policy given by --policy, instead of those at policy.path."""
    await_weights: bool = False
    """Begins without weights, as a trainer's server: it serves once a trainer has published some. With --run, engine
    settings are those of the run."""
    version: int | None = None
    """Policy version of the weights served first; the run's step, or 0, if left out."""
    seed: int = 0
    """Seed of random weights, served where none of run, weights and policy.path is given."""
    device: int = 0
    """Index of the device the engine runs on, the first where it is split over several."""
    mesh: EngineMesh = field(default_factory=EngineMesh)
    """Over how many devices the engine is split."""
    weights_gib: float | None = None
    """Device memory that weights may take. Less than twice their size: new ones take the place of those that serve,
    while requests wait; else (and if left out) they are loaded beside them and swapped between two decode steps."""
    publish_root: Path | None = None
    """Directory below which POST /publish may load new weights, bare ones or runs/NAME/checkpoints/STEP, and a trainer
    leave them; without it they come over HTTP alone."""
    tokenizer: Path | None = None
    """Tokenizer folder of the policy; requests with a grammar or stop strings are refused without it. With --run it is
    the run's."""
    request_log: Path | None = None
    """File that keeps the ids of every request."""
    drain_s: float = 30.0
    """How long open requests may take to end after SIGTERM or Ctrl-C, while new ones are refused."""
    register: str = ""
    """Address of a trainer that takes servers, its rollout.register_at, as http://HOST:PORT: it is told of this server
    again and again, with the token, from when this listens."""
    announce: str = ""
    """Address that a trainer is told, if it is not http://HOST:PORT of this server's own."""
    address_file: Path | None = None
    """File to write the HTTP address into once it listens."""
    leashed: bool = False
    """Ends when its stdin is closed, and leaves SIGTERM and Ctrl-C to the process that started it."""
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
        if self.step is not None and (self.run is None or self.await_weights):
            raise ConfigError(f"step {self.step} was given without a run to load it from; name its folder with --run")
        if self.await_weights and self.weights is not None:
            raise ConfigError("weights were given together with await-weights; leave one of them out")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        if not self.drain_s >= 0:
            raise ConfigError(f"drain_s is {self.drain_s}; expected 0 or a time in seconds")
        if self.weights_gib is not None and not self.weights_gib > 0:
            raise ConfigError(f"weights_gib is {self.weights_gib}; expected a positive size")
        check_exposure(self.host, self.token)
        self._check_registration()
        try:
            SamplingLaw(temperature=self.grpc_temperature)
        except ValueError as error:
            raise ConfigError(f"grpc_temperature: {error}") from error

    def _check_registration(self) -> None:
        if self.announce and not self.register:
            raise ConfigError(f'announce "{self.announce}" was given without a trainer to tell it; give --register')
        for url in filter(None, (self.register, self.announce)):
            check_address(url)
        if self.register and not self.announce and self.host in ("0.0.0.0", "::"):
            raise ConfigError(f"host {self.host} is no address that a trainer could ask; name it with --announce")

    @property
    def token(self) -> str:
        """The token that requests must bring; "" for none."""
        return os.environ.get(self.token_env, "")
