"""Whatever an agent has started ends with it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forgejax.agents import ProcessScaffold, WorkerScaffold
from forgejax.agents.scaffolds import children, keeper
from tests.agents.fakes import is_running, make_episode, python_agent

ESCAPES = """
import os, subprocess, sys, time
nothing = subprocess.DEVNULL
child = subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(60)"],
    start_new_session=True, env={}, stdin=nothing, stdout=nothing, stderr=nothing,
)
child.wait()
"""


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def keepers_of(parent: int) -> list[int]:
    found = []
    for process_id in keeper.find_descendants(parent):
        try:
            command = Path(f"/proc/{process_id}/cmdline").read_text()
        except OSError:
            continue
        if "keeper.py" in command:
            found.append(process_id)
    return found


def kept(source: str, **options: object) -> "subprocess.Popen[bytes]":
    """A program behind a keeper of this process."""
    program = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid())]
    return subprocess.Popen([*program, sys.executable, "-I", "-S", "-c", source], **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("source", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", -11), ("", 0)]
)
def test_it_ends_as_its_program_has_ended(source: str, status: int) -> None:
    assert kept(source).wait(20) == status


def test_a_program_that_cannot_be_started_says_why() -> None:
    program = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), "/no/such/program"]
    ended = subprocess.run(program, capture_output=True, timeout=20, check=False)
    assert (ended.returncode, b"/no/such/program cannot be started: " in ended.stderr) == (127, True)


async def test_what_an_agent_leaves_behind_dies_with_its_episode_wherever_it_went_and_others_live_on() -> None:
    scaffold = ProcessScaffold(python_agent(ESCAPES + "print(7); time.sleep(float(sys.argv[1]))", kind="process"))
    await scaffold.start()
    try:
        long = asyncio.create_task(scaffold.run(make_episode("long", question="60", deadline_s=60.0)))
        await asyncio.to_thread(until, lambda: len(adopted(keepers_of(os.getpid()))) == 2)
        keepers = keepers_of(os.getpid())
        escaped = adopted(keepers)  # the agent, and a daemon that has left its parent, session and environment
        short = await scaffold.run(make_episode("short", question="0"))
        assert short.answer == "7"
        assert keepers_of(os.getpid()) == keepers and all(map(is_running, escaped))
        long.cancel()
        await asyncio.wait({long})
        assert not any(map(is_running, escaped))
    finally:
        await scaffold.close()
    assert keeper.find_descendants(os.getpid()) == []


def adopted(keepers: list[int]) -> list[int]:
    """The children of these, once they have no grandchildren."""
    below = [each for process_id in keepers for each in keeper.find_descendants(process_id)]
    return [] if any(keeper.find_descendants(each) for each in below) else below


def test_term_lets_a_program_tidy_up_and_then_ends_what_does_not() -> None:
    tidies = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print(1, flush=True); time.sleep(60)"
    ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    for source, status in ((tidies, 5), (ignores, -signal.SIGKILL)):
        process = kept(source, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.terminate()
        assert process.wait(10) == status
        process.stdout.close()


def test_the_program_of_a_keeper_that_is_killed_dies_too() -> None:
    process = kept("import os, time; print(os.getpid(), flush=True); time.sleep(60)", stdout=subprocess.PIPE)
    assert process.stdout is not None
    program = int(process.stdout.readline())
    process.kill()
    process.wait()
    until(lambda: not is_running(program))
    process.stdout.close()


async def test_a_keeper_that_is_stopped_keeps_nobody_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "KEEPER_S", 0.3)
    scaffold = WorkerScaffold(python_agent("import time; print('{\"ready\": true}'); time.sleep(60)"))
    await scaffold.start()
    below = keeper.find_descendants(os.getpid())
    (stopped,) = keepers_of(os.getpid())
    (worker,) = keeper.find_descendants(stopped)
    os.kill(stopped, signal.SIGSTOP)
    await scaffold.close()
    await asyncio.to_thread(until, lambda: not is_running(worker) and not is_running(stopped))
    assert len(below) == 3 and keeper.find_descendants(os.getpid()) == []
