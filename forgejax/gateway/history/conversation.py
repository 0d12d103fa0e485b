"""Token truth: the next prompt of a session is the ids already seen plus what is new, or a branch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from forgejax.chat.format import ChatFormat, RenderedPrompt, SpokenTurn, TextMark
from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.tool_calls import describe_tools
from forgejax.gateway.history.identity import digest_tools, digest_turn, extend_digest, is_echo
from forgejax.types import Completion, TokenIds

Branch = Literal["history", "template", "twins"]


@dataclass(frozen=True, kw_only=True)
class AnsweredTurn:
    """A turn of the session: what was asked and drawn, and the reply as the agent was given it, if it was."""

    number: int
    asked: tuple[Message, ...]
    completion: Completion
    ended: bool  # the last id is a stop id
    spoken: SpokenTurn
    reply: Message | None

    @property
    def size(self) -> int:
        return len(self.completion.prompt_ids) + len(self.completion.token_ids)

    def begins(self, ids: TokenIds) -> bool:
        start = len(self.completion.prompt_ids)
        return np.array_equal(ids[:start], self.completion.prompt_ids) and np.array_equal(
            ids[start : self.size], self.completion.token_ids
        )

    def repeats(self, other: AnsweredTurn) -> bool:
        """Whether both are the same ids."""
        mine, theirs = self.completion, other.completion
        return np.array_equal(mine.prompt_ids, theirs.prompt_ids) and np.array_equal(mine.token_ids, theirs.token_ids)


@dataclass(frozen=True, kw_only=True)
class LocatedRequest:
    """A request and where it stands in its session, fixed when it arrived.

    ``messages`` are those that were sent, with what the session knows better: a reply that was sent back without its
    thought has it again. ``turn`` answered the first ``known`` messages but the last of them, which is its reply.
    ``earlier`` are all turns that were there; ``keys`` stand for the whole history, several where a reply in it may be
    that of several turns.
    """

    chat: ChatRequest
    messages: tuple[Message, ...]
    turn: AnsweredTurn | None
    known: int
    twins: bool
    earlier: Sequence[AnsweredTurn]
    keys: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as ids. ``parent`` is the number of the turn whose ids it starts with, if there is one.

    ``branch`` says why it does not go on from an earlier turn although there are some: the agent sent another history
    or other tools (``history``), the chat template rewrites what came before (``template``), or it sent back a reply
    that several turns gave, with nothing to tell which (``twins``). ``thinking``: it ends within a thought, or would
    but for ``forced``: the beginning of the reply that the policy did not draw, whose ids are the last of these.
    """

    ids: TokenIds
    parent: int | None
    branch: Branch | None
    keys: tuple[bytes, ...]
    messages: tuple[Message, ...]
    before: TextMark
    thinking: bool
    forced: str = ""


