"""What a session tells its record, and the record that keeps nothing."""

from __future__ import annotations

from dataclasses import dataclass

from forgejax.gateway.asked import AskedRequest
from forgejax.gateway.history.conversation import Prompt
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.side_calls.rules import SideCall
from forgejax.types import Completion, SampleRequest, SessionSpec, Turn


@dataclass(frozen=True, kw_only=True)
class RecordedDraw:
    """What was drawn for a request. ``turn`` is numbered by its request's arrival, None where no token was drawn;
    ``abandoned``: the agent never got it."""

    number: int
    prompt: Prompt
    request: SampleRequest
    completion: Completion
    turn: Turn | None
    abandoned: bool


class SessionRecord:
    """Is told of everything that a session does, as it happens; this one keeps nothing.

    ``unread`` and ``left`` are the numbers of the answers that nobody read, or whose connection was closed, by then.
    """

    def begin(self, asked: AskedRequest, unread: frozenset[int], left: frozenset[int]) -> int:
        """A request has come; gives the number by which the rest is told."""
        return 0

    def repeat(self, ask: int, number: int) -> None:
        """It got the answer recorded for the request ``number``."""

    def can(self, ask: int, rule: SideCall) -> None:
        """It got the text of a rule."""

    def draw(self, ask: int, drawn: RecordedDraw) -> None:
        """The engine has returned a completion for it."""

    def refuse(self, ask: int, refusal: RefusedError) -> None:
        """It was refused before it was sampled."""

    def fail(self, ask: int, number: int, why: str) -> None:
        """The engine gave no completion for it: it failed, or was cancelled before it had drawn."""

    def close(self, unread: frozenset[int]) -> None:
        """The session has ended."""


class SessionRecords:
    """Opens the record of each session; this one keeps none."""

    def open(self, session_id: str, spec: SessionSpec) -> SessionRecord:
        return SessionRecord()
