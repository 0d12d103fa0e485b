"""What the processes of sandboxes use together: looked at twice a second, ended where it is too much.

Limits of a single process do not add up, and control groups are seldom a trainer's to make. Between two looks a sandbox
may pass its limit; what it holds then is gone with its processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from forgejax.environments.sandbox.config import SandboxConfig

_EVERY_S = 0.5
_END_S = 5.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MOST_FILES = 200_000
_MIB = 2**20


@dataclass(kw_only=True, eq=False)
class Watched:
    """A sandbox, by the number of its process namespace. ``exceeded`` says what it had too much of, for people."""

    namespace: int
    folder: Path
    config: SandboxConfig
    exceeded: str | None = None

    def judge(self, memory: int) -> None:
        """``memory``: the bytes that its processes hold."""
        if memory > self.config.memory_bytes:
            self.exceeded = _word("its processes held", memory, "of memory", self.config.memory_mib, "memory_mib")
            return
        written, files = measure_folder(self.folder, self.config.disk_bytes)
        if written > self.config.disk_bytes:
            self.exceeded = _word("it wrote", written, "to the disk", self.config.disk_mib, "disk_mib")
        elif files > _MOST_FILES:
            self.exceeded = f"it made more than {_MOST_FILES:,} files"


class Watch:
    """One thread for all sandboxes of a process, there as long as there are any."""

    def __init__(self) -> None:
        self._watched: list[Watched] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, watched: Watched) -> None:
        with self._changed:
            self._watched.append(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="sandboxes", daemon=True)
                self._thread.start()

    def remove(self, watched: Watched) -> None:
        with self._changed:
            self._watched.remove(watched)
            self._changed.notify()

    def _look(self) -> None:
        while True:
            with self._changed:
                if not self._watched:
                    self._thread = None
                    return
                watched = list(self._watched)
            members = _list_members({each.namespace for each in watched})
            for each in watched:
                processes = members[each.namespace]
                if each.exceeded is None:
                    each.judge(sum(map(_measure_memory, processes)))
                if each.exceeded is not None:
                    _kill(processes)
            with self._changed:
                if self._watched:
                    self._changed.wait(_EVERY_S)


def find_namespace(process: int) -> int:
    """The number of the namespace that a process counts its own processes in. Raises OSError where it is gone."""
    return Path(f"/proc/{process}/ns/pid").stat().st_ino


def end_namespace(namespace: int) -> None:
    """Kills all processes of a sandbox and waits until they are gone; blocks, a few seconds at most."""
    until = time.monotonic() + _END_S
    while (left := _list_members({namespace})[namespace]) and time.monotonic() < until:
        _kill(left)
        time.sleep(0.002)


def measure_folder(folder: Path, most: int) -> tuple[int, int]:
    """Bytes on the disk below ``folder`` and its files, counted until there are more than ``most`` bytes."""
    written = files = 0
    left = [folder]
    while left and written <= most and files <= _MOST_FILES:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:  # gone meanwhile, or shut by its owner
            for entry in entries:
                with contextlib.suppress(OSError):
                    files += 1
                    written += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        left.append(Path(entry.path))
    return written, files


def _list_members(namespaces: set[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {each: [] for each in namespaces}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                namespace = find_namespace(int(place.name))
                if namespace in members and not _has_ended(place):
                    members[namespace].append(int(place.name))
    return members


def _has_ended(place: Path) -> bool:
    """Whether only its parent has not asked for its status yet."""
    return (place / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] in ("Z", "X")


def _measure_memory(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _word(does: str, amount: int, of: str, limit_mib: int, name: str) -> str:
    return f"{does} {amount / _MIB:,.0f} MiB {of} and was ended; raise tasks sandbox.{name} from {limit_mib:,}"
