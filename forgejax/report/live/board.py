"""What the live progress knows at any moment: phases, the last figures and the time left."""

import statistics
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import SupportsFloat

from forgejax.report.figures import average_rates
from forgejax.report.names import COUNTED, OUTCOME, RATES, STEP, STEP_S, STEPS_OF_A_RATE, TOOLS

_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def strip_controls(text: str) -> str:
    """``text`` on one line: control, format and separator characters become spaces, runs of spaces one space.

    Notes carry words of agent programs, and those may hold terminal escapes.
    """
    plain = "".join(" " if unicodedata.category(char) in _UNPRINTABLE else char for char in text)
    return " ".join(plain.split())


@dataclass(frozen=True, kw_only=True)
class View:
    """The board at one moment. ``step`` is the last finished step, ``eta_s`` None until two steps have ended.
    ``waiting`` says how far that is which the run waits for, and is empty where it waits for nothing.

    ``row`` has the last known value of every figure; rates are those of the last few steps together, and what rows
    count since the one before is added up.
    """

    phase: str
    detail: str
    waiting: str
    phase_s: float
    elapsed_s: float
    step: int
    steps: int
    eta_s: float | None
    rewards: tuple[float, ...]
    row: Mapping[str, float]


class Board:
    """The state behind a progress display. Threads may share it. ``clock`` is monotonic seconds."""

    def __init__(self, steps: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps = steps
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock()
        self._phases: list[tuple[str, str, float]] = []
        self._step = 0
        self._ended_at: float | None = None
        self._durations: deque[float] = deque(maxlen=16)
        self._rewards: deque[float] = deque(maxlen=120)
        self._row: dict[str, float] = {}
        self._spans: deque[tuple[float, dict[str, float]]] = deque(maxlen=STEPS_OF_A_RATE)  # seconds, and the rates
        self._tools_used = False
        self._describe_wait: Callable[[], str] | None = None

    @contextmanager
    def wait(self, describe: Callable[[], str]) -> Iterator[None]:
        """Inside, the run waits for what ``describe`` describes."""
        self._describe_wait = describe
        try:
            yield
        finally:
            self._describe_wait = None

    def begin(self, name: str, detail: str) -> None:
        with self._lock:
            self._phases.append((strip_controls(name), strip_controls(detail), self._clock()))

    def end(self) -> float:
        """Leaves the innermost phase and gives its seconds."""
        with self._lock:
            return self._clock() - self._phases.pop()[2]

    def add_step(self, row: Mapping[str, SupportsFloat]) -> int:
        """Takes the row of a finished step and gives its number. Raises ValueError for a row without a step."""
        if STEP not in row:
            raise ValueError(f"progress row without a step: {sorted(row)}; expected the key 'step'")
        with self._lock:
            now = self._clock()
            step = int(float(row[STEP]))
            if self._ended_at is not None and step > self._step:
                self._durations.append((now - self._ended_at) / (step - self._step))
            self._step, self._ended_at = step, now
            if OUTCOME in row:
                self._rewards.append(float(row[OUTCOME]))
            self._row |= {
                name: float(value) + (self._row.get(name, 0.0) if name.startswith(COUNTED) else 0.0)
                for name, value in row.items()
            }
            rates = {name: self._row[name] for name in row if name.startswith(RATES)}
            self._spans.append((float(row.get(STEP_S, 1.0)), rates))
            self._row |= average_rates(self._spans)
            self._tools_used |= any(value > 0 for name, value in self._row.items() if name.startswith(TOOLS))
            return step

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def view(self) -> View:
        describe = self._describe_wait
        waiting = "" if describe is None else strip_controls(describe())
        with self._lock:
            now = self._clock()
            name, detail, begun = self._phases[-1] if self._phases else ("", "", now)
            # The median: a step that compiled or waited for an evaluation says little of the next.
            pace = statistics.median(self._durations) if self._durations else None
            return View(
                phase=name,
                detail=detail,
                waiting=waiting,
                phase_s=now - begun,
                elapsed_s=now - self._started,
                step=self._step,
                steps=self._steps,
                eta_s=None if pace is None else pace * max(0, self._steps - self._step),
                rewards=tuple(self._rewards),
                # Agents that have no tools need not be told that they use none.
                row={
                    name: value for name, value in self._row.items() if self._tools_used or not name.startswith(TOOLS)
                },
            )
