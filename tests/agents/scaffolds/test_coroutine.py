"""The white-box scaffold."""

import asyncio
import sys

import pytest

from forgejax.agents import AgentConfig, AgentResult, CoroutineScaffold, EpisodeSpec, make_scaffold
from forgejax.agents.scaffolds.coroutine import load_function
from forgejax.agents.white_box import PolicyAccess
from forgejax.environments import Workspace
from forgejax.errors import ConfigError
from forgejax.types import StopReason
from tests.agents.fakes import make_episode


async def echo(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str | None:
    return f"{task.question} {llm.client.base_url} {llm.client.api_key} {workspace.variables}"


async def test_the_function_gets_the_task_the_endpoint_and_the_workspace() -> None:
    scaffold = make_scaffold(AgentConfig(kind="coroutine", function=f"{__name__}:echo"))
    assert await scaffold.run(make_episode()) == AgentResult(answer="q http://127.0.0.1:1/v1 key {}")


async def test_an_exception_is_a_failed_agent() -> None:
    async def crash(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
        raise TimeoutError("the model is slow")

    result = await CoroutineScaffold(crash).run(make_episode())
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert "crash raised TimeoutError: the model is slow" in str(result.error)
    assert __file__ in str(result.error) and 'raise TimeoutError("the model is slow")' in str(result.error)


async def test_a_function_that_exits_is_a_failed_agent_and_the_loop_goes_on() -> None:
    async def leave(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
        sys.exit("usage")

    result = await CoroutineScaffold(leave).run(make_episode())
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert "sys.exit('usage')" in str(result.error)


async def test_an_answer_that_is_no_text_is_a_failed_agent() -> None:
    async def count(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> int:
        return 3

    result = await CoroutineScaffold(count).run(make_episode())
    assert result.stop_reason is StopReason.AGENT_FAILED
    assert str(result.error).endswith("count gave int; expected a str or None")


async def test_a_mute_function_is_cancelled_at_the_deadline() -> None:
    cancelled = asyncio.Event()

    async def wait(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    result = await CoroutineScaffold(wait).run(make_episode(deadline_s=0.05))
    assert result.stop_reason is StopReason.DEADLINE
    assert str(result.error).endswith("wait gave no answer within 0.05 s")
    assert cancelled.is_set()


@pytest.mark.parametrize("path", ["no_such_module:f", f"{__name__}:nothing", "os:getcwd", ":f"])
def test_a_function_that_cannot_be_had_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        load_function(path)
