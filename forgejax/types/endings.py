"""How episodes ended, as counts and one example: what a message says of them when nothing can be learned from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from forgejax.types.episode import StopReason, Trajectory

_ERROR_CHARS = 3000


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An episode that failed: its task, its stop reason, and the end of its error, with the agent's stderr in it."""

    task_id: str
    reason: str
    error: str

    @classmethod
    def of(cls, trajectory: Trajectory) -> Self:
        error = (trajectory.error or "it gave no reason")[-_ERROR_CHARS:]
        return cls(task_id=trajectory.task_id, reason=trajectory.stop_reason.value, error=error)


@dataclass(frozen=True, kw_only=True)
class EpisodeEnds:
    """How ``episodes`` episodes ended.

    ``reasons`` count them by stop reason. ``unanswered`` completed without an answer. ``outcomes`` is the sum of the
    outcomes of those that gave one. ``last_failure`` is None where none failed.
    """

    episodes: int = 0
    reasons: Mapping[str, int]
    unanswered: int = 0
    outcomes: float = 0.0
    last_failure: Failure | None = None

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Self:
        known = list(trajectories)
        completed = [each for each in known if each.stop_reason is StopReason.COMPLETED]
        failures = [each for each in known if each.stop_reason.failed]
        return cls(
            episodes=len(known),
            reasons=Counter(each.stop_reason.value for each in known),
            unanswered=sum(each.answer is None for each in completed),
            outcomes=sum(each.outcome for each in completed if each.answer is not None),
            last_failure=Failure.of(failures[-1]) if failures else None,
        )

    def __add__(self, later: EpisodeEnds) -> EpisodeEnds:
        return EpisodeEnds(
            episodes=self.episodes + later.episodes,
            reasons=Counter(self.reasons) + Counter(later.reasons),
            unanswered=self.unanswered + later.unanswered,
            outcomes=self.outcomes + later.outcomes,
            last_failure=later.last_failure or self.last_failure,
        )

    @property
    def failed(self) -> int:
        """Episodes that something other than the policy's words ended."""
        return sum(self.reasons.get(reason.value, 0) for reason in StopReason if reason.failed)

    def describe_failures(self) -> str:
        """One sentence with the counts, and the words of the last failure."""
        counts = ", ".join(
            f"{reason.value} {self.reasons[reason.value]}"
            for reason in StopReason
            if reason.failed and self.reasons.get(reason.value)
        )
        said = f"of {self.episodes} episodes {self.failed} failed ({counts})"
        last = self.last_failure
        return said if last is None else f"{said}. The last one, {last.reason} on task {last.task_id}: {last.error}"

    def explain(self) -> str:
        """Why nothing could be learned from these episodes, and what to do about it."""
        answered = self.reasons.get(StopReason.COMPLETED.value, 0) - self.unanswered
        cut = self.reasons.get(StopReason.TRUNCATED.value, 0)
        if 2 * self.failed >= self.episodes > 0:
            return (
                f"the agent or what it works in is at fault, not the tasks: {self.describe_failures()}\n"
                "Run the agent command by hand; correct it, its configuration, or agent.deadline_s"
            )
        if 2 * cut >= self.episodes > 0:
            return (
                f"of {self.episodes} episodes {cut} were cut off by their length: raise engine.max_context or the "
                "agent's own limit on replies"
            )
        if 2 * self.unanswered >= self.episodes > 0:
            return (
                f"of {self.episodes} episodes {self.unanswered} ended in good order and without an answer: the agent "
                "has to print it, as the last line of its output or as the worker's result"
            )
        mean = self.outcomes / answered if answered else 0.0
        rest = self.describe_failures() if self.failed else f"none of {self.episodes} episodes failed"
        return (
            f"the tasks are all too {'easy' if mean > 0.5 else 'hard'} for the policy (mean outcome {mean:.2f} of "
            f"{answered} answers): mix in other levels, or raise the group size; {rest}"
        )
