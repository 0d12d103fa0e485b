"""Every started episode ends in exactly one Trajectory."""

import asyncio
import threading
import time
from typing import Any

import pytest

from forgejax.agents import AgentConfig, AgentResult, EpisodeRunner, EpisodeSpec, StopPolicy
from forgejax.agents import episode as episode_module
from forgejax.environments import RewardConfig
from forgejax.errors import GatewayError
from forgejax.types import FinishReason, Session, SessionSpec, StopReason, Task, Trajectory, Turn
from tests.agents.fakes import FakeScaffold, FakeSessions, SumTasks, make_task, make_turn

AGENT = AgentConfig(command=("agent",), deadline_s=0.1, grace_s=0.1)


async def answer_one(episode: EpisodeSpec) -> AgentResult:
    return AgentResult(answer="1")


async def hang(episode: EpisodeSpec) -> AgentResult:
    await asyncio.Event().wait()
    raise AssertionError


def make_runner(play: Any = answer_one, **fields: Any) -> EpisodeRunner:
    given: dict[str, Any] = {"sessions": FakeSessions(), "tasks": SumTasks(), "agent": AGENT}
    return EpisodeRunner(scaffold=FakeScaffold(play), **(given | fields))


async def run(runner: EpisodeRunner) -> Trajectory:
    return await runner.run(make_task(), member=3, session=SessionSpec(seed=5))


async def test_a_right_answer_is_scored_and_rewarded_at_its_end() -> None:
    sessions = FakeSessions()
    trajectory = await run(make_runner(sessions=sessions, reward=RewardConfig(outcome_weight=2.0)))
    assert (trajectory.task_id, trajectory.session_id, trajectory.member) == ("task-0", "s1", 3)
    assert (trajectory.outcome, trajectory.answer, trajectory.stop_reason) == (1.0, "1", StopReason.COMPLETED)
    assert trajectory.total_reward == 2.0
    assert trajectory.masked is None
    assert sessions.opened == [SessionSpec(seed=5)]
    assert sessions.closed == ["s1"]


async def test_speed_is_measured_against_the_baseline_given_at_dispatch() -> None:
    runner = make_runner(reward=RewardConfig(speed_weight=1.0))
    trajectory = await runner.run(make_task(), session=SessionSpec(), baseline_s=1000.0)
    assert trajectory.rewards[-1].kind == "speed"
    assert trajectory.rewards[-1].value > 0.99


async def test_a_scaffold_that_raises_is_a_failed_agent_and_masked_by_default() -> None:
    async def crash(episode: EpisodeSpec) -> AgentResult:
        raise RuntimeError("bug")

    trajectory = await run(make_runner(crash))
    assert trajectory.stop_reason is StopReason.AGENT_FAILED
    assert (trajectory.masked, trajectory.outcome) == ("agent_failed", 0.0)
    assert "RuntimeError: bug" in str(trajectory.error)
    assert trajectory.sampled_tokens == 3


async def test_a_scaffold_that_ignores_the_deadline_is_cut_off_after_the_grace() -> None:
    started = time.monotonic()
    trajectory = await run(make_runner(hang))
    assert trajectory.stop_reason is StopReason.DEADLINE
    assert trajectory.masked is None  # trained by default
    assert 0.2 <= time.monotonic() - started < 2.0


async def test_a_scaffold_that_ignores_its_cancellation_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_module, "CANCEL_S", 0.1)
    let_go = asyncio.Event()

    async def stubborn(episode: EpisodeSpec) -> AgentResult:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        raise RuntimeError("too late to matter")

    assert (await run(make_runner(stubborn))).stop_reason is StopReason.DEADLINE
    let_go.set()
    await asyncio.sleep(0)


