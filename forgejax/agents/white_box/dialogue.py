"""A conversation of a white-box agent with the policy, kept within its context, and its tools."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.agents.white_box.client import ChatMessage, ContextFullError, PolicyClient, Said, SaidCall
from forgejax.agents.white_box.context import (
    CONTEXT_FUNCTIONS,
    FORGET_TOOL,
    ContextConfig,
    ContextState,
    forget_exchanges,
    split_history,
)
from forgejax.environments.base import WorkTool
from forgejax.errors import AgentError

SUB_AGENT = "sub_agent"


class PolicyAccess:
    """``llm`` of a white-box agent: begins dialogues in its episode's session.

    The first one is the agent's own. Further ones are sub-agents: they may be asked at the same time
    (``asyncio.gather``), each is a branch of the session under the reason ``sub_agent`` or a ``name`` of its own, and
    the episode's one return is theirs, too. ``client`` is for whoever words histories himself.
    """

    def __init__(self, client: PolicyClient, context: ContextConfig) -> None:
        self.client = client
        self.context = context
        self._begun = 0

    def begin(self, system: str | None = None, *, tools: Sequence[WorkTool] = (), name: str = SUB_AGENT) -> Dialogue:
        """A new dialogue, in which ``tools`` can be called."""
        self._begun += 1
        return Dialogue(self.client, self.context, system, tools, branch=name if self._begun > 1 else None)


class Dialogue:
    """A history that grows by what is asked and replied, and is cut as ``context`` says; one request at a time.

    What the policy sees is ``messages``, always: after a cut its next prompt is a branch of the session under the
    strategy's name, and the turns before the cut are trained with the contexts that they had.
    """

    def __init__(
        self,
        client: PolicyClient,
        context: ContextConfig,
        system: str | None,
        tools: Sequence[WorkTool],
        branch: str | None,
    ) -> None:
        self.messages: list[ChatMessage] = [] if system is None else [{"role": "system", "content": system}]
        self._client = client
        self._context = context
        self._tools = {tool.name: tool for tool in tools}
        self._shown: list[Mapping[str, Any]] = [tool.describe() for tool in tools]
        if context.strategy == "forget":
            if FORGET_TOOL["name"] in self._tools:
                raise AgentError('a tool is named "forget", as the strategy of the context is; rename it')
            self._shown.append(FORGET_TOOL)
        self._branch = branch
        self._tokens = 0

    async def ask(self, text: str, *, max_tokens: int | None = None) -> Said:
        """The policy's reply to ``text``. Raises ContextFullError where nothing more can be cut for it."""
        self.messages.append({"role": "user", "content": text})
        return await self._ask(max_tokens)

    async def work(self, text: str, *, max_turns: int = 64, max_tokens: int | None = None) -> Said:
        """The policy's reply to ``text`` once it calls no more tools; the calls of one reply run at the same time.

        It is the last reply as well where one was cut off, or after ``max_turns``.
        """
        said = await self.ask(text, max_tokens=max_tokens)
        for _ in range(max_turns - 1):
            if not said.calls or said.cut:
                break
            await self.answer_calls(said)
            said = await self._ask(max_tokens)
        return said

    async def answer_calls(self, said: Said) -> None:
        """Makes the calls of ``said`` and puts their results into the history."""
        forgets = [call for call in said.calls if call.name == FORGET_TOOL["name"] and call.name not in self._tools]
        results = await asyncio.gather(*(self._call(call) for call in said.calls))
        for call, result in zip(said.calls, results, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        for call in forgets:
            self._forget(call.arguments or {})

    async def _ask(self, max_tokens: int | None) -> Said:
        if self._tokens >= self._context.at * self._client.context_length:
            await self._cut()
        try:
            said = await self._complete(self.messages, max_tokens)
        except ContextFullError:
            if not await self._cut():
                raise
            said = await self._complete(self.messages, max_tokens)
        self.messages.append(said.message)
        return said

    async def _complete(self, messages: Sequence[ChatMessage], max_tokens: int | None) -> Said:
        said = await self._client.complete(messages, tools=self._shown, max_tokens=max_tokens, branch=self._branch)
        self._branch, self._tokens = None, said.tokens
        return said

    async def _cut(self) -> bool:
        """Applies the strategy to all but what is being asked; whether it changed anything."""
        head, exchanges = split_history(self.messages)

        async def sum_up(request: str) -> str:
            # what is being asked stands at the end of the history and waits for its turn
            before = self.messages[:-1] if self.messages[-1]["role"] == "user" else self.messages
            return (await self._complete([*before, {"role": "user", "content": request}], None)).text

        state = ContextState(head=head, exchanges=exchanges, keep=self._context.keep_exchanges, ask=sum_up)
        return self._replace(await CONTEXT_FUNCTIONS[self._context.strategy](state), self._context.strategy)

    def _forget(self, arguments: Mapping[str, Any]) -> None:
        count, note = arguments.get("exchanges"), arguments.get("note", "")
        if isinstance(count, int) and count > 0 and isinstance(note, str):
            self._replace(forget_exchanges(self.messages, count, note), "forget")

    def _replace(self, messages: list[ChatMessage], reason: str) -> bool:
        changed = messages != self.messages
        if changed:
            self.messages, self._branch, self._tokens = messages, reason, 0
        return changed

    async def _call(self, call: SaidCall) -> str:
        """What the tool gave; the policy is told in words of a call that cannot be made, and may try again."""
        if call.arguments is None:
            return f"error: the arguments of {call.name} are {call.raw[:200]!r}; expected a JSON object"
        if call.name in self._tools:
            return await self._tools[call.name].call(call.arguments)
        if call.name == FORGET_TOOL["name"] and self._context.strategy == "forget":
            count = call.arguments.get("exchanges")
            return "done" if isinstance(count, int) and count > 0 else "error: exchanges must be a number above 0"
        known = ", ".join(str(tool["name"]) for tool in self._shown) or "none"
        return f"error: there is no tool {call.name}; there are: {known}"
