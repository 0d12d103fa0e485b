"""Evaluation: held-out tasks, played by the same agents through the same gateway as in training."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from forgejax.agents import EpisodeRunner, run_tasks
from forgejax.chat import ChatFormat
from forgejax.errors import CheckpointError
from forgejax.report.evaluation import EvaluationResult, sum_up_evaluation
from forgejax.report.final.html import Example
from forgejax.report.storage import write_atomic
from forgejax.types import SamplingLaw, SessionSpec, Task, Trajectory, Turn


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found, and the episodes it found it in; ``complete``: every one of them was played.

    ``cut_off_tokens`` were sampled in plays that a dying worker took along, of episodes that were played again.
    """

    result: EvaluationResult
    trajectories: tuple[Trajectory, ...]
    cut_off_tokens: int
    complete: bool

    @property
    def turns(self) -> Iterator[Turn]:
        return (turn for trajectory in self.trajectories for turn in trajectory.turns)

    @property
    def sampled_tokens(self) -> int:
        return self.cut_off_tokens + sum(trajectory.sampled_tokens for trajectory in self.trajectories)


async def evaluate(
    episodes: EpisodeRunner,
    tasks: Sequence[Task],
    *,
    law: SamplingLaw,
    samples: int,
    concurrency: int,
    seed: int,
    owner: str,
    stop: asyncio.Event,
) -> Evaluation:
    """Plays each task ``samples`` times under one law. The seed fixes the randomness of every request; the
    ``owner`` is what its tokens are counted with.

    Breaks off once ``stop`` is set, with what was played so far.
    """
    session = SessionSpec(purpose="evaluation", law=law, seed=seed, owner=owner)
    cut_off: list[int] = []
    trajectories = await run_tasks(
        episodes,
        tasks,
        samples=samples,
        session=session,
        concurrency=concurrency,
        stop=stop,
        on_cut_off=cut_off.append,
    )
    return Evaluation(
        result=sum_up_evaluation(trajectories, tasks),
        trajectories=tuple(trajectories),
        cut_off_tokens=sum(cut_off),
        complete=not (tasks and stop.is_set()),
    )


def describe_masked(evaluation: Evaluation) -> str:
    """Why episodes were not scored, with how many of each reason and the words of one, for people."""
    masked = [trajectory for trajectory in evaluation.trajectories if trajectory.masked is not None]
    counts = Counter(str(trajectory.masked) for trajectory in masked)
    errors = {str(trajectory.masked): trajectory.error.splitlines()[0] for trajectory in masked if trajectory.error}
    return "; ".join(
        f"{count} {reason}" + (f" ({errors[reason]})" if reason in errors else "") for reason, count in counts.items()
    )


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What is kept of an evaluation, with the run: its figures and a few episodes for a reader."""

    result: EvaluationResult
    examples: list[Example]


def save_evaluated(path: Path, evaluated: Evaluated) -> None:
    """Writes it, whole or not at all. Raises StorageFullError."""
    write_atomic(path, msgspec.json.encode(evaluated))


def load_evaluated(path: Path) -> Evaluated | None:
    """What ``save_evaluated`` wrote, or None if nothing was. Raises CheckpointError for a damaged file."""
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evaluated)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; delete it, and the report will do without it") from error


def pick_examples(evaluation: Evaluation, tasks: Sequence[Task], chat: ChatFormat, per_level: int = 2) -> list[Example]:
    """A few episodes of each level for a reader, with what the policy wrote."""
    found: list[Example] = []
    shown: dict[str, int] = {}
    by_id = {task.id: task for task in tasks}
    for trajectory in evaluation.trajectories:
        task = by_id[trajectory.task_id]
        if shown.setdefault(task.level, 0) >= per_level:
            continue
        shown[task.level] += 1
        turns = [chat.decode(turn.completion.token_ids.tolist()) for turn in trajectory.turns]
        found.append(
            Example(
                question=task.question,
                answer=trajectory.answer,
                tool_calls=trajectory.tool_calls,
                reward=trajectory.outcome,
                transcript="\n".join(turns),
            )
        )
    return found
