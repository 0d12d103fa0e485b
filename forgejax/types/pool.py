"""A group and its way through the data pool: dispatched, finished or failed, judged.

What happens to a Group after that (prefix trees, packed batches) belongs to the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from forgejax.types.episode import Task, Trajectory


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The right to run one group: its absolute index, its attempt and the policy version it starts on."""

    index: int
    attempt: int
    version: int

    @property
    def owner(self) -> str:
        """What its tokens are counted with, in the engines' own records as well."""
        return f"group-{self.index}.{self.attempt}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The G trajectories of one task: the unit of scheduling and of credit.

    ``baseline_s`` is the T_baseline its speed rewards were computed against, from outside the group; None before any.
    """

    dispatch: Dispatch
    task: Task
    trajectories: tuple[Trajectory, ...]
    baseline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"group {self.dispatch.index}: it has no trajectories; report a failed group as failed")

    @property
    def sampled_tokens(self) -> int:
        return sum(trajectory.sampled_tokens for trajectory in self.trajectories)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the learner says of a finished group before it enters a batch.

    ``drop`` names why the whole group is not trained (``zero_advantage``), or is None. ``untrained`` counts the sampled
    tokens that will not be trained, by reason; for a dropped group it covers every sampled token of it.
    """

    drop: str | None
    untrained: Mapping[str, int]


Judge = Callable[[Group], Verdict]


class GroupSink(Protocol):
    """The data pool as the rollout side sees it.

    ``apart`` are tokens, by reason, that were sampled for a group in plays that were given up, and are in none of its
    trajectories.
    """

    async def next_dispatch(self) -> Dispatch | None:
        """Waits until another group may be in flight; None when the run is over."""
        ...

    async def finish(self, group: Group, apart: Mapping[str, int]) -> None:
        """Accepts a finished group: when this returns it survives a crash. Raises StorageFullError or PoolError.

        A report that has begun ends, though its caller be cancelled.
        """
        ...

    async def fail(self, dispatch: Dispatch, reason: str, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        """Records that a group came to nothing; the window slides past it and its tokens are counted under reason.

        A report that has begun ends, as with ``finish``.
        """
        ...

    async def give_back(self, dispatch: Dispatch, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        """Returns the right to run a group that the end of the run cut off: whoever goes on with the run plays it again
        under its index, with its next attempt. What was sampled for it is counted and not trained.

        A report that has begun ends, as with ``finish``.
        """
        ...
