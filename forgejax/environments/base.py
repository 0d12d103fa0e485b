"""Where tasks come from, what an episode is given to work in, and how its result is scored."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from forgejax.environments.sandbox import Bubblewrap
from forgejax.types import Reward, Task, Trajectory
from forgejax.types.episode import require_finite


@dataclass(frozen=True, kw_only=True)
class WorkTool:
    """A tool of an episode for white-box agents. ``parameters`` are a JSON schema of an object.

    ``call`` gives what the policy is told, errors of its own making included. It raises EnvironmentLostError where the
    tool is no longer there.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[Mapping[str, Any]], Awaitable[str]]

    def describe(self) -> dict[str, Any]:
        """As functions are described to a model."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


class Game(Protocol):
    """What answers each move of an episode with an observation, for white-box agents."""

    @property
    def observation(self) -> str:
        """What there is to see now; at first what the game begins with."""
        ...

    @property
    def done(self) -> bool: ...

    async def act(self, move: str) -> None:
        """Makes a move, whatever the policy said. Raises EnvironmentLostError where the game is no longer there."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What an episode's agent is given beside its question.

    ``variables`` are laid over the environment of a process that is started for the episode, and ``directory`` is
    where it runs; None leaves it where the trainer is. With a ``sandbox`` it runs in that, in ``/app``, which is
    ``directory``. ``tools`` and ``game`` are for white-box agents;
    ``session`` is what the environment itself keeps of an episode.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    sandbox: Bubblewrap | None = None
    tools: tuple[WorkTool, ...] = ()
    game: Game | None = None
    session: object = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an episode earned: its outcome in [0, 1], which evaluations report, and rewards granted along the way.

    The rewards count as they are, at the times they carry; that of the outcome is added by ``compute_rewards``. Raises
    ValueError where the outcome is no finite number, for it says nothing of the episode, or a reward is no ``Reward``.
    """

    outcome: float
    rewards: tuple[Reward, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcome", require_finite("the outcome", self.outcome))
        rewards = self.rewards if isinstance(self.rewards, tuple | list) else (self.rewards,)
        if odd := [reward for reward in rewards if not isinstance(reward, Reward)]:
            raise ValueError(f"a reward of the score is {odd[0]!r}; expected a tuple of Reward(kind=, value=, at=)")
        object.__setattr__(self, "rewards", tuple(rewards))


class Environment(Protocol):
    """An endless, deterministic stream of training tasks, some held-out ones, and their scorer."""

    @property
    def held_out(self) -> Sequence[Task]:
        """Tasks for evaluation; none of them is a training task."""
        ...

    def task(self, index: int) -> Task:
        """The training task at an absolute index, the same one each time."""
        ...

    async def open(self, task: Task) -> Workspace:
        """What one episode of the task works in. Whoever cancels it gets nothing to close."""
        ...

    async def close(self, workspace: Workspace) -> None:
        """Takes away what ``open`` gave; called once for each, whatever became of the episode."""
        ...

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        """What the episode earned; its ``rewards`` and ``outcome`` are not set yet. A senseless answer scores 0.

        Raises UnscoredError where nobody can tell: the episode is masked then, and counted as such. May block: it is
        called on a thread of its own, with a deadline, before the workspace is closed.
        """
        ...
