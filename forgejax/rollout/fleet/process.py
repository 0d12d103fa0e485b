"""A server process of the trainer's own on this machine: it dies with the trainer, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgejax.errors import EngineError

_END_S = 20.0
_TAIL = 2000
REQUESTS_FILE = "requests.log"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a server is started: ``command`` (``scripts/serve.py`` with options), in which environment; its log, its
    address and its requests lie in ``folder``."""

    command: Sequence[str]
    env: Mapping[str, str]
    folder: Path

    @property
    def requests(self) -> Path:
        return self.folder / REQUESTS_FILE


class ServerProcess:
    """One start of it. It dies with the thread that makes this, too (see ``server.leash``)."""

    def __init__(self, launch: Launch):
        """Raises EngineError where the system refuses."""
        self._log, self._address = launch.folder / "server.log", launch.folder / "address"
        self.began = time.monotonic()
        options = ("--port=0", "--grpc-port=0", f"--address-file={self._address}", f"--request-log={launch.requests}")
        try:
            launch.folder.mkdir(parents=True, exist_ok=True)
            self._address.unlink(missing_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*launch.command, *options, "--leashed"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(launch.env),
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineError(f"a server cannot be started in {launch.folder}: {error}") from error

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def address(self) -> str:
        """Where it listens; "" while it does not."""
        return self._address.read_text(encoding="utf-8").strip() if self._address.exists() else ""

    def describe_end(self) -> str:
        """How it ended and the last it said; "" while it lives."""
        status = self._process.poll()
        if status is None:
            return ""
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL:]
        said = [line for line in text.splitlines() if any(map(str.isalnum, line))]
        return f"its process {how}; {self._log} ends with: {said[-1] if said else 'nothing'}"

    def end(self) -> None:
        """Asks it to end, and kills it where it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once, stopped or not. Idempotent."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


def list_logs(folder: Path) -> list[Path]:
    """The request logs of all servers that had a folder in ``folder``."""
    return sorted(folder.glob(f"*/{REQUESTS_FILE}"))


def make_environment_of_server(**settings: str) -> dict[str, str]:
    """This process's environment, for a server on this machine's CPU."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", **settings}