class Conversation:
    """What one session has been answered, as a tree of turns. Sampled ids are never encoded again from text.

    Turns are known by the number their request was given on arrival. A reply that is sent back is known by the ids of
    its calls or its signature first, by its meaning in its history second (``identity``), and where that leaves
    several, only if all of them are the same ids. ``locate`` and ``add_turn`` belong to one thread, ``make_prompt`` may
    run on any: it sees what ``locate`` saw. With ``example_call`` the template prints no tools: they and that example
    are told in the system message.
    """

    def __init__(self, chat_format: ChatFormat, example_call: str | None = None) -> None:
        self._format = chat_format
        self._example = example_call
        self._answered: list[AnsweredTurn] = []
        self._replies: dict[bytes, list[AnsweredTurn]] = {}  # by the history they answered
        self._evidence: dict[str, AnsweredTurn] = {}  # by call id and by signature

    def locate(self, request: ChatRequest) -> LocatedRequest:
        """Where ``request`` stands among the turns there are by now."""
        keys = [digest_tools(request.tools)]
        messages: list[Message] = []
        turn, known, twins = None, 0, False
        for message in request.messages:
            found = self._find_replies(message, keys) if message.role == "assistant" else []
            if found:
                keys = [digest_turn(each.number) for each in found]
                twins = len(found) > 1
                turn, known = None if twins else found[0], len(messages) + 1
            else:
                keys = [extend_digest(key, message) for key in keys]
            if len(found) == 1 and found[0].reply is not None:
                # Shared with that turn, so that a long conversation is kept once.
                messages = [*found[0].asked, found[0].reply]
            else:
                messages.append(self._restore(message, found))
        return LocatedRequest(
            chat=request,
            messages=tuple(messages),
            turn=turn,
            known=known,
            twins=twins,
            earlier=tuple(self._answered),
            keys=tuple(keys),
        )

    def make_prompt(self, request: LocatedRequest) -> Prompt:
        """The ids to sample from. Raises TemplateError where the chat template refuses the messages."""
        messages = self._tell_tools(request)
        rendered = self._format.render_chat(messages, request.chat.tools)
        before = self._format.mark_turn(rendered)
        thinking = self._format.thoughts.opens(rendered.text)
        branch: Branch | None = "history" if request.earlier else None
        ids: TokenIds | None = None
        parent: int | None = None
        if request.twins:
            branch = "twins"
        elif request.turn is not None:
            known = request.known + len(messages) - len(request.messages)
            ids = self._continue_ids(request.turn, rendered, known)
            branch, parent = ("template", None) if ids is None else (None, request.turn.number)
        if ids is None:
            ids = np.asarray(self._format.encode(rendered), np.int32)
            parent = _find_longest_prefix(ids, request.earlier)
        return Prompt(
            ids=ids,
            parent=parent,
            branch=branch,
            keys=request.keys,
            messages=request.messages,
            before=before,
            thinking=thinking,
        )

    def force_beginning(self, prompt: Prompt, text: str) -> Prompt:
        """``prompt`` with the beginning of its reply: what the policy is to go on from and has not drawn."""
        forced = f"\n{self._format.thoughts.closing}\n\n{text}" if prompt.thinking else text
        ids = np.asarray(self._format.codec.encode(forced, at_start=False), np.int32)
        return replace(prompt, ids=np.concatenate([prompt.ids, ids]), forced=forced)

    def add_turn(
        self, number: int, prompt: Prompt, completion: Completion, reply: Message | None, signature: str | None = None
    ) -> None:
        """Adds a turn. ``reply`` is the message the agent was given, None where it never got the whole of it."""
        ended = len(completion.token_ids) > 0 and int(completion.token_ids[-1]) in self._format.stop_ids
        said = prompt.forced + self._format.decode(completion.token_ids)
        spoken = SpokenTurn(before=prompt.before, said=said, thought="" if reply is None else reply.reasoning)
        turn = AnsweredTurn(
            number=number, asked=prompt.messages, completion=completion, ended=ended, spoken=spoken, reply=reply
        )
        self._answered.append(turn)
        if reply is not None:
            for key in prompt.keys:
                self._replies.setdefault(key, []).append(turn)
            self._evidence.update({call.id: turn for call in reply.tool_calls if call.id is not None})
            if signature is not None:
                self._evidence[signature] = turn

    def forget(self) -> None:
        """Lets go of everything; the conversation is over."""
        self._answered, self._replies, self._evidence = [], {}, {}

    def _tell_tools(self, request: LocatedRequest) -> tuple[Message, ...]:
        if self._example is None or not request.chat.tools:
            return request.messages
        note = describe_tools(request.chat.tools, self._example)
        first = request.messages[0]
        if first.role == "system":
            return (Message.of_text("system", f"{first.text}\n\n{note}"), *request.messages[1:])
        return (Message.of_text("system", note), *request.messages)

    def _find_replies(self, message: Message, keys: Sequence[bytes]) -> list[AnsweredTurn]:
        """The turns in any of these histories that ``message`` may be the reply of, in order of arrival; of those that
        are the same ids the first."""
        named = self._find_named(message)
        there = {turn.number: turn for key in keys for turn in self._replies.get(key, ())}
        if named is not None:
            there = {number: turn for number, turn in there.items() if turn is named}
        variants = (message, self._format.thoughts.split_message(message))
        fits = [
            turn
            for turn in there.values()
            if turn.reply is not None and any(is_echo(v, turn.reply, known=named is not None) for v in variants)
        ]
        distinct: list[AnsweredTurn] = []
        for turn in sorted(fits, key=lambda turn: turn.number):
            if not any(turn.repeats(each) for each in distinct):
                distinct.append(turn)
        return distinct

    def _find_named(self, message: Message) -> AnsweredTurn | None:
        """The turn whose ids or signature ``message`` carries."""
        names = [*message.signatures, *(call.id for call in message.tool_calls if call.id is not None)]
        return next((self._evidence[name] for name in names if name in self._evidence), None)

    def _restore(self, message: Message, found: Sequence[AnsweredTurn]) -> Message:
        """``message`` as the session knows it: as it was said, where its ids tell in which turn, in another history."""
        if message.role != "assistant":
            return message
        named = self._find_named(message)
        if found or named is None or named.reply is None or not is_echo(message, named.reply, known=True):
            return self._format.thoughts.split_message(message)
        return named.reply

    def _continue_ids(self, turn: AnsweredTurn, prompt: RenderedPrompt, known: int) -> TokenIds | None:
        new = self._format.continue_turn(prompt, known, turn.spoken)
        if new is None:
            return None
        # A reply that was cut short never drew its end: the template's is put there, not sampled.
        end = [] if turn.ended else [self._format.end_of_turn_id]
        done = turn.completion
        return np.concatenate([done.prompt_ids, done.token_ids, np.asarray(end + new, np.int32)]).astype(np.int32)


def _find_longest_prefix(ids: TokenIds, turns: Sequence[AnsweredTurn]) -> int | None:
    best: AnsweredTurn | None = None
    for turn in turns:
        longer = turn.size < len(ids) and (best is None or turn.size > best.size)
        if longer and turn.begins(ids):
            best = turn
    return None if best is None else best.number
