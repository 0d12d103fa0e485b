"""A tiny program that outlives its trainer just long enough to end the trainer's agents.

Run as ``python -I -S guard.py TRAINER_PID MARKER`` with a pipe from the trainer on stdin. When the trainer closes the
pipe or dies, by whatever signal, every process whose environment carries the marker is killed, wherever it has moved:
sessions and process groups of its own included. The keepers (``keeper.py``), which know more, go first: what is left to
kill is what a keeper has left that was itself killed, or stopped. Needs Linux's /proc; elsewhere it finds nothing.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

MARKER_NAME = "FORGEJAX_AGENTS"
POLL_S = 0.5
KEEPERS_S = 2.0
SWEEPS = 50
SWEEP_PAUSE_S = 0.02


def marked_processes(marker: str) -> list[int]:
    """The ids of the processes of this user that were started with this marker, zombies left out."""
    wanted = f"{MARKER_NAME}={marker}".encode()
    found = []
    names = os.listdir("/proc") if os.path.isdir("/proc") else []  # noqa: PTH112, PTH208 (pathlib doubles the start-up)
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environ:  # noqa: PTH123
                if wanted in environ.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # it ended meanwhile, or belongs to someone else
    return found


def await_keepers(marker: str) -> None:
    """Until no keeper of this marker is left, or has shown that it does not do its work."""
    until = time.monotonic() + KEEPERS_S
    while time.monotonic() < until and any(map(is_keeper, marked_processes(marker))):
        time.sleep(SWEEP_PAUSE_S)


def is_keeper(process_id: int) -> bool:
    try:
        with open(f"/proc/{process_id}/cmdline", "rb") as command:  # noqa: PTH123
            return b"keeper.py\0" in command.read()
    except OSError:
        return False  # it ended meanwhile


def sweep(marker: str) -> None:
    """Kills the marked processes, again and again until none is left, for some may be forking."""
    for _ in range(SWEEPS):
        found = marked_processes(marker)
        if not found:
            return
        for process_id in found:
            try:
                os.kill(process_id, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(SWEEP_PAUSE_S)


def main(trainer: int, marker: str) -> None:
    """Waits for the trainer's end. The pipe alone is not enough: a forked child of the trainer may hold it open."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == trainer:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 1):
            break
    await_keepers(marker)
    sweep(marker)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
