"""``scripts/train.py`` as its users meet it: what it says, what it leaves behind, and what a signal does to it."""

import contextlib
import importlib.util
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from forgejax.agents.scaffolds.guard import MARKER_NAME
from forgejax.pool.journal import Journal
from forgejax.report.final.summary import read_summary
from forgejax.report.sinks.jsonl import read_metrics
from forgejax.run import rundir
from forgejax.run.config import load_config, to_mapping
from tests.run.tiny_run import QUICKSTART, REPOSITORY, SHRUNK, compiled_once

SCRIPT = REPOSITORY / "scripts" / "train.py"
WORKER = ("--agent.kind=worker", "--agent.command", sys.executable, str(REPOSITORY / "tests" / "run" / "tiny_agent.py"))
pytestmark = pytest.mark.usefixtures(compiled_once.__name__)
Train = Callable[..., int]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Train]:
    """The program in this process: the exit status of a command line whose runs go to ``tmp_path/runs``."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    program = _program()

    def main(*arguments: str, shrunk: bool = True) -> int:
        common = (f"--config={QUICKSTART}", *SHRUNK, "--run.root=runs") if shrunk else ()
        monkeypatch.setattr(sys, "argv", ["train.py", *common, *arguments])
        status = program.main()
        assert isinstance(status, int)
        return status

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


class Process:
    """The program in a process of its own, its output in a file."""

    def __init__(self, folder: Path, compiled: Path, *arguments: str) -> None:
        self.log = folder / f"log-{time.monotonic_ns()}"
        # As many devices as this process has: what is compiled depends on it, and is not compiled again.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "PYTHONPATH": str(REPOSITORY),
        }
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), f"--config={QUICKSTART}", *arguments],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.id = self._process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, seen: Callable[[], bool], deadline_s: float = 90.0) -> None:
        """Waits; fails with its output where it ends before."""
        end = time.monotonic() + deadline_s
        while not seen():
            assert self._process.poll() is None and time.monotonic() < end, self.output
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, deadline_s: float = 90.0) -> int:
        return self._process.wait(deadline_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def agents(self) -> list[int]:
        """The ids of the live processes it started for its agents."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                marked = f"{MARKER_NAME}=".encode() in (path / "environ").read_bytes()
                mine = _parent(Path(f"/proc/{_parent(path)}")) == self.id  # its parent is its keeper
                if marked and "tiny_agent" in (path / "cmdline").read_text() and mine:
                    found.append(int(path.name))
        return found


def _parent(path: Path) -> int:
    return int((path / "stat").read_text().rpartition(")")[2].split()[1])


