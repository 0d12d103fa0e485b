"""The one-process-per-episode scaffold, on real processes."""

import asyncio
import dataclasses
import sys
import threading
import time
from pathlib import Path

import pytest

from forgejax.agents import AgentConfig, AgentResult, EpisodeSpec, ProcessScaffold
from forgejax.environments import Workspace
from forgejax.errors import AgentError, ConfigError
from forgejax.types import StopReason
from tests.agents.fakes import is_running, make_episode, python_agent


async def play(config: AgentConfig, episode: EpisodeSpec | None = None) -> AgentResult:
    scaffold = ProcessScaffold(config)
    await scaffold.start()
    try:
        return await scaffold.run(episode or make_episode())
    finally:
        await scaffold.close()


async def test_the_last_line_that_is_not_blank_is_the_answer() -> None:
    result = await play(python_agent("print('thinking'); print(' 42 '); print()", kind="process"))
    assert result == AgentResult(answer="42")


async def test_the_agent_finds_endpoint_key_and_question() -> None:
    source = "import os, sys; print(os.environ['OPENAI_BASE_URL'], os.environ['OPENAI_API_KEY'], sys.argv[1:])"
    result = await play(python_agent(source, kind="process"), make_episode(question="1 + {api_key}"))
    assert result.answer == "http://127.0.0.1:1/v1 key ['1 + {api_key}']"


async def test_the_question_goes_where_the_placeholder_is() -> None:
    command = (sys.executable, "-I", "-S", "-c", "import sys; print(sys.argv[1:])", "--ask={question}", "end")
    assert (await play(AgentConfig(kind="process", command=command))).answer == "['--ask=q', 'end']"


async def test_the_question_can_come_on_stdin() -> None:
    config = python_agent(
        "import sys; print(sys.stdin.read()[::-1], len(sys.argv))", kind="process", question_via="stdin"
    )
    assert (await play(config, make_episode(question="abc"))).answer == "cba 1"


async def test_an_agent_that_never_reads_a_long_question_still_answers() -> None:
    config = python_agent("print(7)", kind="process", question_via="stdin")
    assert (await play(config, make_episode(question="x" * 2_000_000))).answer == "7"


async def test_env_may_name_the_endpoint_for_another_sdk() -> None:
    source = "import os; print(os.environ['OTHER_URL'], os.environ['ORIGIN'])"
    config = python_agent(source, kind="process", env={"OTHER_URL": "{base_url}/x", "ORIGIN": "{origin}"})
    assert (await play(config)).answer == "http://127.0.0.1:1/v1/x http://127.0.0.1:1"


async def test_the_agent_runs_in_its_episodes_workspace(tmp_path: Path) -> None:
    source = "import os; print(os.getcwd(), os.environ['PLACE'], os.environ['OWN'])"
    workspace = Workspace(variables={"PLACE": "here"}, directory=tmp_path)
    episode = dataclasses.replace(make_episode(), workspace=workspace)

    result = await play(python_agent(source, kind="process", env={"OWN": "1", "PLACE": "elsewhere"}), episode)

    assert result.answer == f"{tmp_path} here 1"


async def test_a_crash_is_a_failed_agent_with_its_stderr() -> None:
    result = await play(python_agent("print(3); raise SystemExit('no such model')", kind="process"))
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert result.answer is None
    assert "print(3)" in str(result.error)  # names the command
    assert "status 1" in str(result.error) and "no such model" in str(result.error)


async def test_an_agent_killed_by_a_signal_is_a_failed_agent_with_its_status() -> None:
    result = await play(python_agent("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", kind="process"))
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert "ended with status -11; its stderr is empty" in str(result.error)


async def test_a_flood_of_stderr_costs_nothing_but_its_beginning() -> None:
    source = "import sys; sys.stderr.write('y' * 3_000_000 + 'the end'); raise SystemExit(4)"
    result = await play(python_agent(source, kind="process"))
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert "status 4" in str(result.error) and str(result.error).endswith("yythe end") and len(str(result.error)) < 3000


async def test_bytes_that_are_no_text_are_an_answer_of_replacements() -> None:
    source = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 400 + b'\\n\\xff\\xfe7')"
    assert await play(python_agent(source, kind="process")) == AgentResult(answer="\ufffd\ufffd7")


async def test_a_mute_agent_is_killed_at_the_deadline_with_its_children() -> None:
    source = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, file=sys.stderr); time.sleep(60)"
    )
    started = time.monotonic()
    result = await play(python_agent(source, kind="process"), make_episode(deadline_s=0.5))
    assert result.stop_reason is StopReason.DEADLINE
    assert "agent command" in str(result.error) and "did not end within 0.5 s; its stderr ends" in str(result.error)
    assert time.monotonic() - started < 5.0
    assert not is_running(int(str(result.error).split()[-1]))


async def test_a_grandchild_that_holds_stdout_open_does_not_hold_up_the_answer() -> None:
    source = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)'],"
        "start_new_session=True); print(5)"
    )
    started = time.monotonic()
    assert (await play(python_agent(source, kind="process"))).answer == "5"
    assert time.monotonic() - started < 5.0


async def test_endless_output_is_read_and_only_its_end_kept() -> None:
    assert (await play(python_agent("for i in range(300000): print(i)", kind="process"))).answer == "299999"


async def test_a_question_too_long_for_a_command_line_is_a_failed_agent() -> None:
    result = await play(python_agent("print(1)", kind="process"), make_episode(question="x" * 3_000_000))
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert "cannot be started" in str(result.error)


async def test_cancelling_the_episode_ends_the_process() -> None:
    scaffold = ProcessScaffold(python_agent("import time; time.sleep(60)", kind="process"))
    await scaffold.start()
    run = asyncio.create_task(scaffold.run(make_episode()))
    await asyncio.sleep(0.2)
    run.cancel()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await run
    await scaffold.close()
    assert time.monotonic() - started < 3.0


def test_it_runs_on_an_event_loop_that_is_not_the_main_threads() -> None:
    results: list[AgentResult] = []
    config = python_agent("print(9)", kind="process")
    thread = threading.Thread(target=lambda: results.append(asyncio.run(play(config))))
    thread.start()
    thread.join(20)
    assert results == [AgentResult(answer="9")]


async def test_a_command_that_does_not_exist_is_refused_at_the_start() -> None:
    with pytest.raises(AgentError, match=r"no-such-agent.*not on PATH"):
        await ProcessScaffold(AgentConfig(kind="process", command=("no-such-agent",))).start()


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "process"},
        {"kind": "coroutine", "function": "agent"},
        {"command": ("a",), "workers": 0},
        {"command": ("a",), "deadline_s": 0.0},
        {"command": ("a",), "grace_s": float("inf")},
    ],
)
def test_an_impossible_agent_configuration_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AgentConfig(**fields)  # type: ignore[arg-type]
