"""Progress as plain lines: for pipes, files and logs. Never a control character but the line feed."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import SupportsFloat, TextIO

from forgejax.report.live.board import Board, View, strip_controls
from forgejax.report.live.outlet import Outlet
from forgejax.report.names import find_shown, format_duration, format_value

_WAIT_SHARE = 0.2  # of what a wait or a phase took so far passes before the next line about it


class LinesProgress:
    """One line a step, at most one in ``interval_s`` seconds (the last step always has its own); see Progress.

    While the run waits there is a line every ``wait_s``, and less often the longer it takes, and one for a
    phase that nothing has been said of for ``quiet_s``.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        steps: int,
        interval_s: float = 2.0,
        wait_s: float = 5.0,
        quiet_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outlet = Outlet(stream)
        self._board = Board(steps, clock=clock)
        self._interval_s = interval_s
        self._wait_s = wait_s
        self._quiet_s = quiet_s
        self._next_line_s = 0.0
        self._said_s = 0.0
        self._phases = 0

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        self._board.begin(name, detail)
        self._say(f"{name}: {detail} ..." if detail else f"{name} ...")
        outcome = "failed"
        over = threading.Event()
        teller = threading.Thread(target=self._tell_of_phase, args=(over,), name="progress-phase", daemon=True)
        self._phases += 1
        if self._phases == 1:  # it tells of the phases within as well
            teller.start()
        try:
            yield
            outcome = "done"
        finally:
            self._phases -= 1
            over.set()
            if self._phases == 0:
                teller.join()
            self._say(f"{name} {outcome} in {format_duration(self._board.end())}")

    @contextmanager
    def wait(self, describe: Callable[[], str]) -> Iterator[None]:
        over = threading.Event()
        teller = threading.Thread(target=self._tell_of_wait, args=(over,), name="progress-wait", daemon=True)
        with self._board.wait(describe):
            teller.start()
            try:
                yield
            finally:
                over.set()
                teller.join()

    def step(self, row: Mapping[str, SupportsFloat]) -> None:
        self._board.add_step(row)
        view = self._board.view()
        if view.elapsed_s >= self._next_line_s or view.step >= view.steps:
            self._next_line_s = view.elapsed_s + self._interval_s
            self._say(format_step(view))

    def note(self, text: str) -> None:
        for line in text.splitlines():
            self._say(f"note: {line}")

    def close(self) -> None:
        self._outlet.close()

    def _tell_of_wait(self, over: threading.Event) -> None:
        waited_s = 0.0
        while not over.wait(pause_s := max(self._wait_s, _WAIT_SHARE * waited_s)):
            waited_s += pause_s
            self._say(self._board.view().waiting)

    def _tell_of_phase(self, over: threading.Event) -> None:
        while not over.wait(self._quiet_s):
            view = self._board.view()
            if view.elapsed_s - self._said_s >= max(self._quiet_s, _WAIT_SHARE * view.phase_s):
                doing = f"{view.phase}: {view.detail}" if view.detail else view.phase
                self._say(f"{doing}, for {format_duration(view.phase_s)} so far")

    def _say(self, text: str) -> None:
        self._said_s = self._board.elapsed_s
        self._outlet.write(f"[{format_duration(self._board.elapsed_s):>7}] {strip_controls(text)}\n")


def format_step(view: View) -> str:
    """The line of the last step: number, the known figures that are there, time left."""
    parts = [f"step {view.step}/{view.steps}"]
    parts += [f"{shown.label} {format_value(view.row[shown.name], shown.style)}" for shown in find_shown(view.row)]
    if view.eta_s is not None:
        parts.append(f"eta {format_duration(view.eta_s)}")
    return " | ".join(parts)