def _alive(process_id: int) -> bool:
    try:
        return "Z" not in (Path("/proc") / str(process_id) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def rows(path: Path) -> list[int]:
    """The steps of a run that have a row of metrics."""
    return [int(row["step"]) for row in read_metrics(path) if "learner/loss" in row] if path.exists() else []


def test_a_pod_that_is_not_there_is_told_at_once_and_nothing_is_left_behind(
    tmp_path: Path, compiled_once: Path
) -> None:
    began = time.monotonic()
    process = Process(tmp_path, compiled_once, "--mesh=v5e-64")

    assert process.wait() == 1
    assert time.monotonic() - began < 15
    assert "train.py: mesh v5e-64 needs 64 v5e chips; this machine has no TPU and no GPU" in process.output
    assert "Traceback" not in process.output
    assert not (tmp_path / "runs").exists()


def test_a_missing_configuration_is_one_line_and_status_1(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--config", "gone.toml", shrunk=False) == 1
    assert capsys.readouterr().err.splitlines() == [
        "train.py: there is no configuration file gone.toml; TOML files in that folder: none"
    ]


def test_a_mistyped_option_is_status_2_and_leaves_no_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train("--run.step=3")
    assert caught.value.code == 2
    assert "--run.steps" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_nothing_to_resume_is_told_with_what_there_is(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--resume") == 1
    assert "there is no run '' to resume under runs; runs there: none" in capsys.readouterr().err
    assert train("--resume=mine") == 1
    assert "there is no run 'mine' to resume" in capsys.readouterr().err


def test_two_trainers_never_share_a_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = rundir.create(Path("runs"), "mine", "")
    run.save_config({})
    with contextlib.closing(run):
        assert train("--resume") == 1
    assert f"another trainer (process {os.getpid()}) is at work in runs/mine" in capsys.readouterr().err


def test_a_resumed_run_gets_the_devices_it_was_saved_with(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = rundir.create(Path("runs"), "pod", "")
    run.save_config(to_mapping(load_config(QUICKSTART, ["--mesh=v5e-64"])))
    run.close()

    assert train(f"--config={QUICKSTART}", "--resume", shrunk=False) == 1
    assert "mesh v5e-64 needs 64 v5e chips" in capsys.readouterr().err


def test_a_terminal_gets_its_cursor_back_and_what_is_none_gets_nothing() -> None:
    terminal, end = pty.openpty()
    file, write = os.pipe()
    for descriptor in (end, write):
        _program()._show_cursor(descriptor)
    assert os.read(terminal, 100).startswith(b"\x1b[?25h")
    for descriptor in (terminal, end, write):
        os.close(descriptor)
    assert os.read(file, 100) == b""
    os.close(file)


def test_ctrl_c_ends_the_run_after_its_step_and_resume_finishes_it(
    train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    run, pressed_at = Path("runs/quickstart-1"), []

    def press() -> None:
        while not (run / "metrics.jsonl").exists() or not rows(run):
            time.sleep(0.01)
        pressed_at.append(rows(run)[-1])
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press, daemon=True)
    presser.start()
    assert train("--run.steps=400", "--tasks.eval-tasks=0", "--run.checkpoint-every=0") == 130
    presser.join()
    stopped = rows(run)[-1]
    assert stopped <= pressed_at[0] + 3, "the row is a step late, and the signal finds its thread in another"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(stopped)]
    printed = capfd.readouterr().out
    assert "stopping after this step; Ctrl-C again ends at once" in printed
    assert f"stopped after step {stopped}; go on with --resume=quickstart-1" in printed
    assert read_summary(run).account_open_tokens == 0

    assert train("--resume", f"--run.steps={stopped + 1}") == 0
    saved = json.loads(Path("runs/quickstart-1/config.json").read_text(encoding="utf-8"))
    assert saved["run"]["steps"] == stopped + 1, "the next resume knows of it too"
    summary = read_summary(run)
    assert rows(run) == list(range(1, stopped + 2))
    assert (summary.steps, summary.account_open_tokens, summary.groups_open, summary.drift_tokens) == (
        stopped + 1,
        0,
        0,
        0,
    )


@pytest.mark.timeout(400)
def test_kills_lose_nothing_and_train_nothing_twice(tmp_path: Path, compiled_once: Path) -> None:
    steps, run = 30, tmp_path / "runs" / "mine"
    tiny = (*SHRUNK, "--tasks.eval-tasks=2", "--run.checkpoint-every=4", "--run.root=runs")

    first = Process(tmp_path, compiled_once, *tiny, *WORKER, "--run.name=mine", f"--run.steps={steps}")
    first.until(lambda: "training: " in first.output)
    first.send(signal.SIGINT)
    first.send(signal.SIGTERM)
    assert first.wait(10) == 130
    assert not list((run / "checkpoints").glob("*/state")), "it ended before its first checkpoint"

    second = Process(tmp_path, compiled_once, "--run.root=runs", "--resume=mine")
    second.until(lambda: len(rows(run)) >= 6)
    agents = second.agents()
    second.kill()
    assert len(agents) == 1
    deadline = time.monotonic() + 10
    while any(map(_alive, agents)):
        assert time.monotonic() < deadline, "the agents outlive their trainer"
        time.sleep(0.05)

    last = Process(tmp_path, compiled_once, "--run.root=runs", "--resume")
    assert last.wait() == 0, last.output

    resumed_at = int(re.findall(r"resumed from the checkpoint of step (\d+)", last.output)[0])
    assert resumed_at % 4 == 0 and 4 <= resumed_at < steps
    summary, lines = read_summary(run), (run / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "learner/loss" in row] == list(range(1, steps + 1))
    assert (summary.steps, summary.account_open_tokens, summary.groups_open, summary.drift_tokens) == (steps, 0, 0, 0)
    assert set(summary.groups_not_trained) <= {"in_flight_at_end", "unused_at_end", "zero_advantage"}, "none has failed"
    with contextlib.closing(Journal.open(f"sqlite:///{run}/journal.sqlite")) as journal:
        taken = [(record.step, record.index) for record in journal.consumption() if record.kind == "taken"]
    trained = [index for step, index in taken if step < steps]
    assert len(trained) == len(set(trained)) == summary.groups_trained
    assert {step for step, _ in taken if step < steps} == set(range(steps))
