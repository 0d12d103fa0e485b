"""Where the engines of a run are, and how long they may take for what."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from forgejax.errors import ConfigError
from forgejax.rollout.server.access import check_exposure
from forgejax.sharding import EngineMesh


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """``engines``: "local", one in the trainer's process; a number, as many server processes on this machine, which the
    trainer starts and ends; or the addresses of servers (``scripts/serve.py``) elsewhere, to which those come that say
    to ``register_at``, a HOST:PORT of the trainer's, that they are there: with it there may be no address. ``mesh``:
    over how many devices each of the trainer's own engines is split, beside the learner's mesh.

    The others concern servers alone, who are asked every ``poll_s``. One that gives no sign of life for ``silence_s``
    is taken to be lost: its requests go elsewhere. The trainer's own are then killed and started again,
    ``max_restarts`` times each; those elsewhere may come back by themselves. Either may take ``start_s`` until it
    serves. New weights go over HTTP, or where ``weights_folder`` is set through that folder, which every server sees
    under the same path and was started with as its publish directory; ``publish_s`` bounds that. ``token_env`` names
    the environment variable with the servers' token.
    """

    engines: Literal["local"] | int | tuple[str, ...] = "local"
    register_at: str = ""
    mesh: EngineMesh = field(default_factory=EngineMesh)
    weights_folder: str = ""
    publish_s: float = 600.0
    poll_s: float = 0.5
    silence_s: float = 20.0
    start_s: float = 1800.0
    max_restarts: int = 3
    token_env: str = "FORGEJAX_SERVER_TOKEN"

    def __post_init__(self) -> None:
        for name in ("publish_s", "poll_s", "silence_s", "start_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}; expected a positive time")
        if self.max_restarts < 0:
            raise ConfigError(f"rollout.max_restarts is {self.max_restarts}; expected 0 or more")
        if isinstance(self.engines, int) and self.engines < 1:
            raise ConfigError(f"rollout.engines is {self.engines}; expected 1 or more, addresses, or local")
        if isinstance(self.engines, tuple) and self.mesh != EngineMesh():
            raise ConfigError("rollout.mesh is that of the trainer's own engines; give servers elsewhere --mesh theirs")
        if self.poll_s >= self.silence_s:
            raise ConfigError(f"rollout.poll_s {self.poll_s} must be shorter than rollout.silence_s {self.silence_s}")
        if self.register_at:
            self._check_registration()
        if not isinstance(self.engines, tuple):
            return
        if not (self.engines or self.register_at) or len(set(self.engines)) != len(self.engines):
            raise ConfigError(
                f"rollout.engines is {list(self.engines)}; expected different addresses, one at least, or "
                "rollout.register_at for servers to say theirs"
            )
        for url in self.engines:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ConfigError(f'rollout.engines has "{url}"; expected an address such as http://10.0.0.7:8800')

    def _check_registration(self) -> None:
        if not isinstance(self.engines, tuple):
            raise ConfigError(
                f"rollout.register_at is for servers elsewhere and rollout.engines is {self.engines}; set it to the "
                "addresses that are known, or []"
            )
        host, port = self.register_place
        if not host or not 0 <= port <= 65535:
            raise ConfigError(f'rollout.register_at is "{self.register_at}"; expected HOST:PORT, such as 10.0.0.2:8790')
        check_exposure(host, self.token)

    @property
    def register_place(self) -> tuple[str, int]:
        """Host and port of ``register_at``; the port is -1 where it is none."""
        host, _, port = self.register_at.rpartition(":")
        return host.strip("[]"), int(port) if port.isascii() and port.isdecimal() else -1

    @property
    def folder(self) -> Path | None:
        """``weights_folder``, or None."""
        return Path(self.weights_folder) if self.weights_folder else None

    @property
    def token(self) -> str:
        """The servers' token; "" for none."""
        return os.environ.get(self.token_env, "")
