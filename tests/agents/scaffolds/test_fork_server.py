"""Agents forked behind their imports play as those that are started."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forgejax.agents import AgentConfig, AgentResult, ProcessScaffold
from forgejax.agents.scaffolds import fork_server, keeper
from forgejax.agents.scaffolds.fork_server import read_python_command
from forgejax.environments import Workspace
from forgejax.errors import AgentError, ConfigError
from forgejax.types import StopReason
from tests.agents.fakes import is_running, make_episode

MODULE = "import os; made_by = os.getpid()"
PROGRAM = """
import os, random, sys
import slow_to_import
if __name__ == "__main__":
    print(sys.argv[1:], os.environ.get("OPENAI_BASE_URL"), os.getcwd(), os.environ.get("SEEN"))
    print(slow_to_import.made_by, os.getpid(), random.random(), sys.modules["__main__"].__file__)
"""


@contextlib.asynccontextmanager
async def started(config: AgentConfig) -> AsyncIterator[ProcessScaffold]:
    scaffold = ProcessScaffold(config)
    await scaffold.start()
    try:
        yield scaffold
    finally:
        await scaffold.close()
        assert keeper.find_descendants(os.getpid()) == []


def write_agent(folder: Path, source: str, **fields: object) -> AgentConfig:
    (folder / "slow_to_import.py").write_text(MODULE)
    script = folder / "agent.py"
    script.write_text(source)
    command = (sys.executable, "-u", str(script))
    return AgentConfig(kind="process", command=command, preload=("slow_to_import",), **fields)  # type: ignore[arg-type]


async def test_modules_are_imported_once_and_each_program_is_a_process_of_its_own(tmp_path: Path) -> None:
    async with started(write_agent(tmp_path, PROGRAM)) as scaffold:
        answers = [(await scaffold.run(make_episode(f"e{n}"))).answer for n in range(2)]
    (first, second) = (str(answer).split() for answer in answers)

    assert first[0] == second[0] and len({first[0], first[1], second[1]}) == 3  # one import, two processes
    assert first[2] != second[2]  # each has random numbers of its own
    assert first[3] == str(tmp_path / "agent.py")


async def test_the_program_has_its_arguments_environment_and_directory(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    config = write_agent(tmp_path, PROGRAM.rpartition("\n    print")[0], env={"SEEN": "{api_key}!"})
    episode = dataclasses.replace(make_episode(question="1 + {x}"), workspace=Workspace(directory=place))

    async with started(config) as scaffold:
        result = await scaffold.run(episode)

    assert result.answer == f"['1 + {{x}}'] http://127.0.0.1:1/v1 {place} key!"


@pytest.mark.parametrize("words", [("-m", "agent"), ("-c", "import sys; print(sys.argv[0], *sys.argv[1:])")])
async def test_modules_and_single_lines_are_programs_too(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_agent(tmp_path, "import sys; print(sys.argv[0], *sys.argv[1:])")
    async with started(dataclasses.replace(config, command=(sys.executable, *words))) as scaffold:
        answer = (await scaffold.run(make_episode())).answer
    assert answer == ("-c q" if words[0] == "-c" else f"{tmp_path / 'agent.py'} q")


async def test_the_question_can_come_on_stdin(tmp_path: Path) -> None:
    config = write_agent(tmp_path, "import sys; print(len(sys.stdin.read()))", question_via="stdin")
    async with started(config) as scaffold:
        assert (await scaffold.run(make_episode(question="x" * 300_000))).answer == "300000"


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("raise SystemExit(3)", 3, "its stderr is empty"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, "its stderr is empty"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
async def test_it_fails_as_it_does_when_it_is_started(source: str, status: int, said: str, tmp_path: Path) -> None:
    async with started(write_agent(tmp_path, source)) as scaffold:
        result = await scaffold.run(make_episode())
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert f"ended with status {status}; " in str(result.error) and said in str(result.error)


async def test_what_it_started_ends_with_its_episode_and_others_play_on(tmp_path: Path) -> None:
    source = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, file=sys.stderr)
time.sleep(float(sys.argv[1]))
print("played")
"""
    async with started(write_agent(tmp_path, source)) as scaffold:
        other = asyncio.create_task(scaffold.run(make_episode("other", question="1.5")))
        late = await scaffold.run(make_episode("late", question="60", deadline_s=0.5))
        assert late.stop_reason is StopReason.DEADLINE
        assert not is_running(int(str(late.error).split()[-1]))
        assert await other == AgentResult(answer="played")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_server_that_dies_or_hangs_is_started_again_and_its_agents_are_cut_off(
    how: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "ANSWER_S", 0.5)
    source = "import sys, time; print('up', file=sys.stderr, flush=True); time.sleep(float(sys.argv[1])); print(1)"
    async with started(write_agent(tmp_path, source)) as scaffold:
        open_one = asyncio.create_task(scaffold.run(make_episode("open", question="60", deadline_s=30.0)))
        await asyncio.sleep(0.3)
        os.kill(find_server(), how)
        again = await scaffold.run(make_episode("again", question="0"))
        cut_off = await open_one

    assert (cut_off.accident, cut_off.stop_reason) == (True, StopReason.ENVIRONMENT_FAILED)
    assert "the server that had forked it died" in str(cut_off.error)
    assert again == AgentResult(answer="1")


