"""``scripts/launch.py``: several processes as one job on this machine."""

import importlib.util
import sys
import time
from types import ModuleType

import pytest

from tests.run.tiny_run import REPOSITORY


@pytest.fixture
def launch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_script", REPOSITORY / "scripts" / "launch.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


def test_every_line_stands_behind_the_number_of_its_process(
    launch: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch.run_job([python("print('first')"), python("print('second')")], grace_s=10.0) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] first", "[1] second"]


def test_when_one_fails_the_others_are_ended_and_its_code_is_the_jobs(
    launch: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    code = launch.run_job([python("import time; time.sleep(60)"), python("raise SystemExit(75)")], grace_s=0.5)
    assert code == 75 and time.monotonic() - began < 30
    assert "processes [0] have not ended within 0.5 s and are killed" in capfd.readouterr().err


def test_each_process_is_told_who_it_is_and_where_the_first_one_is(launch: ModuleType) -> None:
    first, second = launch.join_options(2, 0), launch.join_options(2, 1)
    assert first[:2] == second[:2] and first[0].startswith("--distributed.coordinator=127.0.0.1:")
    assert (first[1:], second[2]) == (
        ["--distributed.processes=2", "--distributed.process-id=0"],
        "--distributed.process-id=1",
    )
