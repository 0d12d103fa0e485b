"""What a wire format has to say; everything else about a request is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Reply
from forgejax.chat.reply_builder import Delta
from forgejax.gateway.refusals import RefusedError


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What is known of an answer before its first token."""

    id: str
    created: int
    model: str


Event = tuple[str | None, str]
"""A server-sent event: its name (or None) and its data, which holds no line break."""


class ReplyStream(Protocol):
    """Words one reply as events, in order: ``start`` once, ``delta`` for each piece, ``end`` or ``error`` once."""

    def start(self) -> Sequence[Event]: ...

    def delta(self, delta: Delta) -> Sequence[Event]: ...

    def end(self, reply: Reply) -> Sequence[Event]: ...

    def error(self, refusal: RefusedError) -> Sequence[Event]: ...


class Dialect(Protocol):
    """One wire format: its path, and the two translations. It holds no state between requests."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    def parse(self, body: Mapping[str, Any]) -> ChatRequest:
        """Raises RefusedError (400), naming the field, for a body that cannot be understood or served."""
        ...

    def response(self, head: ReplyHead, reply: Reply) -> Mapping[str, Any]: ...

    def stream(self, head: ReplyHead, request: ChatRequest) -> ReplyStream: ...

    def error(self, refusal: RefusedError) -> Mapping[str, Any]: ...
