"""Requests that are sent again: their recorded answer, and never a second turn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from forgejax.gateway.history.conversation import LocatedRequest
from forgejax.gateway.pending import PendingReply


@dataclass(frozen=True, kw_only=True)
class RetryHints:
    """What a request's headers say of its being sent again: how often it was, and a key that stays the same."""

    count: int = 0
    key: str | None = None

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Self:
        """Names of ``headers`` are found in any case."""
        count = headers.get("x-stainless-retry-count", "")
        key = headers.get("idempotency-key") or headers.get("x-idempotency-key")
        if key is not None:  # whose bytes may be no text, and are kept apart all the same
            key = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return cls(count=int(count) if count.isascii() and count.isdigit() and len(count) < 9 else 0, key=key or None)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    number: int
    pending: PendingReply
    key: str | None


class AnswerLog:
    """The last answer to each request of a session.

    A request is the same if its whole history is (by meaning, in the same branch) and all else that was asked. It is a
    retry if it says so, if it carries the idempotency key of the one before, or if nobody read that one's answer;
    otherwise whoever asks the same again gets another answer. If he has closed the connection of the one before, it may
    be that he never read that one: it counts as undelivered.
    """

    def __init__(self) -> None:
        self._asked: dict[bytes, _Asked] = {}
        self._all: list[_Asked] = []

    def find(self, request: LocatedRequest, hints: RetryHints) -> PendingReply | None:
        """The recorded answer, if ``request`` is a retry of one that was answered."""
        asked = self._asked.get(_digest_request(request))
        if asked is None or not asked.pending.answered:
            return None
        same_key = hints.key is not None and hints.key == asked.key
        if hints.count > 0 or same_key or asked.pending.undelivered:
            return asked.pending
        asked.pending.undelivered = asked.pending.left
        return None

    def add(self, request: LocatedRequest, hints: RetryHints, number: int, pending: PendingReply) -> None:
        asked = _Asked(number=number, pending=pending, key=hints.key)
        self._asked[_digest_request(request)] = asked
        self._all.append(asked)

    def list_undelivered(self) -> frozenset[int]:
        """The numbers of the requests whose answer was complete and never read."""
        return frozenset(asked.number for asked in self._all if asked.pending.undelivered)

    def list_left(self) -> frozenset[int]:
        """The numbers of the requests whose connection was closed after they were answered."""
        return frozenset(asked.number for asked in self._all if asked.pending.left)

    def forget(self) -> None:
        self._asked, self._all = {}, []


def _digest_request(request: LocatedRequest) -> bytes:
    chat = request.chat
    rest = (
        chat.calls,
        chat.allowed and sorted(chat.allowed),
        chat.law,
        chat.max_tokens,
        chat.stop,
        chat.seed,
        chat.logprobs,
        chat.schema,
    )
    return hashlib.blake2b(b"".join(request.keys) + repr(rest).encode(), digest_size=16).digest()
