"""Processes that have the imports behind them and play ``scripts/train.py`` run after run, as the command line does."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from forgejax.run import conclude

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRANCE = REPOSITORY / "scripts" / "train.py"
THREADS_S = 5.0  # in which what a run has started must be gone
IMPORTED_LATE = ("forgejax.run.build", "forgejax.report.live.progress")  # by train.py; here once, for all forks
SETTLED = 2  # runs after which a process keeps no further file open: jax and its caches have theirs by then


@dataclass(frozen=True)
class End:
    """How a run ended: its exit status, whether its process went with it, and what it left in it if not."""

    status: int
    exited: bool
    left: tuple[str, ...] = ()


class Session:
    """A fork of this process, in a process group of its own, which plays runs until it is closed or one ends it."""

    def __init__(self) -> None:
        theirs, self._asks = os.pipe()
        self._tells, answers = os.pipe()
        for name in IMPORTED_LATE:
            importlib.import_module(name)
        sys.stdout.flush()
        self.process_id = os.fork()
        if self.process_id == 0:
            os.close(self._asks)
            os.close(self._tells)
            _serve(theirs, answers)
        os.close(theirs)
        os.close(answers)
        self.runs = 0
        self.end: End | None = None
        self.alive = True

    def begin(self, arguments: Sequence[str], log: Path, *, plots: bool) -> None:
        """Has ``train.py`` called with these arguments, its output in ``log``."""
        self.runs += 1
        self.end = None
        os.write(self._asks, json.dumps([list(arguments), str(log), plots]).encode() + b"\n")

    def poll(self, seconds: float = 0.0) -> End | None:
        """How the run ended, if it has within so many seconds."""
        if self.end is None and select.select([self._tells], [], [], seconds)[0]:
            if told := os.read(self._tells, 1 << 16):  # it is written at once, and shorter than a pipe's buffer
                status, left = json.loads(told)
                self.end = End(status, exited=False, left=tuple(left))
            else:
                self.end = End(self._wait(), exited=True)
        return self.end

    def kill(self) -> None:
        """Kill -9 for the process and its group; what has a group of its own must end by itself."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process_id, signal.SIGKILL)
            self._wait()

    def close(self) -> None:
        """Lets it end by itself, which it does where no run is going on."""
        if self.alive:
            os.close(self._asks)
            self._asks = -1
            self._wait()

    def _wait(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])
        self.alive = False
        for descriptor in (self._asks, self._tells):
            if descriptor >= 0:
                os.close(descriptor)
        return status


def _serve(asked: int, answers: int) -> NoReturn:
    """The forked process: a run for each line, until there is no further one."""
    os.setsid()
    main = runpy.run_path(str(ENTRANCE), run_name="train")["main"]
    environment, played, before = dict(os.environ), 0, 0
    with os.fdopen(asked) as lines:
        for line in lines:
            arguments, log, plots = json.loads(line)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(REPOSITORY)
            with contextlib.nullcontext() if plots else _without_plots():
                status = _play(main, arguments, log)
            left = [f"threads are left: {names}"] if (names := _wait_for_threads()) else []
            played, after = played + 1, _count_files()
            if played > SETTLED and after > before:
                left.append(f"{after - before} files are left open")
            before = after
            os.write(answers, json.dumps([status, left]).encode())
    os._exit(0)


def _play(main: Callable[[], int], arguments: list[str], log: str) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.argv = [str(ENTRANCE.relative_to(REPOSITORY)), *arguments]
    try:
        return main()
    except SystemExit as exited:
        return _status_of(exited.code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@contextlib.contextmanager
def _without_plots() -> Iterator[None]:
    """Reports leave the pictures out: drawing them takes longer than the rest of a small run's end."""
    with mock.patch.multiple(conclude, draw_courses=lambda rows: (), draw_curve=lambda rows: None):
        yield


def _count_files() -> int:
    """Open files and sockets but for those of the installation, such as the fonts of the first plot."""
    opened = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one this list is read by
            opened.append(path.readlink())
    return sum(not path.is_relative_to(sys.prefix) for path in opened)


def _status_of(code: Any) -> int:
    return code if isinstance(code, int) else int(code is not None)


def _wait_for_threads() -> list[str]:
    """Threads beside the main one that are still there after a while."""
    deadline = time.monotonic() + THREADS_S
    while (others := threading.enumerate()[1:]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [thread.name for thread in others]
