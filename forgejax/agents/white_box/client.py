"""What a white-box agent asks the policy with: chat completions of its episode's session, over the same HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from forgejax.errors import AgentError

ChatMessage = Mapping[str, Any]
"""A message as chat completions write it: ``role``, ``content``, ``tool_calls``, ``tool_call_id``."""

RETRIES = 5
_RETRY_S = 0.5
_SHOWN = 300
_BUSY = (429, 503)


class ContextFullError(AgentError):
    """The prompt leaves the policy no room for a reply."""


@dataclass(frozen=True, kw_only=True)
class SaidCall:
    """A tool call of a reply. ``arguments`` are None where the text of them, ``raw``, is no JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any] | None
    raw: str


@dataclass(frozen=True, kw_only=True)
class Said:
    """A reply of the policy. ``message`` is what goes back into the history; ``cut``: it ended by length.

    ``tokens`` are those of its prompt and of itself.
    """

    text: str
    calls: tuple[SaidCall, ...]
    message: ChatMessage
    cut: bool
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PolicyClient:
    """Asks under one session's key. ``http`` is whoever's made it; requests have no deadline but the episode's."""

    base_url: str
    api_key: str
    model: str
    context_length: int
    http: aiohttp.ClientSession

    async def complete(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int | None = None,
        branch: str | None = None,
    ) -> Said:
        """One reply. ``branch`` names why the history is another than before: its turn carries the name.

        An engine that is busy is asked again, RETRIES times. Raises ContextFullError where the prompt is too long, and
        AgentError for every other refusal.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if tools:
            body["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if branch is not None:
            body["metadata"] = {"branch": branch}
        for retry in range(RETRIES + 1):
            status, wait_s, answer = await self._post(body, retry)
            if status not in _BUSY or retry == RETRIES:
                break
            await asyncio.sleep(wait_s)
        if status != 200:
            raise _make_error(status, answer)
        return _read_reply(answer)

    async def _post(self, body: Mapping[str, Any], retry: int) -> tuple[int, float, Any]:
        """The status, the seconds to wait before it is asked again, and the answer."""
        headers = {"Authorization": f"Bearer {self.api_key}", "x-stainless-retry-count": str(retry)}
        url = f"{self.base_url}/chat/completions"
        try:
            async with self.http.post(url, json=body, headers=headers) as response:
                text = await response.text()
                wait = response.headers.get("retry-after", "")
        except aiohttp.ClientError as error:
            raise AgentError(f"the gateway at {self.base_url} did not answer: {error}; is the run still up?") from error
        wait_s = float(wait) if wait.isdigit() else _RETRY_S
        try:
            return response.status, wait_s, json.loads(text)
        except ValueError as error:
            raise AgentError(
                f"the gateway answered {response.status} with {text[:_SHOWN]!r}; expected a JSON object"
            ) from error


def _make_error(status: int, answer: Any) -> AgentError:
    error = answer.get("error") if isinstance(answer, Mapping) else None
    told = error if isinstance(error, Mapping) else {}
    words = f"the gateway refused a request with {status}: {told.get('message', str(answer)[:_SHOWN])}"
    return ContextFullError(words) if told.get("code") == "context_length_exceeded" else AgentError(words)


def _read_reply(answer: Any) -> Said:
    choice = answer["choices"][0]
    message = choice["message"]
    return Said(
        text=message.get("content") or "",
        calls=tuple(_read_call(call) for call in message.get("tool_calls") or ()),
        message={key: value for key, value in message.items() if value is not None},
        cut=choice["finish_reason"] == "length",
        tokens=answer["usage"]["total_tokens"],
    )


def _read_call(call: Mapping[str, Any]) -> SaidCall:
    raw = call["function"]["arguments"]
    try:
        arguments = json.loads(raw)
    except ValueError:
        arguments = None
    known = arguments if isinstance(arguments, dict) else None
    return SaidCall(id=call["id"], name=call["function"]["name"], arguments=known, raw=raw)
