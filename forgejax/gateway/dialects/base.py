"""What a wire format has to say; everything else about a request is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Delta, Reply
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a dialect is spoken. Every route of a dialect takes a JSON object and asks for one reply."""

    method: Literal["POST", "PUT"] = "POST"
    path: str

    def covers(self, path: str) -> bool:
        """Whether ``path`` is this one or lies under it."""
        return path == self.path or path.startswith(f"{self.path}/")


@dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A request as it was understood.

    ``stream``: the answer is sent while it is drawn. ``keep``: the session remembers the history under the reply's id.
    ``body`` is what was sent, for what only the wording of the answer needs.
    """

    chat: ChatRequest
    stream: bool
    keep: bool = False
    body: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What is known of an answer before its first token. ``created`` is in seconds since the epoch."""

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
    """One wire format: where it is spoken, and the two translations.

    It holds no state between requests; what it must know of earlier ones lies in the session's memory.
    """

    @property
    def name(self) -> str: ...

    @property
    def routes(self) -> Sequence[Route]: ...

    @property
    def credential_form(self) -> str:
        """How a key is sent, in words for whoever sent none: ``Authorization: Bearer KEY``."""
        ...

    def credential(self, headers: Mapping[str, str]) -> str | None:
        """The session's key, if one was sent. Names of ``headers`` are found in any case."""
        ...

    def reply_id(self, request_id: str) -> str:
        """The answer's id in this format's shape; another one for every ``request_id``."""
        ...

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        """Raises RefusedError (400), naming the field, for a body that cannot be understood or served."""
        ...

    def response(self, head: ReplyHead, request: ParsedRequest, reply: Reply) -> Mapping[str, Any]: ...

    def stream(self, head: ReplyHead, request: ParsedRequest) -> ReplyStream: ...

    def error(self, refusal: RefusedError) -> Mapping[str, Any]:
        """The body of an HTTP error on this dialect's routes, whatever its status."""
        ...
