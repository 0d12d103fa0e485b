"""A white-box agent: a Python coroutine function in this process."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable

from forgejax.agents.scaffolds.base import AgentResult, EpisodeSpec
from forgejax.errors import AgentError, ConfigError
from forgejax.imports import load_object
from forgejax.types import StopReason

AgentFunction = Callable[[str, str, str], Awaitable[object]]
"""(question, base_url, api_key) -> the answer, a str or None."""

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

    def __init__(self, function: AgentFunction) -> None:
        self._function = function
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
            return await self._function(episode.question, episode.base_url, episode.api_key)
        except SystemExit as error:  # asyncio would end the event loop, and all that runs on it
            raise AgentError(f"sys.exit({error.code!r})") from error


def _retrieve(call: asyncio.Future[object]) -> None:
    """Marks a late failure as seen: its episode has already ended."""
    if not call.cancelled():
        call.exception()
