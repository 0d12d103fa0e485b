"""What an agent does to its context once that fills up: functions from one history to the next, by name.

A history is a *head* (system messages and the first thing asked, which says what the task is) and *exchanges*: a reply
of the policy with what was answered to it. Every function keeps the head, and never parts a call from its result.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from forgejax.agents.white_box.client import ChatMessage
from forgejax.errors import ConfigError

Exchange = Sequence[ChatMessage]
ContextName = Literal["keep_all", "sliding_window", "drop_tool_output", "summarise", "forget"]
DROPPED = "[this output was dropped to save room]"
SUMMARY = "What came before, in your own words: "
ASK_FOR_SUMMARY = "Your context is nearly full. Sum up what you have done and found so far; only that is kept."


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How a white-box agent keeps within the context: ``strategy`` is applied once prompt and reply together have
    reached the share ``at`` of it, or where a prompt is refused as too long.

    ``keep_exchanges``: how many of the last exchanges stay as they are. With ``forget`` it is the policy that decides,
    by a tool of that name, and nothing else is ever dropped.
    """

    strategy: ContextName = "keep_all"
    at: float = 0.7
    keep_exchanges: int = 2

    def __post_init__(self) -> None:
        if not 0.0 < self.at <= 1.0:
            raise ConfigError(f"agent context.at is {self.at}; expected a share of the context in (0, 1]")
        if self.keep_exchanges < 1:
            raise ConfigError(
                f"agent context.keep_exchanges is {self.keep_exchanges}; expected 1 or "
                "more: the last one holds what is being asked"
            )


@dataclass(frozen=True, kw_only=True)
class ContextState:
    """A history that has grown too long. ``ask`` gives what the policy says to one more request at the end of it."""

    head: tuple[ChatMessage, ...]
    exchanges: tuple[Exchange, ...]
    keep: int
    ask: Callable[[str], Awaitable[str]]

    @property
    def old(self) -> tuple[Exchange, ...]:
        """The exchanges that may go."""
        return self.exchanges[: max(0, len(self.exchanges) - self.keep)]

    @property
    def last(self) -> tuple[Exchange, ...]:
        return self.exchanges[len(self.old) :]


ContextFunction = Callable[[ContextState], Awaitable[list[ChatMessage]]]
"""The next history; the same messages where there is nothing to be done."""


def split_history(messages: Sequence[ChatMessage]) -> tuple[tuple[ChatMessage, ...], tuple[Exchange, ...]]:
    """The head, and the exchanges: each begins with a reply of the policy."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not starts:
        return tuple(messages), ()
    ends = [*starts[1:], len(messages)]
    return tuple(messages[: starts[0]]), tuple(tuple(messages[a:b]) for a, b in zip(starts, ends, strict=True))


def join_history(*parts: Sequence[Exchange]) -> list[ChatMessage]:
    return [message for part in parts for exchange in part for message in exchange]


async def keep_all(state: ContextState) -> list[ChatMessage]:
    """Does nothing: the episode ends where the context does."""
    return join_history([state.head], state.exchanges)


async def slide_window(state: ContextState) -> list[ChatMessage]:
    """Only the last exchanges stay."""
    return join_history([state.head], state.last)


async def drop_tool_output(state: ContextState) -> list[ChatMessage]:
    """What tools gave in older exchanges is replaced by a note; what the policy said stays."""
    cut = [[_drop_output(message) for message in exchange] for exchange in state.old]
    return join_history([state.head], cut, state.last)


async def summarise_history(state: ContextState) -> list[ChatMessage]:
    """The policy sums up what it has done, a turn like any other; the summary stands for all but the last exchanges."""
    if not state.old:
        return join_history([state.head], state.exchanges)
    summary = await state.ask(ASK_FOR_SUMMARY)
    return join_history([state.head, [{"role": "user", "content": SUMMARY + summary}]], state.last)


CONTEXT_FUNCTIONS: dict[ContextName, ContextFunction] = {
    "keep_all": keep_all,
    "sliding_window": slide_window,
    "drop_tool_output": drop_tool_output,
    "summarise": summarise_history,
    "forget": keep_all,
}

FORGET_TOOL = {
    "name": "forget",
    "description": "Drop the oldest exchanges of this conversation to save room. What note says is kept instead.",
    "parameters": {
        "type": "object",
        "properties": {
            "exchanges": {"type": "integer", "description": "how many, from the oldest on"},
            "note": {"type": "string", "description": "what to remember of them"},
        },
        "required": ["exchanges"],
    },
}


def forget_exchanges(messages: Sequence[ChatMessage], count: int, note: str) -> list[ChatMessage]:
    """The history without its ``count`` oldest exchanges, but never without the last, in which the policy asked so."""
    head, exchanges = split_history(messages)
    rest = exchanges[min(count, max(0, len(exchanges) - 1)) :]
    kept = [{"role": "user", "content": note}] if note and len(rest) < len(exchanges) else []
    return join_history([head, kept], rest)


def _drop_output(message: ChatMessage) -> ChatMessage:
    return {**message, "content": DROPPED} if message["role"] == "tool" else message
