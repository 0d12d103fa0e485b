"""What becomes of a session that is played again, and how that differs from its record."""

from __future__ import annotations

import numpy as np

from forgejax.chat.format import ChatFormat
from forgejax.gateway.asked import AskedRequest
from forgejax.gateway.records.base import RecordedDraw, SessionRecord, SessionRecords
from forgejax.gateway.records.lines import AgainLine, CannedLine, FailedLine, RecordLine, RefusedLine, TurnLine
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.side_calls.rules import SideCall
from forgejax.types import Completion, SessionSpec

_SHOWN = 12  # ids of a difference


class Witness(SessionRecord, SessionRecords):
    """Remembers how each request ended, in words, and what was drawn for each number. Its own ``SessionRecords``.

    ``next_ask`` is the number of the call that comes next.
    """

    def __init__(self) -> None:
        self.next_ask = 0
        self.ends: dict[int, str] = {}
        self.draws: dict[int, RecordedDraw] = {}

    def open(self, session_id: str, spec: SessionSpec) -> SessionRecord:
        return self

    def begin(self, asked: AskedRequest, unread: frozenset[int], left: frozenset[int]) -> int:
        return self.next_ask

    def repeat(self, ask: int, number: int) -> None:
        self.ends[ask] = f"got the answer of turn {number} again"

    def can(self, ask: int, rule: SideCall) -> None:
        self.ends[ask] = f"got the text of the rule {rule.name}"

    def draw(self, ask: int, drawn: RecordedDraw) -> None:
        self.ends[ask] = f"was drawn as turn {drawn.number}"
        self.draws[drawn.number] = drawn

    def refuse(self, ask: int, refusal: RefusedError) -> None:
        self.ends[ask] = f"was refused ({refusal.code or refusal.status})"

    def fail(self, ask: int, number: int, why: str) -> None:
        self.ends[ask] = "was not answered by the engine"


def describe_end(line: RecordLine) -> str | None:
    """The words ``Witness`` has for the same; None where the line ends no request."""
    if isinstance(line, AgainLine):
        return f"got the answer of turn {line.number} again"
    if isinstance(line, CannedLine):
        return f"got the text of the rule {line.rule}"
    if isinstance(line, TurnLine):
        return f"was drawn as turn {line.number}"
    if isinstance(line, RefusedLine):
        return f"was refused ({line.code or line.status})"
    return "was not answered by the engine" if isinstance(line, FailedLine) else None


def compare_turn(line: TurnLine, recorded: Completion, drawn: RecordedDraw, chat_format: ChatFormat) -> list[str]:
    """In how far a turn is another than its record says, one sentence each."""
    turn, request = drawn.turn, drawn.request
    pairs = {
        "parent": (line.parent, drawn.prompt.parent),
        "branch": (line.branch, drawn.prompt.branch),
        "limit of tokens": (line.max_tokens, request.max_tokens),
        "seed": (line.seed, request.seed),
        "law": (line.law, request.law),
        "reason not to train": (line.untrainable, None if turn is None else turn.untrainable),
        "number of calls": (line.tool_calls, 0 if turn is None else turn.tool_calls),
        "number of malformed calls": (line.malformed, 0 if turn is None else turn.malformed_tool_calls),
    }
    found = [
        f"turn {line.number}: its {name} was {before}, and now is {now}"
        for name, (before, now) in pairs.items()
        if before != now
    ]
    before, now = recorded.prompt_ids, np.asarray(drawn.prompt.ids, np.int32)
    if not np.array_equal(before, now):
        size = min(len(before), len(now))
        differ = before[:size] != now[:size]
        at = int(differ.argmax()) if differ.any() else size
        was, is_ = (chat_format.decode(ids[at : at + _SHOWN].tolist()) for ids in (before, now))
        found.append(
            f"turn {line.number}: its prompt had {len(before)} tokens, and now has {len(now)}; from token {at} on it "
            f"read {was!r}, and now reads {is_!r}"
        )
    return found
