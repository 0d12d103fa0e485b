"""The processes of sandboxes, as the system lists them: whose they are, what they hold, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_BLOCK = 512
_END_S = 5.0
_ENDED = ("Z", "X")  # states of one that only waits for its parent to ask
_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Root:
    """The first process of a sandbox, below which all others are; they die with it. ``began`` tells it from one that
    got its number later."""

    process: int
    began: int


@dataclass(frozen=True, kw_only=True)
class _Listed:
    parent: int
    state: str
    began: int
    pages: int


def find_root(process: int) -> Root:
    """Raises OSError where the process is gone."""
    return Root(process=process, began=_look_up(process).began)


def find_parent(process: int) -> int:
    """Raises OSError where the process is gone."""
    return _look_up(process).parent


def end_tree(root: Root) -> None:
    """Kills the first process of a sandbox and waits until it is gone, the others with it; blocks, seconds at most."""
    until = time.monotonic() + _END_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            found = _look_up(root.process)
            if found.began == root.began and found.state not in _ENDED:
                os.kill(root.process, signal.SIGKILL)
                time.sleep(0.002)
                continue
        return


def list_members(roots: Iterable[Root]) -> dict[Root, dict[int, int]]:
    """The processes of sandboxes by their roots, each with the bytes of memory that are its own or shared."""
    listed: dict[int, _Listed] = {}
    for place in _PROC.iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                listed[int(place.name)] = _look_up(int(place.name))
    children: dict[int, list[int]] = {}
    for process, each in listed.items():
        children.setdefault(each.parent, []).append(process)
    members: dict[Root, dict[int, int]] = {}
    for root in roots:
        there = root.process in listed and listed[root.process].began == root.began
        below = [root.process] if there else []
        members[root] = found = {}
        while below:
            process = below.pop()
            below += children.get(process, ())
            found[process] = listed[process].pages * _PAGE
    return members


def measure_memory(members: dict[int, int], most: int) -> int:
    """The bytes that processes hold together. What several share counts once, where it makes the difference."""
    held = sum(members.values())
    return held if held <= most else sum(map(_measure_share, members, members.values()))


def measure_unlinked(processes: Iterable[int]) -> int:
    """The bytes of files that have no name any more and are still open."""
    found: dict[tuple[int, int], int] = {}
    for process in processes:
        for status in _list_open(process):
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
    return sum(found.values())


def _list_open(process: int) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError):
        for descriptor in (_PROC / str(process) / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield descriptor.stat()


def _measure_share(process: int, otherwise: int) -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(process) / "smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return otherwise


def _look_up(process: int) -> _Listed:
    """Raises OSError where it is gone."""
    words = (_PROC / str(process) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    if not words:
        raise ProcessLookupError(f"process {process} is gone")
    return _Listed(state=words[0], parent=int(words[1]), began=int(words[19]), pages=int(words[21]))
