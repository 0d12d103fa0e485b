"""``scripts/train.py`` as its users meet it: what it says, what it leaves behind, and what a signal does to it."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pty
import re
import shutil
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
from forgejax.run import preflight, rundir
from forgejax.run.config import TrainConfig, load_config, to_mapping
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
        resumed = any(argument.startswith("--resume") for argument in arguments)
        common = (f"--config={QUICKSTART}", *SHRUNK, "--run.root=runs") if shrunk and not resumed else ()
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
        resumed = any(argument.startswith("--resume") for argument in arguments)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *([] if resumed else [f"--config={QUICKSTART}"]), *arguments],
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
    assert process.output.startswith(f"checking a run by {QUICKSTART} and this machine, before anything is begun ...\n")
    assert "train.py: mesh v5e-64 needs 64 v5e chips; this machine has no TPU and no GPU" in process.output
    assert "Traceback" not in process.output
    assert not (tmp_path / "runs").exists()


def test_a_missing_configuration_is_one_line_and_status_1(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--config", "gone.toml", shrunk=False) == 1
    assert capsys.readouterr().err.splitlines() == [
        "train.py: there is no configuration file gone.toml; there are: none in ., and none in configs"
    ]


def test_a_mistyped_option_is_status_2_and_leaves_no_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train("--run.step=3")
    assert caught.value.code == 2
    assert "--run.steps" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--agent.kind=worker", "--agent.command", "nosuchprogram"], '"nosuchprogram" is not an executable file'),
        (["--agent.kind=process", "--agent.command", "python", "gone.py"], "there is no file gone.py in"),
        (["--run.seed=-1"], "run.seed is -1; expected 0 to 4294967295"),
        (["--run.name=../escape"], "run.name is '../escape'; expected the name of one folder"),
        (["--policy.d-model=1000000"], "GiB of memory at least, and this machine has"),
        (["--mesh=cpu-1000"], "mesh cpu-1000 asks for 1000 fake devices"),
        (["--tasks.eval-tasks=1000000000"], "eval_tasks is 1000000000 and the datasets have"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_and_leaves_nothing_behind(
    train: Train, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert train(*options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and sentence in line
    assert list(Path().iterdir()) == []


def test_ctrl_c_before_the_run_is_one_sentence_too(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "check_run", press)
    assert train() == 130
    assert capsys.readouterr().err == "train.py: interrupted before it began\n"
    assert list(Path().iterdir()) == []


def test_help_is_one_screen_that_begins_with_what_people_use(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--help", shrunk=False) == 0
    page = capsys.readouterr().out
    lines = page.splitlines()

    assert len(lines) <= 32 and max(map(len, lines)) <= 120
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert options[:3] == ["--config", "--resume", "--mesh"]
    sections = page.partition("Sections: ")[2].partition(".")[0]
    assert re.findall(r"\w+", sections) == [each.name for each in dataclasses.fields(TrainConfig)]


def test_help_on_a_section_lists_its_options_with_the_values_of_the_configuration(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--help", "warm-start", f"--config={QUICKSTART}", "--warm-start.steps=77", shrunk=False) == 0
    printed = capsys.readouterr().out
    assert "--warm-start.steps INT" in printed and "(default: 77)" in printed
    assert train("--help=polcy", f"--config={QUICKSTART}", shrunk=False) == 1
    assert "did you mean 'policy'?" in capsys.readouterr().err


def test_nothing_to_resume_is_told_with_what_there_is(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--resume") == 1
    assert "there is no run '' to resume under runs; runs there: none" in capsys.readouterr().err
    assert train("--resume=mine") == 1
    assert "there is no run 'mine' to resume" in capsys.readouterr().err


def test_two_trainers_never_share_a_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = rundir.create(Path("runs"), "mine", "")
    run.save_config(to_mapping(load_config(QUICKSTART, SHRUNK)))
    with contextlib.closing(run):
        assert train("--resume") == 1
    assert (
        f"another trainer (process {os.getpid()}) is at work in {Path('runs/mine').absolute()};"
        in capsys.readouterr().err
    )


def test_a_resumed_run_gets_the_devices_it_was_saved_with(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = rundir.create(Path("runs"), "pod", "")
    run.save_config(to_mapping(load_config(QUICKSTART, ["--mesh=v5e-64"])))
    run.close()

    assert train("--resume") == 1
    assert "mesh v5e-64 needs 64 v5e chips" in capsys.readouterr().err


def begun(*options: str) -> Path:
    """A run that has been started and has not got anywhere; its folder."""
    config = load_config(QUICKSTART, (*SHRUNK, *options))
    run = rundir.create(Path("runs"), "mine", "")
    run.save_config(to_mapping(config), preflight.digest_tokenizer(config.tokenizer_folder))
    run.close()
    return run.path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks.eval-tasks=3"], "would change tasks.eval_tasks (8 so far)"),
        (["--tasks.datasets.1.weight=7.5"], "would change tasks.datasets ([{"),
        (["--policy.d-model=32", "--run.seed=4"], "would change run.seed (0 so far), policy.d_model (16 so far)"),
        (["--run.name=yours"], 'would change run.name ("" so far)'),
        ([f"--config={QUICKSTART}"], "a resumed run goes by the configuration saved in it: leave --config out"),
        (["--run.steps=-3"], "run.steps is -3; expected 0 or more"),
        (["--agent.kind=process", "--", "nosuchprogram", "--fast"], "'nosuchprogram --fast': \"nosuchprogram\" is not"),
    ],
)
def test_a_resume_that_cannot_be_is_one_sentence_and_leaves_the_run_as_it_was(
    train: Train, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    run = begun()
    before = {file: file.read_bytes() for file in run.iterdir() if file.name != "lock"}

    assert train("--resume", *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and sentence in line
    assert {file: file.read_bytes() for file in run.iterdir() if file.name != "lock"} == before


def test_a_resume_with_another_tokenizer_in_the_same_place_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(REPOSITORY / "examples" / "quickstart" / "tokenizer", "tokenizer")
    begun("--tokenizer=tokenizer")
    with Path("tokenizer/tokenizer_config.json").open("a", encoding="utf-8") as file:
        file.write(" ")

    assert train("--resume") == 1
    assert "the tokenizer in tokenizer is not the one this run began with" in capsys.readouterr().err
    shutil.rmtree("tokenizer")
    assert train("--resume") == 1
    assert "tokenizer folder tokenizer does not exist; give a folder" in capsys.readouterr().err


def test_a_resume_takes_its_relative_paths_from_where_the_run_was_started(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It gets past the tokenizer, which lies there, to the agent, which does not."""
    shutil.copytree(REPOSITORY / "examples" / "quickstart" / "tokenizer", "tokenizer")
    begun("--tokenizer=tokenizer", "--agent.kind=process", "--", "python", "agent.py")
    (tmp_path / "elsewhere").mkdir()
    for where, name in (("elsewhere", "../runs/mine"), ("elsewhere", str(tmp_path / "runs/mine")), ("runs", "mine")):
        monkeypatch.chdir(tmp_path / where)
        assert train(f"--resume={name}", *([] if where == "elsewhere" else ["--run.root=."])) == 1
        assert f"there is no file agent.py in {tmp_path};" in capsys.readouterr().err


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
    train: Train, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(f"--resume={tmp_path / run}", f"--run.steps={stopped + 1}") == 0
    assert f"from step {stopped}, no step is lost; changed: run.steps 400 -> {stopped + 1}" in capfd.readouterr().out
    first, second = rundir.read_history(run)
    assert (first.step, first.changed) == (0, {})
    assert (second.step, second.steps_lost, second.changed) == (stopped, 0, {"run.steps": (400, stopped + 1)})
    assert (first.folder, second.folder) == (str(tmp_path), str(tmp_path))
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
    assert re.search(r"train.py: SIG(INT|TERM) has ended it at once; go on with --resume=mine\n", first.output)
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
    history = rundir.read_history(run)
    assert [attempt.step for attempt in history] == [0, 0, resumed_at]
    assert 0 <= history[-1].steps_lost <= steps - resumed_at
    summary, lines = read_summary(run), (run / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "learner/loss" in row] == list(range(1, steps + 1))
    assert (summary.steps, summary.account_open_tokens, summary.groups_open, summary.drift_tokens) == (steps, 0, 0, 0)
    assert set(summary.groups_not_trained) <= {"in_flight_at_end", "unused_at_end", "zero_advantage"}, "none has failed"
    with contextlib.closing(Journal.open(f"sqlite:///{run}/journal.sqlite")) as journal:
        taken = [(record.step, record.index) for record in journal.consumption() if record.kind == "taken"]
    trained = [index for step, index in taken if step < steps]
    assert len(trained) == len(set(trained)) == summary.groups_trained
    assert {step for step, _ in taken if step < steps} == set(range(steps))
