"""An episode: its task, its session with the gateway, its turns, rewards and wall clock.

Completion -> Turn -> Trajectory. Times are seconds on one clock, ``time.monotonic()`` of the process that runs the
gateway, unless a name says otherwise.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from forgejax.types.sampling import Completion, Purpose, SamplingLaw

RewardKind = Literal["outcome", "process", "speed"]


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    COMPLETED = "completed"  # the agent gave its answer
    TRUNCATED = "truncated"  # a completion hit its length limit and the agent could not go on
    DEADLINE = "deadline"  # the episode ran past its deadline
    AGENT_FAILED = "agent_failed"  # the agent program crashed or broke its contract
    ENVIRONMENT_FAILED = "environment_failed"  # a tool, the scorer or the engine failed: not the policy's doing
    CANCELLED = "cancelled"  # the run is ending

    @property
    def failed(self) -> bool:
        """Whether something other than the policy's words ended it: the agent, what it works in, or the clock."""
        return self in (StopReason.DEADLINE, StopReason.AGENT_FAILED, StopReason.ENVIRONMENT_FAILED)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One completion inside an episode.

    ``parent`` is the index of the earlier turn whose prompt and sampled ids are a strict prefix of this prompt, or None
    where this prompt starts a branch of its own. ``branch`` names why its history is not that of the turns before it,
    as the agent told or the gateway found; None where it goes on from one of them, or is the first. ``untrainable``
    names why its tokens must not be trained, or is None.
    """

    index: int
    completion: Completion
    parent: int | None
    requested_at: float
    finished_at: float
    requested_law: SamplingLaw
    branch: str | None = None
    untrainable: str | None = None
    tool_calls: int = 0
    malformed_tool_calls: int = 0

    def __post_init__(self) -> None:
        if self.parent is not None and not 0 <= self.parent < self.index:
            raise ValueError(f"turn {self.index}: parent {self.parent} is not an earlier turn")
        if self.finished_at < self.requested_at:
            raise ValueError(f"turn {self.index}: it finished at {self.finished_at}, before its request")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A weighted reward term and the time it was granted (its coefficient is already multiplied in)."""

    kind: RewardKind
    value: float
    at: float

    def __post_init__(self) -> None:
        """Raises ValueError for a kind there is none of, and where value or time is no finite number."""
        if self.kind not in get_args(RewardKind):
            kinds = ", ".join(get_args(RewardKind))
            raise ValueError(
                f"the kind of a reward is {self.kind!r}; expected one of {kinds}: what an environment grants "
                "along the way is process"
            )
        object.__setattr__(self, "value", require_finite(f"the {self.kind} reward", self.value))
        object.__setattr__(self, "at", require_finite(f"the time of the {self.kind} reward", self.at))


def require_finite(name: str, value: object) -> float:
    """The number, numpy's too, as a float. Raises ValueError with ``name`` for what is none, and for nan and inf."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One episode, finished or failed: a tree of turns, its rewards and its wall clock.

    ``outcome`` is the scorer's figure in [0, 1], unweighted. ``masked`` names why no turn of the episode may be trained
    or enter a baseline (a failed environment, say), or is None.
    """

    task_id: str
    session_id: str
    member: int
    turns: tuple[Turn, ...]
    rewards: tuple[Reward, ...]
    outcome: float
    started_at: float
    finished_at: float
    stop_reason: StopReason
    answer: str | None = None
    error: str | None = None
    masked: str | None = None

    def __post_init__(self) -> None:
        if [turn.index for turn in self.turns] != list(range(len(self.turns))):
            raise ValueError(f"session {self.session_id}: turns are not numbered 0, 1, 2, ...")

    @property
    def queued_s(self) -> float:
        """Seconds in which some turn waited for our own engine; turns that wait side by side count once."""
        total, until = 0.0, -math.inf
        for turn in sorted(self.turns, key=lambda turn: turn.requested_at):
            ended = turn.requested_at + turn.completion.queued_s
            total += max(0.0, ended - max(turn.requested_at, until))
            until = max(until, ended)
        return total

    @property
    def active_s(self) -> float:
        """Wall clock of the episode, tools and sub-agents included, without the time queued in our engine."""
        return max(0.0, self.finished_at - self.started_at - self.queued_s)

    @property
    def tool_calls(self) -> int:
        return sum(turn.tool_calls for turn in self.turns)

    @property
    def total_reward(self) -> float:
        return sum(reward.value for reward in self.rewards)

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question an agent is asked. ``family`` pools speed baselines; ``level`` labels reports (easy, hard)."""

    id: str
    family: str
    level: str
    question: str
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """What an episode needs from the gateway when its session opens."""

    purpose: Purpose = "train"
    law: SamplingLaw | None = None  # overrides what the agent asks for; None: the agent's own law holds
    seed: int | None = None
    owner: str = ""  # see ``SampleRequest``
    task_id: str = ""  # what it is opened for; named in the log
    deadline_s: float | None = None  # from its opening on; past it the session's key opens nothing any more


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open session as the agent sees it: ``base_url`` and ``api_key`` are all an agent program needs.

    ``model`` is the policy's name there, ``context_length`` how many tokens a prompt and its reply have together.
    """

    id: str
    base_url: str
    api_key: str = field(repr=False)
    model: str
    context_length: int


class Sessions(Protocol):
    """The gateway's side of an episode."""

    def open(self, spec: SessionSpec) -> Session: ...

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        """Ends the session (its open requests are cancelled) and gives its turns in order of arrival. Idempotent."""
        ...
