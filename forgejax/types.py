"""The nouns that flow between the packages, and the Protocols the packages meet at.

Completion -> Turn -> Trajectory -> Group; what happens after a Group (prefix trees, packed batches) belongs to the
learner. Everything here is frozen and checked on construction. Only numpy and the standard library are imported.

Times are seconds on one clock, ``time.monotonic()`` of the process that runs the gateway, unless a name says otherwise.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
Purpose = Literal["train", "evaluation", "probe"]


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # a stop id was drawn (it is the last of token_ids), or the caller's on_tokens asked to stop
    LENGTH = "length"  # max_tokens or the context length was reached
    REPETITION = "repetition"  # the run of near-certain tokens that marks a loop
    CANCELLED = "cancelled"  # the caller went away


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    COMPLETED = "completed"  # the agent gave its answer
    TRUNCATED = "truncated"  # a completion hit its length limit and the agent could not go on
    DEADLINE = "deadline"  # the episode ran past its deadline
    AGENT_FAILED = "agent_failed"  # the agent program crashed or broke its contract
    ENVIRONMENT_FAILED = "environment_failed"  # a tool, the scorer or the engine failed: not the policy's doing
    CANCELLED = "cancelled"  # the run is ending


@dataclass(frozen=True, kw_only=True)
class SamplingLaw:
    """The distribution tokens are drawn from: softmax(logits / temperature), possibly truncated.

    ``top_k = 0`` and ``top_p = 1`` mean no truncation. ``temperature = 0`` means greedy.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p}: expected a probability in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: expected 0 (off) or a positive count")

    @property
    def truncated(self) -> bool:
        """Whether the recorded log-prob is not that of the whole policy: such tokens cannot be trained."""
        return self.temperature == 0.0 or self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One prompt for the engine: ids in, nothing about text, chat or agents."""

    request_id: str
    prompt_ids: TokenIds
    max_tokens: int
    law: SamplingLaw = SamplingLaw()
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    purpose: Purpose = "train"

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError(f"request {self.request_id}: the prompt is empty; give at least one token id")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_tokens is {self.max_tokens}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the engine drew for one request. Arrays are parallel to ``token_ids``; a drawn stop id is included.

    ``logprobs[t]`` is the log-probability of ``token_ids[t]`` under the whole softmax of policy version
    ``versions[t]`` at the law's temperature (at 1 where the law is greedy), before any truncation;
    ``oldest_versions[t]`` is the oldest policy version in the KV that this token saw. ``queued_s`` is the time spent
    waiting for the engine before prefill began (no fault of the agent), ``generate_s`` the time from then to the end.
    """

    request_id: str
    prompt_ids: TokenIds
    token_ids: TokenIds
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    oldest_versions: NDArray[np.int32]
    finish_reason: FinishReason
    law: SamplingLaw
    cached_tokens: int = 0
    queued_s: float = 0.0
    generate_s: float = 0.0

    def __post_init__(self) -> None:
        sizes = {len(self.token_ids), len(self.logprobs), len(self.versions), len(self.oldest_versions)}
        if len(sizes) != 1:
            raise ValueError(f"completion {self.request_id}: per-token arrays differ in length: {sorted(sizes)}")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One completion inside an episode.

    ``parent`` is the index of the earlier turn whose prompt and sampled ids are a strict prefix of this prompt, or None
    where this prompt starts a branch of its own. ``untrainable`` names why its tokens must not be trained, or is None.
    """

    index: int
    completion: Completion
    parent: int | None
    requested_at: float
    finished_at: float
    requested_law: SamplingLaw
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

    kind: Literal["outcome", "process", "speed"]
    value: float
    at: float


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
        if not np.isfinite([reward.value for reward in self.rewards]).all():
            raise ValueError(f"session {self.session_id}: a reward is not finite")

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
class Dispatch:
    """The right to run one group: its absolute index, its attempt and the policy version it starts on."""

    index: int
    attempt: int
    version: int


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

OnTokens = Callable[[Sequence[int]], bool | None]
"""Called with each run of newly drawn ids, in order; returning True ends the generation after the last of them."""


@runtime_checkable
class Sampler(Protocol):
    """The one door to an inference engine, in this process or behind a socket."""

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """Draws one completion. Cancelling the awaiting task cancels the request in the engine.

        Raises EngineError if the engine cannot serve it (too long a prompt, a dead engine, a passed deadline).
        """
        ...


class WeightSink(Protocol):
    """Where new policy weights go; each later token is drawn by them and carries their version."""

    def publish(self, params: Any, version: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """What an episode needs from the gateway when its session opens."""

    purpose: Purpose = "train"
    law: SamplingLaw | None = None  # overrides what the agent asks for; None: the agent's own law holds
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open session as the agent sees it: ``base_url`` and ``api_key`` are all an agent program is given."""

    id: str
    base_url: str
    api_key: str


class Sessions(Protocol):
    """The gateway's side of an episode."""

    def open(self, spec: SessionSpec) -> Session: ...

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        """Ends the session (its open requests are cancelled) and gives its turns in order of arrival. Idempotent."""
        ...


class TaskSource(Protocol):
    """An endless, deterministic stream of tasks and their scorer."""

    def task(self, index: int) -> Task: ...

    def score(self, task: Task, answer: str | None) -> float:
        """The outcome in [0, 1]; a missing or senseless answer scores 0 and never raises."""
        ...


class GroupSink(Protocol):
    """The data pool as the rollout side sees it."""

    async def next_dispatch(self) -> Dispatch | None:
        """Waits until another group may be in flight; None when the run is over."""
        ...

    def finish(self, group: Group) -> None:
        """Accepts a finished group: when this returns it survives a crash. Raises StorageFullError or PoolError."""
        ...

    def fail(self, dispatch: Dispatch, reason: str, sampled_tokens: int) -> None:
        """Records that a group came to nothing; the window slides past it and its tokens are counted under reason."""
        ...
