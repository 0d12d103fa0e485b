"""How episodes ended, before, during and after training, for a reader."""

from collections.abc import Mapping
from dataclasses import dataclass

from forgejax.types import StopReason

_MEANINGS = {
    StopReason.COMPLETED: "The agent came to its end, with or without an answer.",
    StopReason.TRUNCATED: "A completion hit its length limit and the agent could not go on.",
    StopReason.DEADLINE: "The agent was still at work when the time of its episode was over.",
    StopReason.AGENT_FAILED: "The agent program crashed or broke its contract.",
    StopReason.ENVIRONMENT_FAILED: "A tool, the workspace, the scorer or the engine failed.",
    StopReason.CANCELLED: "The run ended before the episode did.",
}


@dataclass(frozen=True, kw_only=True)
class EndingLine:
    """One stop reason: episodes of the first evaluation, of training and of the last evaluation that ended by it."""

    reason: str
    failed: bool
    before: int
    training: int
    share: float
    after: int
    meaning: str


def make_endings(
    before: Mapping[str, int], training: Mapping[str, int], after: Mapping[str, int]
) -> tuple[EndingLine, ...]:
    """A line for each stop reason by which any episode ended; ``share`` is that of the training episodes."""
    whole = sum(training.values()) or 1
    return tuple(
        EndingLine(
            reason=reason.value,
            failed=reason.failed,
            before=before.get(reason, 0),
            training=training.get(reason, 0),
            share=training.get(reason, 0) / whole,
            after=after.get(reason, 0),
            meaning=_MEANINGS[reason],
        )
        for reason in StopReason
        if any(counts.get(reason) for counts in (before, training, after))
    )
