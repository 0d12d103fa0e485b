"""Sandboxes by bubblewrap: each process tree in namespaces of its own, over a root that shows what it needs.

Inside, the system's folders and Python are read-only, all else is absent; ``/app``, ``/logs`` and ``/tmp`` are the
episode's own. There is no network but an egress. Where the trainer is root, every sandbox runs as a user that has
nothing else, for the system limits no root user's processes; elsewhere it is the trainer's own user, in a namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forgejax.environments.sandbox import entry
from forgejax.environments.sandbox.command import (
    find_bubblewrap,
    list_python,
    make_parents,
    name_interpreter,
    show_system,
)
from forgejax.environments.sandbox.config import SandboxConfig
from forgejax.environments.sandbox.egress import Egress, open_door
from forgejax.environments.sandbox.processes import Root, end_tree, find_root
from forgejax.environments.sandbox.syscalls import make_filter
from forgejax.environments.sandbox.watch import Watch, Watched
from forgejax.environments.scratch import make_scratch, remove_tree

WORK = "/app"
"""Where an episode works, unless its task says otherwise."""

_PLACES = ("app", "logs", "tmp")
_DOOR, _ENTRY = "/run/forgejax", "/run/entry.py"
_START_S = 20.0
_OPEN_FILES = 4096
_USERS = itertools.count(random.randrange(2**29, 2**30))  # none that a system gives
_watch = Watch()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a program ended inside. ``status`` is None where it was cut off, by the deadline or ``exceeded`` limits."""

    status: int | None
    exceeded: str | None


@dataclass(kw_only=True, eq=False)
class Entered:
    """A way in. ``exceeded`` tells, once the program has ended, which limit it broke."""

    words: tuple[str, ...]
    watched: Watched | None = None

    @property
    def exceeded(self) -> str | None:
        return None if self.watched is None else self.watched.exceeded

    def word(self, command: Sequence[str]) -> tuple[str, ...]:
        """The command that runs ``command`` inside."""
        return (*self.words, *command)


