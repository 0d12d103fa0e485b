"""Ends a small run again and again, goes on with it each time, and checks what each end has left.

    python scripts/break_runs.py ends 300       it finishes, or gets Ctrl-C or SIGTERM, alone or with all its processes
    python scripts/break_runs.py kills 100      kill -9 at any moment: starting, warm start, training, evaluation, save
    python scripts/break_runs.py workers 20     kill -9 of the agent worker alone: the run must go on
    python scripts/break_runs.py engines 10     kill -9 of one of two inference servers, SIGSTOP of the other: the same

Further options go to the run, for instance ``--agent.kind=process --agent.command python my_agent.py``. It prints a
line for each end, and at last how many of them left something wrong; the exit status says whether any did. What is
checked: no token and no group is unaccounted for, each step has its groups and its row once, nothing that was in flight
has failed, and no process is left. Now and then the run is thrown away and begun anew, to be ended in its warm start.
Programs are kept where ``JAX_COMPILATION_CACHE_DIR`` says, below the root by default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forgejax.pool.journal import Journal
from forgejax.pool.schema import sqlite_url

REPOSITORY = Path(__file__).resolve().parents[1]
MARK = "FORGEJAX_BREAK_RUNS"
NAME = "broken"
MANY = 1_000_000
GROUPS_PER_STEP = 2
START_S, END_S, ORPHANS_S = 240.0, 120.0, 5.0
WHERE = ("training", "training", "training", "evaluating", "evaluating", "saving", "saving", "warm start")
PAUSES = {"training": 4.0, "evaluating": 0.4, "saving": 0.02, "warm start": 2.0, "starting": 12.0}  # seconds at most
OPTIONS = {
    "tokenizer": "examples/quickstart/tokenizer",
    "mesh": "cpu-2",
    "run.name": NAME,
    "run.group-size": "4",
    "run.eval-every": "12",
    "run.checkpoint-every": "5",
    "run.probe-every": "3",
    "policy.num-layers": "1",
    "policy.d-model": "16",
    "policy.num-heads": "2",
    "policy.num-kv-heads": "1",
    "policy.d-ff": "32",
    "warm-start.steps": "30",
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
    "tasks.eval-tasks": "24",
}
LISTS = ("--engine.prefill-buckets", "64", "--agent.command", sys.executable, "tests/run/tiny_agent.py")


class Attempt:
    """One start of the run, in a process group of its own."""

    def __init__(self, root: Path, options: Sequence[str], *, steps: int) -> None:
        self.run = root / NAME
        arguments = ["--resume=" + NAME] if self.run.exists() else options
        self.log = root / "log"
        environment = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")} | os.environ
        environment |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            MARK: str(root),
        }
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "scripts/train.py", f"--run.root={root}", f"--run.steps={steps}", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def until(self, seen: Callable[[], bool], seconds: float = START_S) -> None:
        """Waits until it is seen, the run is over or the time is."""
        end = time.monotonic() + seconds
        while not (seen() or self.over or time.monotonic() > end):
            time.sleep(0.002)

    def until_said(self, words: str, *, again: bool = False) -> None:
        before = self.output.count(words) if again else 0
        self.until(lambda: self.output.count(words) > before)

    def until_at(self, where: str) -> None:
        """Waits until it is in its warm start, in its training, or there in an evaluation or a save."""
        self.until_said("warm start: " if where == "warm start" else "training: ")
        if where == "evaluating":
            self.until_said("evaluating: ", again=True)
        if where == "saving":
            folder = self.run / "checkpoints"
            self.until(lambda: any(not path.name.isdigit() for path in folder.glob("*")), 60.0)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self) -> int | None:
        """Its exit status; None where it does not end, and is killed."""
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


def find_marked(root: Path, word: str = "") -> list[int]:
    """The processes that a run under ``root`` has left or has, with this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            marked = f"{MARK}={root}".encode() in (path / "environ").read_bytes()
            if marked and word in (path / "cmdline").read_text(errors="replace"):
                found.append(int(path.name))
    return found


