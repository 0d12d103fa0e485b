"""What a wire format has to say; everything else about a request is the same for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.reply import Delta, Reply
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError

Method = Literal["GET", "POST", "PUT", "DELETE"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a dialect asks for replies: a JSON object in, one reply out."""

    method: Method = "POST"
    path: str

    def covers(self, path: str) -> bool:
        """Whether ``path`` is this one or lies under it."""
        return path == self.path or path.startswith(f"{self.path}/")


class AskingSession(Protocol):
    """What a page may do with the session it was asked under."""

    @property
    def memory(self) -> ReplyMemory: ...

    async def count_tokens(self, chat: ChatRequest) -> int: ...


Answer = Callable[[AskingSession, Mapping[str, Any], Mapping[str, str]], Awaitable[Mapping[str, Any]]]
"""Answers a page: from the session, the body (empty for GET and DELETE) and the names in the path. Raises
RefusedError."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of a dialect's that samples nothing. ``path`` may hold ``{name}``."""

    method: Method
    path: str
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A request as it was understood.

    ``stream``: the answer is sent while it is drawn. ``keep``: the session remembers the reply under its id, and
    ``history``, the messages before it (those of ``chat`` where it is None). ``body`` is what was sent, for what only
    the wording of the answer needs. ``ignored`` names what was sent and has no effect; it is counted.
    """

    chat: ChatRequest
    stream: bool
    keep: bool = False
    history: tuple[Message, ...] | None = None
    body: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What is known of an answer before its first token. ``created`` is in seconds since the epoch."""

    id: str
    created: int
    model: str
    prompt_tokens: int = 0


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
    def pages(self) -> Sequence[Page]: ...

    @property
    def streamed_failures(self) -> frozenset[str]:
        """Codes of the refusals that whoever asked for a stream hears in a stream, and not as an HTTP status."""
        ...

    @property
    def statuses(self) -> Mapping[str, int]:
        """HTTP statuses of refusals, by their code, where this format has others for them."""
        ...

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


def remember_reply(
    memory: ReplyMemory, head: ReplyHead, request: ParsedRequest, reply: Reply, answer: Mapping[str, Any]
) -> None:
    """Keeps a reply in its session's memory, worded as ``answer``, where its request asks for that."""
    if request.keep:
        history = request.chat.messages if request.history is None else request.history
        memory.remember(head.id, (*history, reply.message), answer)


def find_bearer(headers: Mapping[str, str]) -> str | None:
    """The key of an ``Authorization: Bearer KEY``, or what ``x-api-key`` or ``api-key`` hold."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or headers.get("api-key") or None


def name_call(id_: str | None, index: int) -> str:
    """A call's id on the wire; histories may hold calls without one."""
    return id_ or f"call_unnamed{index:03d}"
