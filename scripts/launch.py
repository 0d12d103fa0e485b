"""Starts a job of several processes on this machine, as every host of a pod would start its own.

    python scripts/launch.py --processes 4 --devices 2 -- --config configs/quickstart_pod.toml

  --processes N   processes: the first leads, the others follow
  --devices N     fake CPU devices in each (1); the mesh is cpu-(processes x devices) unless the arguments name another

What stands behind -- goes to scripts/train.py. Every line is printed behind the number of its process. When one
process ends with a failure, the others have 60 s to end by themselves and are then killed; Ctrl-C and SIGTERM reach
all. The exit code is the first that is not 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

TRAIN = Path(__file__).parent / "train.py"
_GRACE_S = 60.0
_LOOK_S = 0.2
_NOISE = "[Gloo]"  # what the CPU's collectives say of each connection


def main() -> int:
    own, arguments = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--processes", type=_positive, required=True)
    parser.add_argument("--devices", type=_positive, default=1)
    parser.add_argument("--grace-s", type=float, default=_GRACE_S)
    asked = parser.parse_args(own)
    if not any(word.split("=")[0] in ("--mesh", "--mesh.name") for word in arguments):
        arguments = [f"--mesh=cpu-{asked.processes * asked.devices}", *arguments]
    return run_job([[sys.executable, str(TRAIN), *join_options(asked.processes, number), *arguments]
                    for number in range(asked.processes)], grace_s=asked.grace_s)  # fmt: skip


_port = 0


def join_options(processes: int, number: int) -> list[str]:
    """What tells a process of this machine which of them it is."""
    global _port  # noqa: PLW0603  (one job a program)
    _port = _port or _find_port()
    coordinator = f"--distributed.coordinator=127.0.0.1:{_port}"
    return [coordinator, f"--distributed.processes={processes}", f"--distributed.process-id={number}"]


def run_job(commands: Sequence[Sequence[str]], *, grace_s: float) -> int:
    """Runs them side by side until all have ended; gives the first exit code that is not 0."""
    job = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
        )
        for command in commands
    ]
    told: list[int] = []

    def tell(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process in job:
            _signal(process, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    printers = [
        threading.Thread(target=_print_lines, args=(number, process.stdout), daemon=True)
        for number, process in enumerate(job)
    ]
    for printer in printers:
        printer.start()
    code = _await(job, grace_s)
    for printer in printers:
        printer.join(_GRACE_S)
    return code


def _await(job: Sequence[subprocess.Popen[str]], grace_s: float) -> int:
    code, until = 0, float("inf")
    while any(process.poll() is None for process in job):
        ended = [process.returncode for process in job if process.poll() is not None]
        if any(ended) and not code:
            code = next(filter(None, ended))
            until = time.monotonic() + grace_s
        if time.monotonic() > until:
            left = [number for number, process in enumerate(job) if process.poll() is None]
            print(f"launch.py: processes {left} have not ended within {grace_s:g} s and are killed", file=sys.stderr)
            for number in left:
                _signal(job[number], signal.SIGKILL)
            until = float("inf")
        time.sleep(_LOOK_S)
    code = code or next((process.returncode for process in job if process.returncode), 0)
    return code if code >= 0 else 128 - code


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """To the process alone: its agents are ended by itself, or by their guard."""
    if process.poll() is None:
        os.kill(process.pid, number)


def _print_lines(number: int, stream: IO[str] | None) -> None:
    assert stream is not None
    for line in stream:
        if not line.startswith(_NOISE):
            print(f"[{number}] {line}", end="", flush=True)


def _find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