def audit(root: Path, *, ended: bool) -> Iterator[str]:
    """What is wrong with the run after an end; ``ended``: in an orderly way, so that there is a summary."""
    deadline = time.monotonic() + ORPHANS_S
    while (left := find_marked(root)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        yield f"{len(left)} processes are left: {left}"
    if not (root / NAME / "journal.sqlite").exists():
        return
    with contextlib.closing(Journal.open(sqlite_url(root / NAME / "journal.sqlite"))) as journal:
        groups, consumed = journal.groups(), journal.consumption()
    states = Counter(group.state for group in groups)
    if [group.index for group in groups] != list(range(len(groups))):
        yield "indices are missing"
    if states["failed"] or (ended and states["dispatched"]):
        yield f"groups are lost: {dict(states)}, {Counter(group.reason for group in groups if group.reason)}"
    if len({record.index for record in consumed}) != len(consumed):
        yield "a group is consumed twice"
    if ended:
        sizes = Counter(record.step for record in consumed if record.kind == "taken")
        yield from _audit_figures(root / NAME, sizes)


def _audit_figures(run: Path, sizes: Counter[int]) -> Iterator[str]:
    summary = json.loads((run / "summary.json").read_text())
    steps, rows = summary["steps"], _trained_rows(run)
    if sorted(rows) != list(range(1, steps + 1)):
        yield f"the rows of {steps} steps are {rows[:3]}...{rows[-3:]} ({len(rows)})"
    if set(sizes) != set(range(steps)) or not set(sizes.values()) <= set(range(1, GROUPS_PER_STEP + 1)):
        yield f"{steps} steps have the groups {sizes.most_common(3)} of {len(sizes)} batches"
    groups_open = summary["groups_dispatched"] - summary["groups_trained"] - sum(summary["groups_not_trained"].values())
    for name, value in {
        "open tokens": summary["account_open_tokens"],
        "open groups": groups_open,
        "drift": summary["drift_tokens"],
    }.items():
        if value:
            yield f"{value} {name}: {summary['tokens_not_trained']}, {summary['groups_not_trained']}"


def _trained_rows(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if "learner/loss" in row]


def end_in_order(root: Path, options: Sequence[str], chance: random.Random) -> tuple[str, list[str]]:
    """One ordinary end: how it came about, and what it left wrong."""
    kind = chance.choice(["finish", "SIGINT", "SIGTERM", "SIGTERM to all"])
    where = "at its last step" if kind == "finish" else chance.choice(WHERE)
    if where == "warm start":
        shutil.rmtree(root / NAME, ignore_errors=True)
    trained = max(_trained_rows(root / NAME), default=0)
    attempt = Attempt(root, options, steps=trained + chance.randint(1, 4) if kind == "finish" else MANY)
    if kind != "finish":
        attempt.until_at(where)
        time.sleep(chance.uniform(0.0, PAUSES[where]))
        if kind == "SIGTERM to all":  # as Slurm, systemd and others end a job
            for process_id in find_marked(root):
                _end(process_id, signal.SIGTERM)
        else:
            attempt.send(signal.Signals[kind])
    asked_at = time.monotonic()
    status = attempt.wait()
    took = f"in {time.monotonic() - asked_at:.1f} s" if kind != "finish" else "by itself"
    reported = where != "warm start" or (root / NAME / "summary.json").exists()  # it may have been over by then
    wrong = list(audit(root, ended=reported)) if status in (0, 130) else []
    if status != (0 if kind == "finish" else 130):
        wrong.append(f"exit status {status}: {attempt.output[-600:]}")
    return f"{kind} {where}, ended {took}, step {trained} -> {max(_trained_rows(root / NAME), default=0)}", wrong


def end_by_force(root: Path, options: Sequence[str], chance: random.Random) -> tuple[str, list[str]]:
    """One kill -9: where it fell, and what it left wrong."""
    where = chance.choice((*WHERE, "starting"))
    if where == "warm start":
        shutil.rmtree(root / NAME, ignore_errors=True)
    trained = max(_trained_rows(root / NAME), default=0)
    attempt = Attempt(root, options, steps=MANY)
    if where != "starting":
        attempt.until_at(where)
    time.sleep(chance.uniform(0.0, PAUSES[where]))
    over = attempt.over
    attempt.kill()
    wrong = [f"it had ended by itself: {attempt.output[-600:]}"] if over else []
    wrong += audit(root, ended=False)
    return f"{where}, step {trained} -> {max(_trained_rows(root / NAME), default=0)}", wrong


def end_worker(root: Path, options: Sequence[str], chance: random.Random) -> tuple[str, list[str]]:
    """One kill -9 of the agent worker: the run must come to its end all the same, and its account be closed."""
    trained = max(_trained_rows(root / NAME), default=0)
    attempt = Attempt(root, options, steps=trained + 60)
    attempt.until_said(chance.choice(["training: ", "evaluating: "]))
    time.sleep(chance.uniform(0.0, 2.0))
    mine = set(find_marked(root, "tiny_agent.py")) - set(find_marked(root, "train.py"))
    spared = set(find_marked(root, "keeper.py")) if chance.random() < 0.5 else set()
    killed = [process_id for process_id in mine - spared if _end(process_id, signal.SIGKILL)]
    status = attempt.wait()
    wrong = list(audit(root, ended=True)) if status == 0 else [f"exit status {status}: {attempt.output[-600:]}"]
    if "could not be scored" in attempt.output:
        wrong.append("an evaluation scored fewer tasks than it says")
    return f"killed {killed}, step {trained} -> {max(_trained_rows(root / NAME), default=0)}", wrong


def end_engines(root: Path, options: Sequence[str], chance: random.Random) -> tuple[str, list[str]]:
    """Two servers: one is killed and, a while later, one is stopped; the run must go on and be ended in order."""
    servers = ("--rollout.engines=2", "--rollout.silence-s=6", "--rollout.max-restarts=100")
    trained = max(_trained_rows(root / NAME), default=0)
    attempt = Attempt(root, [*options, *servers], steps=MANY)
    attempt.until_said("training: ")
    done = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        time.sleep(chance.uniform(0.0, 4.0))
        there = find_marked(root, "forgejax.run.serving")
        process_id = chance.choice(there) if there else 0
        if there and not attempt.over and _end(process_id, number):
            done.append(f"{number.name} {process_id}")
        attempt.until(lambda: attempt.output.count("is lost: ") == len(done), 60.0)
    lost_at = max(_trained_rows(root / NAME), default=0)
    attempt.until(lambda: max(_trained_rows(root / NAME), default=0) > lost_at + 20)
    attempt.send(signal.SIGINT)
    status = attempt.wait()
    wrong = list(audit(root, ended=True)) if status == 130 else [f"exit status {status}: {attempt.output[-600:]}"]
    if len(done) < 2 or attempt.output.count("is lost: ") != 2:
        wrong.append(f"not each of two was lost once: {attempt.output[-600:]}")
    return f"{', '.join(done)}, step {trained} -> {max(_trained_rows(root / NAME), default=0)}", wrong


def _end(process_id: int, number: signal.Signals) -> bool:
    with contextlib.suppress(OSError):
        os.kill(process_id, number)
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ends", "kills", "workers", "engines"))
    parser.add_argument("count", type=int)
    parser.add_argument("--root", type=Path, default=Path("runs/broken"), help="is emptied first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no further one is begun")
    given, further = parser.parse_known_args()
    root, chance, bad, began = given.root.absolute(), random.Random(given.seed), 0, time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    options = [*(f"--{key}={text}" for key, text in OPTIONS.items()), *LISTS, *further]
    plays = {"ends": end_in_order, "kills": end_by_force, "workers": end_worker, "engines": end_engines}
    play = plays[given.what]
    number = 0
    while number < given.count and time.monotonic() - began < given.until:
        number += 1
        how, wrong = play(root, options, chance)
        bad += bool(wrong)
        print(f"[{time.monotonic() - began:7.1f} s] {number}: {how}: {'; '.join(wrong) or 'all is well'}", flush=True)
    if given.what == "kills":
        attempt = Attempt(root, options, steps=max(_trained_rows(root / NAME), default=0) + 5)
        wrong = [*([] if attempt.wait() == 0 else [attempt.output[-600:]]), *audit(root, ended=True)]
        bad += bool(wrong)
        print(f"[{time.monotonic() - began:7.1f} s] finished: {'; '.join(wrong) or 'all is well'}", flush=True)
    print(f"{given.what}: {bad} of {number} left something wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
