"""Token truth: the next prompt of a session is the ids already seen plus what is new, or a branch of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forgejax.chat.format import ChatFormat, RenderedPrompt, SpokenTurn, TextMark
from forgejax.chat.messages import ChatRequest, Message, Tool
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
    mark: TextMark


@dataclass(frozen=True, kw_only=True)
class _Answered:
    number: int
    completion: Completion
    ended: bool  # the last id is a stop id
    spoken: SpokenTurn

    @property
    def size(self) -> int:
        return len(self.completion.prompt_ids) + len(self.completion.token_ids)

    def begins(self, ids: TokenIds) -> bool:
        start = len(self.completion.prompt_ids)
        return np.array_equal(ids[:start], self.completion.prompt_ids) and np.array_equal(
            ids[start : self.size], self.completion.token_ids
        )


class Conversation:
    """What one session has been answered, as a tree of turns. Sampled ids are never encoded again from text.

    Turns are known by the number their request was given on arrival. Messages are compared by meaning: null fields, key
    order, text in parts, call ids and white space around an assistant's text make no difference. ``make_prompt`` may
    run on another thread than ``add_turn``: it sees the turns added before it began, and perhaps some of those added
    while it ran.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format
        self._answered: list[_Answered] = []
        self._by_key: dict[bytes, _Answered] = {}

    def make_prompt(self, request: ChatRequest) -> Prompt:
        """The ids to sample from. Raises TemplateError where the chat template refuses the messages."""
        keys = _chain_keys(request.messages, request.tools)
        rendered = self._format.render_text(request.messages, request.tools)
        mark = TextMark.of(rendered.text)
        branch: Branch | None = "history" if self._answered else None
        for known in range(len(request.messages), 0, -1):
            turn = self._by_key.get(keys[known])
            if turn is None:
                continue
            ids = self._continue_ids(turn, rendered, known)
            if ids is not None:
                return Prompt(ids=ids, parent=turn.number, branch=None, key=keys[-1], mark=mark)
            branch = "template"
            break
        ids = np.asarray(self._format.encode(rendered), np.int32)
        return Prompt(ids=ids, parent=self._find_longest_prefix(ids), branch=branch, key=keys[-1], mark=mark)

    def add_turn(self, number: int, prompt: Prompt, completion: Completion, reply: Message | None) -> None:
        """Adds a turn. ``reply`` is the message the agent was given, None where it never got the whole of it."""
        ended = len(completion.token_ids) > 0 and int(completion.token_ids[-1]) in self._format.stop_ids
        spoken = SpokenTurn(prompt=prompt.mark, said=self._format.decode(completion.token_ids))
        turn = _Answered(number=number, completion=completion, ended=ended, spoken=spoken)
        self._answered.append(turn)
        if reply is not None:
            self._by_key[_chain(prompt.key, reply)] = turn

    def _continue_ids(self, turn: _Answered, prompt: RenderedPrompt, known: int) -> TokenIds | None:
        new = self._format.continue_turn(prompt, known, turn.spoken)
        if new is None:
            return None
        # A reply that was cut short never drew its end: the template's is put there, not sampled.
        end = [] if turn.ended else [self._format.end_of_turn_id]
        done = turn.completion
        return np.concatenate([done.prompt_ids, done.token_ids, np.asarray(end + new, np.int32)]).astype(np.int32)

    def _find_longest_prefix(self, ids: TokenIds) -> int | None:
        best: _Answered | None = None
        for turn in self._answered:
            longer = turn.size < len(ids) and (best is None or turn.size > best.size)
            if longer and turn.begins(ids):
                best = turn
        return None if best is None else best.number


def _chain_keys(messages: Sequence[Message], tools: Sequence[Tool]) -> list[bytes]:
    """``keys[n]`` stands for the tools and the first ``n`` messages."""
    keys = [hashlib.blake2b(_dump_json(list(tools)), digest_size=16).digest()]
    for message in messages:
        keys.append(_chain(keys[-1], message))
    return keys


def _chain(key: bytes, message: Message) -> bytes:
    """The key of a history that goes on with ``message``."""
    content = message["content"]
    if message["role"] == "assistant":
        content = content.strip()
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
    # The content, which may be long, goes in as it is; its length keeps it apart from what stands before it.
    head = _dump_json([message["role"], calls, message.get("name"), len(content)])
    return hashlib.blake2b(key + head + content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _dump_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
