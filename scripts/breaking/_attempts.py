"""One start of the small run, in a process that plays several of them, and the moments of it that can be waited for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from _audit_run import GROUPS_PER_STEP, NAME, list_unfinished
from _results import EVALUATING, SAVING
from _session import End, Session

START_S, END_S = 300.0, 300.0
RUNS_PER_PROCESS = 20
OPTIONS = {
    "tokenizer": "examples/quickstart/tokenizer",
    "mesh": "cpu-2",
    "run.name": NAME,
    "run.group-size": "4",
    "run.eval-every": "6",
    "run.checkpoint-every": "3",
    "run.probe-every": "3",
    "policy.num-layers": "1",
    "policy.d-model": "16",
    "policy.num-heads": "2",
    "policy.num-kv-heads": "1",
    "policy.d-ff": "32",
    "warm-start.steps": "10",
    "warm-start.cache": "",
    "packing.row-length": "128",
    "packing.block-size": "32",
    "packing.rows": "2",
    "pool.take-timeout-s": "60",
    "pool.window.in-flight": "6",
    "pool.window.groups-per-step": str(GROUPS_PER_STEP),
    "engine.slots": "8",
    "engine.max-context": "128",
    "gateway.port": "0",
    "agent.kind": "worker",
    "tasks.eval-tasks": "12",
}
_BEGUN = re.compile(r"^\[ *[\dhms.]+\] (?!note:)([a-z ]+)(?:: .*)? \.\.\.$")  # how progress tells of a phase
_ENDED = re.compile(r"^\[ *[\dhms.]+\] ([a-z ]+) (?:done|failed) in ")
LISTS = ("--engine.prefill-buckets", "64", "--agent.command", sys.executable, "tests/run/tiny_agent.py")


class Stage:
    """Where a campaign's runs are played: its folder, the run's options, and the process that has played the last."""

    def __init__(self, root: Path, further: Sequence[str]) -> None:
        self.root = root
        self.run = root / NAME
        self.options = [*(f"--{key}={text}" for key, text in OPTIONS.items()), *LISTS, *further]
        self._session: Session | None = None

    def session(self) -> Session:
        """A process to play the next run: the last one's, unless that is gone or has played many."""
        last = self._session
        if last is None or not last.alive or last.runs >= RUNS_PER_PROCESS:
            self.close()
            last = self._session = Session()
        return last

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class Attempt:
    """One start of the run: anew where there is none, else from where its last end has left it."""

    def __init__(self, stage: Stage, *, steps: int, options: Sequence[str] = (), plots: bool = False) -> None:
        self.run = stage.run
        self.log = stage.root / "log"
        self.log.write_bytes(b"")
        self._left = list_unfinished(stage.run)  # by ends before
        begun = ["--resume=" + NAME] if self.run.exists() else stage.options
        self.session = stage.session()
        arguments = [f"--run.root={stage.root}", f"--run.steps={steps}", *begun, *options]
        self.session.begin(arguments, self.log, plots=plots)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def over(self) -> bool:
        return self.session.poll() is not None

    def until(self, seen: Callable[[], bool], seconds: float = START_S) -> None:
        """Waits until it is seen, the run is over or the time is."""
        end = time.monotonic() + seconds
        while not (seen() or self.over or time.monotonic() > end):
            time.sleep(0.005)

    def until_said(self, words: str, *, again: bool = False) -> None:
        before = self.output.count(words) if again else 0
        self.until(lambda: self.output.count(words) > before)

    def until_at(self, where: str) -> None:
        """Waits until it is in its warm start, in its training, or there in an evaluation or a save."""
        self.until_said("warm start: " if where == "warm start" else "training: ")
        if where == EVALUATING:
            self.until_said("evaluating: ", again=True)
        if where == SAVING:
            self.until(lambda: self.saving, 60.0)

    @property
    def saving(self) -> bool:
        """Whether there is a checkpoint that this attempt has begun and not sealed."""
        return not list_unfinished(self.run) <= self._left

    @property
    def doing(self) -> tuple[str, ...]:
        """The phase that it is in, as it tells itself, and whether it saves."""
        return (find_phase(self.output), *([SAVING] if self.saving else []))

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.session.process_id, number)

    def wait(self, seconds: float = END_S) -> End | None:
        """How it ended; None where it does not, and is killed."""
        if (end := self.session.poll(seconds)) is None:
            self.session.kill()
        return end

    @property
    def tail(self) -> str:
        return self.output[-600:]


def find_phase(output: str) -> str:
    """The innermost phase that a run is in, by the lines it tells its progress with."""
    phases = []
    for line in output.splitlines():
        if (begun := _BEGUN.match(line)) and begun[1] not in phases:  # of a long one it tells again
            phases.append(begun[1])
        elif (ended := _ENDED.match(line)) and ended[1] in phases:
            phases.remove(ended[1])
    return phases[-1] if phases else "starting"
