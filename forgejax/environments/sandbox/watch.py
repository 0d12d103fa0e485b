"""What the processes of sandboxes use together: looked at twice a second, ended where it is too much.

Limits of a single process do not add up, and control groups are seldom a trainer's to make. Between two looks a sandbox
may pass its limit; what it holds then is gone with its processes. Looking takes a small share of the time: who has very
many files is looked at less often, unless so much was written to the disk meanwhile that it may be past its limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from forgejax.environments.sandbox.config import SandboxConfig
from forgejax.environments.sandbox.processes import (
    Root,
    end_tree,
    list_members,
    measure_memory,
    measure_unlinked,
)

_EVERY_S = 0.5
_SHARE = 0.05  # of the time, at most, for a sandbox's files, and for all processes
_MOST_FILES = 200_000
_MIB = 2**20


@dataclass(kw_only=True, eq=False)
class Watched:
    """A sandbox, by its first process and the folders it writes to. ``exceeded`` says what it had too much of, for
    people."""

    root: Root
    folders: tuple[Path, ...]
    config: SandboxConfig
    exceeded: str | None = None
    _due: float = field(default=0.0, init=False)
    _left: int = field(default=0, init=False)  # free bytes of the disk, below which it may have passed its limit

    def judge(self, members: dict[int, int]) -> None:
        """``members``: its processes, and the bytes that each holds."""
        memory = measure_memory(members, self.config.memory_bytes)
        if memory > self.config.memory_bytes:
            self.exceeded = _word("its processes held", memory, "of memory", self.config.memory_mib, "memory_mib")
            return
        with contextlib.suppress(OSError):  # the folder went meanwhile
            disk = os.statvfs(self.folders[0])
            free, began = disk.f_bavail * disk.f_frsize, time.monotonic()
            if began >= self._due or free < self._left:
                self._left = free - (self.config.disk_bytes - self._judge_files(members))
                self._due = time.monotonic() + (time.monotonic() - began) / _SHARE

    def _judge_files(self, members: dict[int, int]) -> int:
        """The bytes that it has written."""
        written, files = measure_unlinked(members), 0
        for folder in self.folders:
            more, found = measure_folder(folder, self.config.disk_bytes)
            written, files = written + more, files + found
        if written > self.config.disk_bytes:
            self.exceeded = _word("it wrote", written, "to the disk", self.config.disk_mib, "disk_mib")
        elif files > _MOST_FILES:
            self.exceeded = f"it made more than {_MOST_FILES:,} files, or deeper folders than a path can name"
        return written


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
            began = time.monotonic()
            members = list_members(each.root for each in watched)
            took = time.monotonic() - began
            for each in watched:
                if each.exceeded is None:
                    each.judge(members[each.root])
                if each.exceeded is not None:
                    end_tree(each.root)
            with self._changed:
                self._changed.wait_for(lambda: not self._watched, timeout=max(_EVERY_S, took / _SHARE))


def measure_folder(folder: Path, most: int) -> tuple[int, int]:
    """Bytes on the disk below ``folder`` and its files, counted until there are more than ``most`` bytes, or too many
    files; what is too deep to be looked at is too many."""
    written = files = 0
    left = [str(folder)]
    while left and written <= most and files <= _MOST_FILES:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    files += 1
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    with contextlib.suppress(FileNotFoundError):
                        written += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError as error:  # gone meanwhile, or shut by its owner
            if error.errno == errno.ENAMETOOLONG:
                return written, _MOST_FILES + 1
    return written, files


def _word(does: str, amount: int, of: str, limit_mib: int, name: str) -> str:
    return f"{does} {amount / _MIB:,.0f} MiB {of} and was ended; raise tasks sandbox.{name} from {limit_mib:,}"
