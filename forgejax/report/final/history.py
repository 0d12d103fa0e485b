"""The attempts at a run, as its metrics tell them: one a start or resume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from forgejax.report.names import ATTEMPT, STEP, TIME


@dataclass(frozen=True, kw_only=True)
class AttemptSpan:
    """The steps of one attempt that are part of the run, and when (UTC) the first and the last of them were made.

    Steps that a later attempt made again are that attempt's.
    """

    attempt: int
    first_step: int
    last_step: int
    began: str
    ended: str


def list_attempts(rows: Sequence[Mapping[str, float]]) -> tuple[AttemptSpan, ...]:
    """The attempts that the rows of a run (``read_metrics``) belong to, in order."""
    spans = []
    known = [row for row in rows if ATTEMPT in row]
    for attempt in sorted({int(row[ATTEMPT]) for row in known}):
        own = [row for row in known if int(row[ATTEMPT]) == attempt]
        spans.append(
            AttemptSpan(
                attempt=attempt,
                first_step=int(own[0][STEP]),
                last_step=int(own[-1][STEP]),
                began=format_date(own[0].get(TIME)),
                ended=format_date(own[-1].get(TIME)),
            )
        )
    return tuple(spans)


def format_date(seconds: float | None) -> str:
    """Unix time as a date and time of day in UTC; empty where there is none."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
