"""Ends a small run again and again, goes on with it each time, and checks what each end has left.

    python scripts/breaking/break_runs.py ends 300      it finishes, or gets Ctrl-C or SIGTERM, alone or with all of its
    python scripts/breaking/break_runs.py kills 100     kill -9 at any moment: start, warm start, step, evaluation, save
    python scripts/breaking/break_runs.py workers 20    kill -9 of the agent worker alone: the run must go on
    python scripts/breaking/break_runs.py engines 10    kill -9 of one of two inference servers, SIGSTOP of the other

Further options go to the run, for instance ``--agent.kind=process --agent.command python my_agent.py``. It prints a
line for each end, and at last how many of them left something wrong; the exit status says whether any did. What is
checked: no token and no group is unaccounted for, each step has its groups and its row once, nothing that was in flight
has failed, no process is left, and in the trainer's own process, if that lives on, no thread and no open file. Now and
then the run is thrown away and begun anew, to be ended in its warm start. Programs are kept where
``JAX_COMPILATION_CACHE_DIR`` says, below the root by default.

The trainer's processes are forked from this one, with the imports behind them, and call ``scripts/train.py``'s main: up
to twenty runs one after another, where the end leaves the process. Plots are drawn by the runs that finish.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from _attempts import Attempt, Stage
from _audit_run import MARK, audit, find_marked, last_row

MANY = 1_000_000
WHERE = ("training", "training", "training", "evaluating", "evaluating", "saving", "saving", "warm start")
PAUSES = {"training": 2.0, "evaluating": 0.4, "saving": 0.02, "warm start": 2.0, "starting": 6.0}  # seconds at most
KINDS = ("finish", "SIGINT", "SIGTERM", "SIGTERM to all")


def end_in_order(stage: Stage, chance: random.Random) -> tuple[str, list[str]]:
    """One ordinary end: how it came about, and what it left wrong."""
    kind = chance.choice(KINDS)
    where = "at its last step" if kind == "finish" else chance.choice(WHERE)
    if where == "warm start":
        shutil.rmtree(stage.run, ignore_errors=True)
    trained = last_row(stage.run)
    steps = trained + chance.randint(1, 4) if kind == "finish" else MANY
    attempt = Attempt(stage, steps=steps, plots=kind == "finish")
    if kind != "finish":
        attempt.until_at(where)
        time.sleep(chance.uniform(0.0, PAUSES[where]))
        if kind == "SIGTERM to all":  # as Slurm, systemd and others end a job
            for process_id in find_marked(stage.root):
                _signal(process_id, signal.SIGTERM)
        else:
            attempt.send(signal.Signals[kind])
    asked_at = time.monotonic()
    end = attempt.wait()
    took = f"in {time.monotonic() - asked_at:.1f} s" if kind != "finish" else "by itself"
    how = f"{kind} {where}, ended {took}, step {trained} -> {last_row(stage.run)}"
    if end is None or end.status != (0 if kind == "finish" else 130):
        return how, [f"ended as {end}: {attempt.tail}"]
    # Where nothing can be stopped in order yet, the process ends at once, and there is no summary.
    reported = not end.exited
    early = where == "warm start" or "training: " not in attempt.output
    wrong = [] if reported or early else [f"it ended at once: {attempt.tail}"]
    return how, [*wrong, *end.left, *audit(stage.root, ended=reported, spared=[attempt.session.process_id])]


def end_by_force(stage: Stage, chance: random.Random) -> tuple[str, list[str]]:
    """One kill -9: where it fell, and what it left wrong."""
    where = chance.choice((*WHERE, "starting"))
    if where == "warm start":
        shutil.rmtree(stage.run, ignore_errors=True)
    trained = last_row(stage.run)
    attempt = Attempt(stage, steps=MANY)
    if where != "starting":
        attempt.until_at(where)
    time.sleep(chance.uniform(0.0, PAUSES[where]))
    over = attempt.over
    attempt.session.kill()
    wrong = [f"it had ended by itself: {attempt.tail}"] if over else []
    wrong += audit(stage.root, ended=False)
    return f"{where}, step {trained} -> {last_row(stage.run)}", wrong


def end_worker(stage: Stage, chance: random.Random) -> tuple[str, list[str]]:
    """One kill -9 of the agent worker: the run must come to its end all the same, and its account be closed."""
    trained = last_row(stage.run)
    attempt = Attempt(stage, steps=trained + 60)
    attempt.until_said(chance.choice(["training: ", "evaluating: "]))
    time.sleep(chance.uniform(0.0, 2.0))
    mine = set(find_marked(stage.root, "tiny_agent.py")) - {attempt.session.process_id}
    spared = set(find_marked(stage.root, "keeper.py")) if chance.random() < 0.5 else set()
    killed = [process_id for process_id in mine - spared if _signal(process_id, signal.SIGKILL)]
    wrong = _audit_end(stage, attempt, status=0)
    if "could not be scored" in attempt.output:
        wrong.append("an evaluation scored fewer tasks than it says")
    return f"killed {killed}, step {trained} -> {last_row(stage.run)}", wrong


def end_engines(stage: Stage, chance: random.Random) -> tuple[str, list[str]]:
    """Two servers: one is killed and, a while later, one is stopped; the run must go on and be ended in order."""
    servers = ("--rollout.engines=2", "--rollout.silence-s=6", "--rollout.max-restarts=100")
    trained = last_row(stage.run)
    attempt = Attempt(stage, steps=MANY, options=servers)
    attempt.until_said("training: ")
    done = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        time.sleep(chance.uniform(0.0, 4.0))
        there = find_marked(stage.root, "forgejax.run.serving")
        process_id = chance.choice(there) if there else 0
        if there and not attempt.over and _signal(process_id, number):
            done.append(f"{number.name} {process_id}")
        attempt.until(lambda: attempt.output.count("is lost: ") == len(done), 60.0)
    lost_at = last_row(stage.run)
    attempt.until(lambda: last_row(stage.run) > lost_at + 20)
    attempt.send(signal.SIGINT)
    wrong = _audit_end(stage, attempt, status=130)
    if len(done) < 2 or attempt.output.count("is lost: ") != 2:
        wrong.append(f"not each of two was lost once: {attempt.tail}")
    return f"{', '.join(done)}, step {trained} -> {last_row(stage.run)}", wrong


def _audit_end(stage: Stage, attempt: Attempt, *, status: int) -> list[str]:
    end = attempt.wait()
    if end is None or end.exited or end.status != status:
        return [f"ended as {end}: {attempt.tail}"]
    return [*end.left, *audit(stage.root, ended=True, spared=[attempt.session.process_id])]


def _signal(process_id: int, number: signal.Signals) -> bool:
    with contextlib.suppress(OSError):
        os.kill(process_id, number)
        return True
    return False


PLAYS = {"ends": end_in_order, "kills": end_by_force, "workers": end_worker, "engines": end_engines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(PLAYS))
    parser.add_argument("count", type=int)
    parser.add_argument("--root", type=Path, default=Path("runs/broken"), help="is emptied first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no further one is begun")
    given, further = parser.parse_known_args()
    root, chance, bad, began = given.root.absolute(), random.Random(given.seed), 0, time.monotonic()
    _mark_this_process(root)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    stage, number = Stage(root, further), 0
    while number < given.count and time.monotonic() - began < given.until:
        number += 1
        how, wrong = PLAYS[given.what](stage, chance)
        bad += bool(wrong)
        print(f"[{time.monotonic() - began:7.1f} s] {number}: {how}: {'; '.join(wrong) or 'all is well'}", flush=True)
    if given.what == "kills":
        wrong = _audit_end(stage, Attempt(stage, steps=last_row(stage.run) + 5), status=0)
        bad += bool(wrong)
        print(f"[{time.monotonic() - began:7.1f} s] finished: {'; '.join(wrong) or 'all is well'}", flush=True)
    stage.close()
    print(f"{given.what}: {bad} of {number} left something wrong")
    return int(bad > 0)


def _mark_this_process(root: Path) -> None:
    """Begins anew with the environment that its forks are to be known by, and jax to find its settings in."""
    if os.environ.get(MARK) == str(root):
        return
    environment = {"JAX_COMPILATION_CACHE_DIR": str(root.parent / f"{root.name}-compiled")} | os.environ
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", MARK: str(root)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    sys.exit(main())