async def test_a_cancelled_episode_ends_the_agent_closes_the_session_and_keeps_its_turns() -> None:
    sessions = FakeSessions()
    task = asyncio.create_task(run(make_runner(hang, sessions=sessions)))
    await asyncio.sleep(0.02)
    task.cancel()
    trajectory = await task
    assert (trajectory.stop_reason, trajectory.masked) == (StopReason.CANCELLED, "cancelled")
    assert trajectory.sampled_tokens == 3
    assert sessions.closed == ["s1"]


async def test_a_cancellation_after_the_agents_end_loses_nothing() -> None:
    closing, go_on = asyncio.Event(), asyncio.Event()

    class SlowSessions(FakeSessions):
        async def close(self, session_id: str) -> tuple[Turn, ...]:
            closing.set()
            await go_on.wait()
            return await super().close(session_id)

    task = asyncio.create_task(run(make_runner(sessions=SlowSessions())))
    await closing.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    assert (await task).outcome == 1.0


async def test_a_session_that_cannot_be_opened_is_a_failed_environment() -> None:
    class Full(FakeSessions):
        def open(self, spec: SessionSpec) -> Session:
            raise GatewayError("no more sessions")

    trajectory = await run(make_runner(sessions=Full()))
    assert (trajectory.stop_reason, trajectory.masked) == (StopReason.ENVIRONMENT_FAILED, "environment_failed")
    assert "no more sessions" in str(trajectory.error)


async def test_a_session_that_cannot_be_closed_is_a_failed_environment() -> None:
    class Broken(FakeSessions):
        async def close(self, session_id: str) -> tuple[Turn, ...]:
            raise GatewayError("lost")

    trajectory = await run(make_runner(sessions=Broken()))
    assert (trajectory.stop_reason, trajectory.turns) == (StopReason.ENVIRONMENT_FAILED, ())


class BadScorer(SumTasks):
    def __init__(self, value: float | Exception | threading.Event) -> None:
        self._value = value

    def score(self, task: Task, answer: str | None) -> float:
        if isinstance(self._value, Exception):
            raise self._value
        if isinstance(self._value, threading.Event):
            self._value.wait()
            return 1.0
        return self._value


@pytest.mark.parametrize("value", [ValueError("what?"), float("nan")])
async def test_a_scorer_that_fails_is_a_failed_environment(value: float | Exception) -> None:
    trajectory = await run(make_runner(tasks=BadScorer(value)))
    assert (trajectory.stop_reason, trajectory.outcome) == (StopReason.ENVIRONMENT_FAILED, 0.0)
    assert "the scorer failed" in str(trajectory.error)
    assert trajectory.answer == "1"


async def test_a_scorer_that_hangs_is_a_failed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_module, "SCORE_S", 0.1)
    stuck = threading.Event()
    trajectory = await run(make_runner(tasks=BadScorer(stuck)))
    stuck.set()
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_FAILED


async def test_a_score_out_of_range_is_clamped() -> None:
    assert (await run(make_runner(tasks=BadScorer(7.0)))).outcome == 1.0


async def test_no_answer_after_a_completion_cut_off_by_length_is_a_truncation() -> None:
    async def give_up(episode: EpisodeSpec) -> AgentResult:
        return AgentResult(error="unparsable", stop_reason=StopReason.AGENT_FAILED)

    sessions = FakeSessions(turns=(make_turn(finish=FinishReason.LENGTH),))
    trajectory = await run(make_runner(give_up, sessions=sessions))
    assert (trajectory.stop_reason, trajectory.masked) == (StopReason.TRUNCATED, None)
    assert (await run(make_runner(sessions=sessions))).stop_reason is StopReason.COMPLETED


async def test_an_episode_without_a_turn_is_masked() -> None:
    assert (await run(make_runner(sessions=FakeSessions(turns=())))).masked == "no_turns"


async def test_what_is_masked_is_decided_by_the_policy() -> None:
    policy = StopPolicy(deadline="mask", agent_failed="train")
    assert (await run(make_runner(hang, policy=policy))).masked == "deadline"
