"""A white-box agent: a Python coroutine function in this process."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable

import aiohttp

from forgejax.agents.scaffolds.base import AgentResult, EpisodeSpec
from forgejax.agents.white_box.client import ContextFullError, PolicyClient
from forgejax.agents.white_box.context import ContextConfig
from forgejax.agents.white_box.dialogue import PolicyAccess
from forgejax.environments.base import Workspace
from forgejax.errors import AgentError, ConfigError, EnvironmentLostError
from forgejax.imports import load_object
from forgejax.types import StopReason

AgentFunction = Callable[[EpisodeSpec, PolicyAccess, Workspace], Awaitable[object]]
"""(task, llm, workspace) -> the answer, a str or None. The task has ``question``, ``base_url`` and ``api_key``."""

_CANCEL_S = 1.0


def load_function(path: str) -> AgentFunction:
    """Imports ``module:function`` or ``file.py:function``. Raises ConfigError where there is no such coroutine
    function."""
    function = load_object(path, "agent function")
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f'agent function "{path}" is no coroutine function; write it as "async def"')
    loaded: AgentFunction = function
    return loaded


class CoroutineScaffold:
    """Calls the function once per episode, on this event loop: it must never block."""

    def __init__(self, function: AgentFunction, context: ContextConfig | None = None) -> None:
        self._function = function
        self._context = context or ContextConfig()
        self._name = f"agent function {getattr(function, '__qualname__', repr(function))}"

    async def start(self) -> None: ...

    def check(self) -> None: ...

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        call = asyncio.ensure_future(self._call(episode))
        call.add_done_callback(_retrieve)
        try:
            await asyncio.wait({call}, timeout=episode.deadline_s)
        finally:
            overdue = call.cancel()
        if overdue:
            await asyncio.wait({call}, timeout=_CANCEL_S)
            error = f"{self._name} gave no answer within {episode.deadline_s:g} s"
            return AgentResult(error=error, stop_reason=StopReason.DEADLINE)
        problem = asyncio.CancelledError("the agent cancelled itself") if call.cancelled() else call.exception()
        if problem is not None:
            if isinstance(problem, ContextFullError | EnvironmentLostError):
                ended = StopReason.TRUNCATED if isinstance(problem, ContextFullError) else StopReason.ENVIRONMENT_FAILED
                return AgentResult(error=f"{self._name}: {problem}", stop_reason=ended)
            *_, last = ["", *traceback.format_tb(problem.__traceback__, limit=-1)]
            error = f"{self._name} raised {type(problem).__name__}: {problem}\n{last}".rstrip()
            return AgentResult(error=error, stop_reason=StopReason.AGENT_FAILED)
        answer = call.result()
        if answer is not None and not isinstance(answer, str):
            error = f"{self._name} gave {type(answer).__name__}; expected a str or None"
            return AgentResult(error=error, stop_reason=StopReason.AGENT_FAILED)
        return AgentResult(answer=answer)

    async def close(self) -> None: ...

    async def _call(self, episode: EpisodeSpec) -> object:
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
                client = PolicyClient(
                    base_url=episode.base_url,
                    api_key=episode.api_key,
                    model=episode.model,
                    context_length=episode.context_length,
                    http=http,
                )
                return await self._function(episode, PolicyAccess(client, self._context), episode.workspace)
        except SystemExit as error:  # asyncio would end the event loop, and all that runs on it
            raise AgentError(f"sys.exit({error.code!r})") from error


def _retrieve(call: asyncio.Future[object]) -> None:
    """Marks a late failure as seen: its episode has already ended."""
    if not call.cancelled():
        call.exception()
