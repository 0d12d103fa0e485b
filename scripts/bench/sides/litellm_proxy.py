"""litellm's proxy as a peer: a process of its own that answers every request by itself, or asks a null server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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
    litellm_params: {model: openai/policy, api_key: none, %s}
general_settings: {master_key: sk-bench}
"""
_UPSTREAM = Path(__file__).with_name("null_openai.py")


@dataclass(frozen=True, kw_only=True)
class LitellmProxy:
    """A running proxy; ``end`` it."""

    address: Address
    process: subprocess.Popen[bytes]
    upstream: subprocess.Popen[bytes] | None
    folder: tempfile.TemporaryDirectory[str]
    name: str = "litellm"
    key: str = _KEY

    def end(self) -> None:
        for process in filter(None, (self.process, self.upstream)):
            process.kill()
            process.wait()
        self.folder.cleanup()


def run_litellm(python: Path | None, path: str, *, upstream: bool) -> LitellmProxy:
    """With ``upstream`` it asks a server that answers at once, else it answers by itself. Raises SystemExit where it
    does not start."""
    if python is None:
        raise SystemExit(
            "--peer litellm needs --peer-python: the interpreter of an environment with litellm's proxy in it, as of "
            "`python -m venv ENV && ENV/bin/pip install 'litellm[proxy]'`"
        )
    folder = tempfile.TemporaryDirectory(prefix="litellm-")
    config = Path(folder.name) / "config.yaml"
    server, says = None, 'mock_response: "It is 5."'
    if upstream:
        server = subprocess.Popen([sys.executable, str(_UPSTREAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdout is not None
        says = f"api_base: http://127.0.0.1:{int(server.stdout.readline())}/v1"
    config.write_text(_CONFIG % says)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = Address(host="127.0.0.1", port=port, path=path)
    command = [str(python.with_name("litellm")), "--config", str(config), "--host", address.host, "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with (Path(folder.name) / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env | {"LITELLM_LOG": "ERROR"})
    proxy = LitellmProxy(address=address, process=process, upstream=server, folder=folder)
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
