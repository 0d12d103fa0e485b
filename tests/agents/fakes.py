"""Fakes of the gateway, the pool and the task source, and makers of turns and trajectories."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forgejax.agents import AgentConfig, AgentResult, EpisodeSpec
from forgejax.environments import Score, Workspace
from forgejax.types import (
    Completion,
    Dispatch,
    FinishReason,
    Group,
    SamplingLaw,
    Session,
    SessionSpec,
    StopReason,
    Task,
    Trajectory,
    Turn,
)

CALCULATOR = Path(__file__).parents[2] / "examples" / "quickstart" / "agent.py"


def make_turn(
    index: int = 0,
    *,
    tokens: int = 3,
    at: float = 0.0,
    queued_s: float = 0.0,
    finish: FinishReason = FinishReason.STOP,
    malformed: int = 0,
) -> Turn:
    completion = Completion(
        request_id=f"r{index}",
        prompt_ids=np.arange(4, dtype=np.int32),
        token_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.zeros(tokens, np.float32),
        versions=np.zeros(tokens, np.int32),
        oldest_versions=np.zeros(tokens, np.int32),
        finish_reason=finish,
        law=SamplingLaw(),
        queued_s=queued_s,
    )
    return Turn(
        index=index,
        completion=completion,
        parent=None,
        requested_at=at,
        finished_at=at + 1.0,
        requested_law=SamplingLaw(),
        malformed_tool_calls=malformed,
    )


def make_trajectory(*turns: Turn, outcome: float = 1.0, seconds: float = 10.0, **fields: Any) -> Trajectory:
    given: dict[str, Any] = {
        "task_id": "t",
        "session_id": "s",
        "member": 0,
        "rewards": (),
        "stop_reason": StopReason.COMPLETED,
    }
    return Trajectory(turns=turns, outcome=outcome, started_at=0.0, finished_at=seconds, **(given | fields))


def make_task(index: int = 0) -> Task:
    return Task(id=f"task-{index}", family="sums", level="easy", question=f"{index} + 1", payload={"answer": index + 1})


def make_group(*trajectories: Trajectory, index: int = 0) -> Group:
    return Group(dispatch=Dispatch(index=index, attempt=0, version=0), task=make_task(index), trajectories=trajectories)


@dataclass
class FakeSessions:
    """Every session has the same turns; ``opened`` and ``closed`` are what happened."""

    turns: tuple[Turn, ...] = (make_turn(),)
    opened: list[SessionSpec] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def open(self, spec: SessionSpec) -> Session:
        self.opened.append(spec)
        return Session(
            id=f"s{len(self.opened)}",
            base_url="http://127.0.0.1:1/v1",
            api_key="key",
            model="policy",
            context_length=4096,
        )

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        self.closed.append(session_id)
        return self.turns


class SumTasks:
    """Task i asks for i + 1; counts the workspaces it opened and closed."""

    held_out: tuple[Task, ...] = ()

    def __init__(self) -> None:
        self.opened = self.closed = 0

    def task(self, index: int) -> Task:
        return make_task(index)

    async def open(self, task: Task) -> Workspace:
        self.opened += 1
        return Workspace(variables={"SUM": task.id})

    async def close(self, workspace: Workspace) -> None:
        self.closed += 1

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        return Score(outcome=float(trajectory.answer == str(task.payload["answer"])))


@dataclass
class FakeScaffold:
    """Plays each episode with ``play``."""

    play: Callable[[EpisodeSpec], Awaitable[AgentResult]]
    problem: Exception | None = None

    async def start(self) -> None: ...

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        return await self.play(episode)

    async def close(self) -> None: ...


@dataclass
class FakeSink:
    """Hands out dispatches while fewer than ``in_flight`` are open, ``total`` in all; then ends the run, or waits."""

    total: int
    in_flight: int = 4
    ends: bool = True
    dispatched: list[Dispatch] = field(default_factory=list)
    finished: list[Group] = field(default_factory=list)
    failed: list[tuple[Dispatch, str, int]] = field(default_factory=list)
    given_back: list[tuple[Dispatch, int]] = field(default_factory=list)
    apart: list[dict[str, int]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def next_dispatch(self) -> Dispatch | None:
        while True:
            open_groups = len(self.dispatched) - len(self.finished) - len(self.failed)
            if len(self.dispatched) < self.total and open_groups < self.in_flight:
                self.dispatched.append(Dispatch(index=len(self.dispatched), attempt=0, version=0))
                return self.dispatched[-1]
            if self.ends and len(self.dispatched) == self.total and open_groups == 0:
                return None
            self._changed.clear()
            await self._changed.wait()

    async def finish(self, group: Group, apart: Mapping[str, int]) -> None:
        self.finished.append(group)
        self.apart.append(dict(apart))
        self._changed.set()

    async def fail(self, dispatch: Dispatch, reason: str, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        self.failed.append((dispatch, reason, sampled_tokens))
        self.apart.append(dict(apart))
        self._changed.set()

    async def give_back(self, dispatch: Dispatch, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        self.given_back.append((dispatch, sampled_tokens))
        self.apart.append(dict(apart))
        self._changed.set()

    async def reported(self, count: int) -> None:
        """Waits until so many groups are finished."""
        while len(self.finished) < count:
            await asyncio.wait_for(self._changed.wait(), 10.0)
            await asyncio.sleep(0)


def python_agent(source: str, **fields: Any) -> AgentConfig:
    """A configuration for an agent that is a few lines of Python."""
    return AgentConfig(command=(sys.executable, "-I", "-S", "-u", "-c", source), **fields)


def make_episode(name: str = "e", question: str = "q", deadline_s: float = 10.0) -> EpisodeSpec:
    return EpisodeSpec(
        id=name,
        question=question,
        base_url="http://127.0.0.1:1/v1",
        api_key="key",
        model="policy",
        context_length=4096,
        deadline_s=deadline_s,
    )


def is_running(process_id: int) -> bool:
    """Whether it is alive: an orphan may stay a zombie where no init process reaps it."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