@dataclass(frozen=True, kw_only=True)
class Bubblewrap:
    """The sandbox of one episode, in a folder of its own; ``make_bubblewrap`` makes one. It works in ``inside``."""

    config: SandboxConfig
    folder: Path
    user: int | None
    inside: str = WORK
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Where ``inside`` lies outside."""
        return self.folder / "app"

    @property
    def logs(self) -> Path:
        """Where ``/logs`` lies outside."""
        return self.folder / "logs"

    def give(self, place: Path) -> None:
        """Makes all below ``place`` the sandbox's own."""
        if self.user is None:
            return
        os.chown(place, self.user, self.user, follow_symlinks=False)
        for folder, folders, files in os.walk(place):
            for name in (*folders, *files):
                os.chown(Path(folder) / name, self.user, self.user, follow_symlinks=False)

    @contextlib.asynccontextmanager
    async def enter(self, *, egress: Egress, read: Iterable[Path], own: Iterable[Path]) -> AsyncIterator[Entered]:
        """Around one program that is started by ``Entered.word`` and reaches ``egress``.

        ``read`` is shown to it where it lies outside, and ``own`` is that and its own. When the context ends nobody
        answers the egress any more, and all processes inside are gone.
        """
        own, door = tuple(own), self.folder / "door"
        for place in own:
            await asyncio.to_thread(self.give, place)
        door.mkdir()
        entered = Entered(words=self._word((), port=egress.inside, read=read, own=own))
        try:
            async with open_door(door / "socket", egress) as inside:
                noting = asyncio.create_task(self._note(inside, entered, own))
                try:
                    yield entered
                finally:
                    noting.cancel()
                    if entered.watched is not None:
                        _watch.remove(entered.watched)
                        await asyncio.shield(asyncio.to_thread(end_tree, entered.watched.root))
        finally:
            await asyncio.to_thread(remove_tree, door)

    async def _note(self, inside: asyncio.Future[Root], entered: Entered, own: tuple[Path, ...]) -> None:
        entered.watched = self._watch(await inside, own)

    def _watch(self, root: Root, own: tuple[Path, ...] = ()) -> Watched:
        watched = Watched(root=root, folders=(self.folder, *own), config=self.config)
        _watch.add(watched)
        return watched

    def run(
        self,
        command: Sequence[str],
        *,
        deadline_s: float,
        output: Path,
        show: Mapping[Path, str],
        environment: Mapping[str, str],
    ) -> Ran:
        """Runs a program without an egress; blocks. ``show`` tells where inside paths from outside are read; what it
        writes to stdout and stderr goes to the file ``output``."""
        with output.open("wb") as written:
            process = subprocess.Popen(
                self._word(command, port=None, show=show),
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                start_new_session=True,
            )
        watched = None
        try:
            root = _await_root(process)
            if root is not None:
                watched = self._watch(root)
            status = process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if watched is not None:
                _watch.remove(watched)
                end_tree(watched.root)
        exceeded = None if watched is None else watched.exceeded
        return Ran(status=status if exceeded is None else None, exceeded=exceeded)

    def _word(
        self,
        command: Sequence[str],
        *,
        port: int | None,
        read: Iterable[Path] = (),
        own: Iterable[Path] = (),
        show: Mapping[Path, str] | None = None,
    ) -> tuple[str, ...]:
        words = [find_bubblewrap(), "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        words += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--seccomp", "9"]
        if self.user is None:
            words += ["--unshare-user"]
        else:  # for the entrance to become another user
            words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        words += show_system()
        words += ["--proc", "/proc", "--dev", "/dev"]
        words += ["--perms", "1777", "--size", str(self.config.memory_bytes // 4), "--tmpfs", "/dev/shm"]
        for place, inside in ((self.work, self.inside), (self.logs, "/logs"), (self.folder / "tmp", "/tmp")):
            words += [*make_parents(inside), "--bind", str(place), inside]
        shown = {path: str(path) for path in (*list_python(), *map(Path, self.config.read), *read)} | dict(show or {})
        for path, inside in shown.items():
            words += [*make_parents(inside), "--ro-bind", str(path), inside]
        for path in own:
            words += [*make_parents(str(path)), "--bind", str(path), str(path)]
        words += ["--dir", "/run", "--ro-bind", str(Path(entry.__file__)), _ENTRY]
        if port is not None:
            words += ["--ro-bind", str(self.folder / "door"), _DOOR]
        words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", self.inside, "--"]
        words += [*name_interpreter(), _ENTRY, self._tell(port), *command]
        return ("/bin/sh", "-c", 'exec 9< "$0" && exec "$@"', str(self.folder / "filter"), *words)

    def _tell(self, port: int | None) -> str:
        """What the entrance is told."""
        limits = {
            "RLIMIT_NPROC": self.config.processes,
            "RLIMIT_FSIZE": self.config.file_bytes,
            "RLIMIT_DATA": self.config.memory_bytes,
            "RLIMIT_NOFILE": _OPEN_FILES,
            "RLIMIT_CORE": 0,
        }
        return json.dumps({"port": port, "door": f"{_DOOR}/socket", "user": self.user, "limits": limits})


def make_bubblewrap(config: SandboxConfig, inside: str = WORK) -> Bubblewrap:
    """A sandbox in a new folder; blocks. Whoever asked for it removes ``folder``. Raises OSError."""
    folder = make_scratch("task")
    user = next(_USERS) if os.geteuid() == 0 else None
    sandbox = Bubblewrap(config=config, folder=folder, user=user, inside=inside, environment=list_environment())
    for name in _PLACES:
        (folder / name).mkdir()
        sandbox.give(folder / name)
    (folder / "filter").write_bytes(_get_filter())
    return sandbox


_get_filter = functools.cache(make_filter)


def list_environment() -> dict[str, str]:
    """What a sandbox takes over of this process's environment: none of its secrets."""
    taken = ("PATH", "LANG", "LANGUAGE", "TZ", "TERM")
    kept = {name: value for name, value in os.environ.items() if name in taken or name.startswith("LC_")}
    return {"PATH": os.defpath, **kept, "HOME": "/tmp"}


def _await_root(process: subprocess.Popen[bytes]) -> Root | None:
    """The first process of the sandbox that bubblewrap has made; None where it ended without one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            for child in children.read_text(encoding="ascii").split():
                return find_root(int(child))
        time.sleep(0.002)
    return None
