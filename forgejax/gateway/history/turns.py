"""Turns as they are kept: whether they may be trained on, their numbers, and roughly what they take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import msgspec

from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.reply import Reply
from forgejax.gateway.history.conversation import Branch, LocatedRequest
from forgejax.types import Completion, SampleRequest, Turn

_UNDELIVERED = "undelivered"
_TOLD = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


def judge_untrainable(request: SampleRequest, completion: Completion, abandoned: bool) -> str | None:
    """Why nothing is learned from ``completion``, None where it may be trained on."""
    if abandoned:
        return "cancelled"
    if request.grammar is not None:
        return "grammar"  # its log-probs are of the law over what the masks allowed, and the trainer knows no masks
    return None if completion.law.trainable else "sampling_law"


def name_branch(branch: Branch | None, body: Mapping[str, Any]) -> str | None:
    """Why a turn's history is not the one before it: the agent's own word, where it tells one, else what was found.

    It is ``metadata.branch`` of the request, in every dialect: a lower-case name of 32 characters at most. Anything
    else there tells nothing.
    """
    metadata = body.get("metadata")
    told = metadata.get("branch") if isinstance(metadata, Mapping) else None
    known = branch in (None, "history") and isinstance(told, str) and _TOLD.fullmatch(told)
    return told if known else branch


def renumber_turns(turns: Mapping[int, Turn], undelivered: Set[int]) -> tuple[Turn, ...]:
    """``turns``, by the numbers of their requests, as 0, 1, 2, ...; the answers to ``undelivered`` were never read."""
    index_of = {number: index for index, number in enumerate(sorted(turns))}
    followed = {turn.parent for turn in turns.values()}
    unread = undelivered - followed  # whoever went on from a reply has read it
    return tuple(
        replace(
            turn,
            index=index_of[number],
            parent=None if turn.parent is None else index_of.get(turn.parent),
            untrainable=turn.untrainable or (_UNDELIVERED if number in unread else None),
        )
        for number, turn in sorted(turns.items())
    )


def count_well_formed(reply: Reply) -> int:
    """The tool calls of ``reply`` that can be made."""
    return sum(call.problem is None for call in reply.message.tool_calls)


def measure_chat(chat: ChatRequest) -> int:
    """Roughly the characters of a prompt."""
    return measure_text(chat.messages) + len(msgspec.json.encode(chat.tools))


def measure_text(messages: Sequence[Message]) -> int:
    """The characters of what was said in ``messages``."""
    return sum(len(m.text) + len(m.reasoning) + sum(len(c.raw) for c in m.tool_calls) for m in messages)


def measure_turn(completion: Completion, located: LocatedRequest) -> int:
    """Roughly the bytes that are kept of a turn: of its messages those that no earlier turn has."""
    drawn = (completion.token_ids, completion.logprobs, completion.versions, completion.oldest_versions)
    known = 0 if located.turn is None else located.known
    return completion.prompt_ids.nbytes + sum(each.nbytes for each in drawn) + measure_text(located.messages[known:])
