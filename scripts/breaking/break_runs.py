"""Ends a small run again and again, goes on with it each time, and checks what each end has left.

    python scripts/breaking/break_runs.py ends 300      it finishes, or gets Ctrl-C or SIGTERM, alone or with all of its
    python scripts/breaking/break_runs.py kills 100     kill -9 anywhere, of the trainer alone or with its agents' guard
    python scripts/breaking/break_runs.py workers 20    kill -9 of the agent worker alone: the run must go on
    python scripts/breaking/break_runs.py engines 10    kill -9 of one of two inference servers, SIGSTOP of the other
    python scripts/breaking/break_runs.py table 0       the results there are, as a table

Further options go to the run, for instance ``--agent.kind=process --agent.command python my_agent.py``. Each end is a
line here and one of ``RESULTS`` in the root, which a later call goes on with; the exit status says whether any left
something wrong. What is checked: no token and no group is unaccounted for, each step has its groups and its row once,
nothing that was in flight has failed, no process is left, and in the trainer's own process, if that lives on, no thread
and no open file. Now and then the run is begun anew, to be ended in its warm start; where it has been killed, it is
played to its end before, and its accounts must close. Programs are kept where ``JAX_COMPILATION_CACHE_DIR`` says,
beside the root by default.

The trainer's processes are forked from this one, with the imports behind them, and call ``scripts/train.py``'s main: up
to twenty runs one after another, where the end leaves the process. A run in ten that finish draws its plots.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from _attempts import Attempt, Stage
from _audit_run import MARK, audit, find_marked, last_row
from _results import Result, append_result, lay_table, read_results
from _session import REPOSITORY, End

RESULTS = "results.jsonl"
MANY = 1_000_000
WHERE = ("training", "training", "training", "evaluating", "evaluating", "saving", "saving", "warm start")
PAUSES = {"training": 3.0, "evaluating": 0.3, "saving": 0.01, "warm start": 2.0, "starting": 6.0}  # seconds at most
ENDS = ("finish", "SIGINT", "SIGTERM", "SIGTERM to all")
KILLS = ("SIGKILL", "SIGKILL", "SIGKILL with the guard")
TO_THE_END = "played to its end"


class Play:
    """One end of the run: what came, when, and what is wrong after it."""

    def __init__(self, stage: Stage, kind: str) -> None:
        self.stage, self.kind = stage, kind
        self.began, self.before = time.monotonic(), last_row(stage.run)
        self.hit: tuple[str, ...] = ("going on",)
        self.after = self.before
        self.closed = False
        self.took = 0.0
        self.wrong: list[str] = []

    def audit(self, attempt: Attempt, end: End | None, status: int, *, early: bool = False) -> None:
        """Looks at what an orderly end has left. ``early``: nothing could be stopped in order yet, so that the process
        may have ended at once, without a summary."""
        self.after = last_row(self.stage.run)
        if end is None or end.status != status or (end.exited and not early):
            self.wrong.append(f"ended as {end}: {attempt.tail}")
            return
        self.closed = not end.exited
        spared = [attempt.session.process_id]
        self.wrong += [*end.left, *audit(self.stage.root, ended=self.closed, spared=spared)]

    def result(self, what: str, number: int, commit: str) -> Result:
        return Result(
            number=number,
            what=what,
            kind=self.kind,
            hit=self.hit,
            steps=(self.before, self.after),
            closed=self.closed,
            took_s=round(self.took, 2),
            whole_s=round(time.monotonic() - self.began, 1),
            commit=commit,
            wrong=tuple(self.wrong),
        )


def end_in_order(stage: Stage, chance: random.Random) -> list[Play]:
    """One ordinary end."""
    kind = chance.choice(ENDS)
    where = chance.choice(WHERE)
    if where == "warm start" and kind != "finish":
        shutil.rmtree(stage.run, ignore_errors=True)
    play = Play(stage, kind)
    if kind == "finish":
        return [_finish(play, chance, steps=chance.randint(1, 4))]
    attempt = Attempt(stage, steps=MANY)
    attempt.until_at(where)
    time.sleep(chance.uniform(0.0, PAUSES[where]))
    play.hit = attempt.doing
    asked_at = time.monotonic()
    if kind == "SIGTERM to all":  # as Slurm, systemd and others end a job
        for process_id in find_marked(stage.root):
            _signal(process_id, signal.SIGTERM)
    else:
        attempt.send(signal.Signals[kind])
    end = attempt.wait()
    play.took = time.monotonic() - asked_at
    play.audit(attempt, end, 130, early="training: " not in attempt.output)
    return [play]


def end_by_force(stage: Stage, chance: random.Random) -> list[Play]:
    """One kill -9; before a run is thrown away that was killed, it is played to its end."""
    kind, where, plays = chance.choice(KILLS), chance.choice((*WHERE, "starting")), []
    if where == "warm start" and stage.run.exists():
        plays.append(_finish(Play(stage, TO_THE_END), chance, steps=2))
        shutil.rmtree(stage.run)
    play = Play(stage, kind)
    attempt = Attempt(stage, steps=MANY)
    if where != "starting":
        attempt.until_at(where)
    time.sleep(chance.uniform(0.0, PAUSES[where]))
    if attempt.over:
        play.wrong.append(f"it had ended by itself: {attempt.tail}")
    asked_at = time.monotonic()
    for process_id in find_marked(stage.root, "guard.py") if kind == "SIGKILL with the guard" else ():
        _signal(process_id, signal.SIGKILL)
    attempt.session.kill()
    play.took = time.monotonic() - asked_at
    play.hit = attempt.doing
    play.after = last_row(stage.run)
    play.wrong += audit(stage.root, ended=False)
    return [*plays, play]


def _finish(play: Play, chance: random.Random, *, steps: int) -> Play:
    """Goes on with the run for so many steps, to its end."""
    attempt = Attempt(play.stage, steps=play.before + steps, plots=chance.random() < 0.1)
    play.hit = ("at its last step",)
    play.audit(attempt, attempt.wait(), 0)
    play.took = time.monotonic() - play.began
    return play


def end_worker(stage: Stage, chance: random.Random) -> list[Play]:
    """One kill -9 of the agent worker: the run must come to its end all the same, and its account be closed."""
    spare = chance.random() < 0.5
    play = Play(stage, "SIGKILL of the worker" if spare else "SIGKILL of the worker and its keeper")
    attempt = Attempt(stage, steps=play.before + 30)
    attempt.until_said(chance.choice(["training: ", "evaluating: "]))
    time.sleep(chance.uniform(0.0, 2.0))
    mine = set(find_marked(stage.root, "tiny_agent.py")) - {attempt.session.process_id}
    spared = set(find_marked(stage.root, "keeper.py")) if spare else set()
    play.hit = attempt.doing
    asked_at = time.monotonic()
    if not [process_id for process_id in mine - spared if _signal(process_id, signal.SIGKILL)]:
        play.wrong.append("there was no worker to kill")
    play.audit(attempt, attempt.wait(), 0)
    play.took = time.monotonic() - asked_at
    if "could not be scored" in attempt.output:
        play.wrong.append("an evaluation scored fewer tasks than it says")
    return [play]


def end_engines(stage: Stage, chance: random.Random) -> list[Play]:
    """Two servers: one is killed and, a while later, one is stopped; the run must go on and be ended in order."""
    servers = ("--rollout.engines=2", "--rollout.silence-s=6", "--rollout.max-restarts=100")
    play = Play(stage, "SIGKILL of a server, SIGSTOP of a server")
    attempt = Attempt(stage, steps=MANY, options=servers)
    attempt.until_said("training: ")
    play.hit = attempt.doing
    for lost, number in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
        time.sleep(chance.uniform(0.0, 4.0))
        there = find_marked(stage.root, "forgejax.run.serving")
        if there and not attempt.over:
            _signal(chance.choice(there), number)
        attempt.until(lambda lost=lost: attempt.output.count("is lost: ") >= lost, 60.0)  # type: ignore[misc]
    lost_at = last_row(stage.run)
    attempt.until(lambda: last_row(stage.run) > lost_at + 20)
    asked_at = time.monotonic()
    attempt.send(signal.SIGINT)
    play.audit(attempt, attempt.wait(), 130)
    play.took = time.monotonic() - asked_at
    if attempt.output.count("is lost: ") != 2:
        play.wrong.append(f"not each of two was lost once: {attempt.tail}")
    return [play]


def _signal(process_id: int, number: signal.Signals) -> bool:
    with contextlib.suppress(OSError):
        os.kill(process_id, number)
        return True
    return False


PLAYS = {"ends": end_in_order, "kills": end_by_force, "workers": end_worker, "engines": end_engines}


def _count(results: list[Result], what: str) -> int:
    """How many of the ends asked for there have been: orderly ones with an account, kills of any kind."""
    mine = [result for result in results if result.what == what and result.kind != TO_THE_END]
    return sum(result.closed or bool(result.wrong) or what == "kills" for result in mine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*PLAYS, "table"))
    parser.add_argument("count", type=int, help="orderly ends with an account that must be closed, or kills")
    parser.add_argument("--root", type=Path, default=Path("runs/broken"), help=f"of the runs and {RESULTS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no further one is begun")
    given, further = parser.parse_known_args()
    root, began = given.root.absolute(), time.monotonic()
    results = read_results(root / RESULTS)
    if given.what != "table":
        _mark_this_process(root)
        root.mkdir(parents=True, exist_ok=True)
        commit, stage = _name_commit(), Stage(root, further)
        while _count(results, given.what) < given.count and time.monotonic() - began < given.until:
            chance = random.Random(f"{given.seed} {given.what} {len(results)}")
            for play in PLAYS[given.what](stage, chance):
                _keep(play, given.what, commit, results)
        if given.what == "kills" and stage.run.exists():
            _keep(_finish(Play(stage, TO_THE_END), random.Random(), steps=2), given.what, commit, results)
        stage.close()
    print("\n".join(lay_table(results)))
    return int(any(result.wrong for result in results))


def _keep(play: Play, what: str, commit: str, results: list[Result]) -> None:
    result = play.result(what, len(results) + 1, commit)
    results.append(result)
    append_result(play.stage.root / RESULTS, result)
    print(f"[{result.whole_s:5.1f} s] {result.describe()}", flush=True)


def _name_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()


def _mark_this_process(root: Path) -> None:
    """Begins anew with the environment that its forks are to be known by, and jax to find its settings in."""
    if os.environ.get(MARK) == str(root):
        return
    environment = {"JAX_COMPILATION_CACHE_DIR": str(root.parent / f"{root.name}-compiled")} | os.environ
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", MARK: str(root)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    sys.exit(main())