def find_server() -> int:
    """The child of the keeper that was started for it; keepers of agents, forked from it, are below."""
    below = keeper.find_descendants(os.getpid())
    (outer,) = [each for each in below if b"keeper.py" in Path(f"/proc/{each}/cmdline").read_bytes()]
    return keeper.find_descendants(outer)[0]


async def test_a_server_that_dies_too_often_ends_the_run(tmp_path: Path) -> None:
    async with started(write_agent(tmp_path, "", max_restarts=0)) as scaffold:
        os.kill(find_server(), signal.SIGKILL)
        await asyncio.sleep(0.2)
        result = await scaffold.run(make_episode())
        assert result.stop_reason is StopReason.AGENT_FAILED
        with pytest.raises(AgentError, match="It ended 1 times in a row without a result"):
            scaffold.check()


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "starts threads",
        ),
    ],
)
async def test_what_cannot_be_preloaded_is_told_before_the_first_episode(
    module: str, said: str, tmp_path: Path
) -> None:
    config = write_agent(tmp_path, "")
    (tmp_path / "slow_to_import.py").write_text(module)
    with pytest.raises(AgentError, match="agent preload of slow_to_import ended with status 1; ") as error:
        await ProcessScaffold(config).start()
    assert said in str(error.value)
    assert keeper.find_descendants(os.getpid()) == []


def test_a_command_is_read_as_python_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text("#!/usr/bin/env python3\n")
    script.chmod(0o755)
    cases = {
        ("python", "-u", "-X", "dev", "a.py", "-m"): (("python", "-u", "-X", "dev"), ["a.py", "-m"]),
        ("/usr/bin/python3.11", "-m", "pkg", "x"): (("/usr/bin/python3.11",), ["-m", "pkg", "x"]),
        (str(script), "--fast"): (("python3",), [str(script), "--fast"]),
    }
    for command, (interpreter, words) in cases.items():
        read = read_python_command(command)
        assert (read.interpreter, read.words(command)) == (interpreter, words)


@pytest.mark.parametrize(
    "command", [("sh", "-c", "echo 1"), ("python",), ("python", "-u"), ("python", "-"), ("python", "-m")]
)
def test_only_python_programs_can_be_forked(command: tuple[str, ...]) -> None:
    with pytest.raises(AgentError, match="starts no Python program"):
        read_python_command(command)


def test_only_a_process_is_forked() -> None:
    with pytest.raises(ConfigError, match=r"agent preload is \['openai'\] with kind \"worker\""):
        AgentConfig(kind="worker", command=("a",), preload=("openai",))
