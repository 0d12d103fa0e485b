"""litellm's proxy as a peer: a process of its own that answers every request by itself, with no upstream."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from sides.load import Address

_START_S = 120.0
_KEY = "sk-bench"
_CONFIG = """
model_list:
  - model_name: policy
    litellm_params: {model: openai/policy, api_key: none, mock_response: "It is 5."}
general_settings: {master_key: sk-bench}
"""


@dataclass(frozen=True, kw_only=True)
class LitellmProxy:
    """A running proxy; ``end`` it."""

    address: Address
    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]
    name: str = "litellm"
    key: str = _KEY

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def run_litellm(python: Path | None, path: str) -> LitellmProxy:
    """Raises SystemExit where it does not start."""
    if python is None:
        raise SystemExit(
            "--peer litellm needs --peer-python: the interpreter of an environment with litellm's proxy in it, as of "
            "`python -m venv ENV && ENV/bin/pip install 'litellm[proxy]'`"
        )
    folder = tempfile.TemporaryDirectory(prefix="litellm-")
    config = Path(folder.name) / "config.yaml"
    config.write_text(_CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = Address(host="127.0.0.1", port=port, path=path)
    command = [str(python.with_name("litellm")), "--config", str(config), "--host", address.host, "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with (Path(folder.name) / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env | {"LITELLM_LOG": "ERROR"})
    proxy = LitellmProxy(address=address, process=process, folder=folder)
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{address.host}:{port}/health/liveliness", timeout=5):
                return proxy
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    said = (Path(folder.name) / "log").read_text(errors="replace")[-2000:]
    proxy.end()
    raise SystemExit(f"litellm's proxy did not start within {_START_S:g} s; its last lines:\n{said}")
