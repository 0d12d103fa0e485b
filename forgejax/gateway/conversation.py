"""Token truth: the next prompt of a session is the ids already seen plus what is new, or a branch of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forgejax.gateway.chat import ChatRequest, Message, Tool
from forgejax.gateway.chat_format import ChatFormat
from forgejax.types import Completion, TokenIds

Branch = Literal["history", "template"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as ids. ``parent`` is the number of the turn whose ids it starts with, if there is one.

    ``branch`` says why it does not go on from an earlier turn although there are some: the agent sent another history
    or other tools (``history``), or the chat template rewrites what came before (``template``).
    """

    ids: TokenIds
    parent: int | None
    branch: Branch | None
    key: bytes


@dataclass(frozen=True, kw_only=True)
class _Answered:
    number: int
    ids: TokenIds
    ended: bool  # the last id is a stop id


class Conversation:
    """What one session has been answered, as a tree of turns. Sampled ids are never encoded again from text.

    Turns are known by the number their request was given on arrival. Messages are compared by meaning: null fields, key
    order, text in parts, call ids and white space around an assistant's text make no difference.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format
        self._answered: list[_Answered] = []
        self._by_key: dict[bytes, _Answered] = {}

    def prompt(self, request: ChatRequest) -> Prompt:
        """The ids to sample from. Raises TemplateError where the chat template refuses the messages."""
        keys = _history_keys(request.messages, request.tools)
        branch: Branch | None = "history" if self._answered else None
        for known in range(len(request.messages), 0, -1):
            turn = self._by_key.get(keys[known])
            if turn is None:
                continue
            ids = self._continued(turn, request, known)
            if ids is not None:
                return Prompt(ids=ids, parent=turn.number, branch=None, key=keys[-1])
            branch = "template"
            break
        ids = np.asarray(self._format.render(request.messages, request.tools), np.int32)
        return Prompt(ids=ids, parent=self._longest_prefix(ids), branch=branch, key=keys[-1])

    def answered(self, number: int, prompt: Prompt, completion: Completion, reply: Message | None) -> None:
        """Adds a turn. ``reply`` is the message the agent was given, None where it never got the whole of it."""
        ids = np.concatenate([completion.prompt_ids, completion.token_ids]).astype(np.int32)
        ended = len(completion.token_ids) > 0 and int(completion.token_ids[-1]) in self._format.stop_ids
        turn = _Answered(number=number, ids=ids, ended=ended)
        self._answered.append(turn)
        if reply is not None:
            self._by_key[_chain(prompt.key, _meaning(reply))] = turn

    def _continued(self, turn: _Answered, request: ChatRequest, known: int) -> TokenIds | None:
        new = self._format.continuation(request.messages[:known], request.messages[known:], request.tools)
        if new is None:
            return None
        # A reply that was cut short never drew its end: the template's is put there, not sampled.
        end = [] if turn.ended else [self._format.end_of_turn_id]
        return np.concatenate([turn.ids, np.asarray(end + new, np.int32)])

    def _longest_prefix(self, ids: TokenIds) -> int | None:
        best: _Answered | None = None
        for turn in self._answered:
            size = len(turn.ids)
            longer = size < len(ids) and (best is None or size > len(best.ids))
            if longer and np.array_equal(ids[:size], turn.ids):
                best = turn
        return None if best is None else best.number


def _history_keys(messages: Sequence[Message], tools: Sequence[Tool]) -> list[bytes]:
    """``keys[n]`` stands for the tools and the first ``n`` messages."""
    keys = [_chain(b"", list(tools))]
    for message in messages:
        keys.append(_chain(keys[-1], _meaning(message)))
    return keys


def _chain(key: bytes, value: Any) -> bytes:
    return hashlib.blake2b(key + json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _meaning(message: Message) -> list[Any]:
    content = message["content"]
    if message["role"] == "assistant":
        content = content.strip()
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
    return [message["role"], content, calls, message.get("name")]
