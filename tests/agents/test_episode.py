"""Every started episode ends in exactly one Trajectory."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from forgejax.agents import AgentConfig, AgentResult, EpisodeRunner, EpisodeSpec, EpisodeTally, StopPolicy
from forgejax.agents import episode as episode_module
from forgejax.environments import RewardConfig, Score, Workspace
from forgejax.errors import GatewayError, UnscoredError
from forgejax.types import FinishReason, Reward, Session, SessionSpec, StopReason, Task, Trajectory, Turn
from tests.agents.fakes import FakeScaffold, FakeSessions, SumTasks, make_task, make_turn

AGENT = AgentConfig(command=("agent",), deadline_s=0.1, grace_s=0.1)
# 60 s to open the workspace, twice 5 s to cancel what will not end, and the agent's own time.
OPENED = SessionSpec(seed=5, task_id="task-0", deadline_s=60.0 + 0.1 + 0.1 + 2 * 5.0)


async def answer_one(episode: EpisodeSpec) -> AgentResult:
    return AgentResult(answer="1")


async def hang(episode: EpisodeSpec) -> AgentResult:
    await asyncio.Event().wait()
    raise AssertionError


def make_runner(play: Any = answer_one, **fields: Any) -> EpisodeRunner:
    given: dict[str, Any] = {"sessions": FakeSessions(), "environment": SumTasks(), "agent": AGENT}
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
    assert sessions.opened == [OPENED]
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


async def test_no_episode_takes_longer_than_it_says_whatever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_runner().longest_s == pytest.approx(2 * 0.1 + 0.1 + 60.0 + 15.0 + 30.0 + 15.0 + 5 * 5.0)
    for name in ("_OPEN_S", "_CLOSE_S", "_CANCEL_S"):
        monkeypatch.setattr(episode_module, name, 0.1)
    end = asyncio.Event()

    async def ignore(*_: object) -> Any:
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()

    class Slow(SumTasks):
        async def open(self, task: Task) -> Workspace:
            await asyncio.sleep(0.08)
            return await super().open(task)

    environment, sessions = Slow(), FakeSessions()
    monkeypatch.setattr(environment, "close", ignore)
    monkeypatch.setattr(sessions, "close", ignore)
    runner = make_runner(ignore, environment=environment, sessions=sessions)
    started = time.monotonic()
    assert (await run(runner)).stop_reason is StopReason.ENVIRONMENT_FAILED
    assert time.monotonic() - started < runner.longest_s
    end.set()


async def test_a_scaffold_that_ignores_its_cancellation_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_module, "_CANCEL_S", 0.1)
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


def cut_off(**fields: Any) -> AgentResult:
    return AgentResult(error="the worker died", stop_reason=StopReason.ENVIRONMENT_FAILED, accident=True, **fields)


async def test_an_episode_that_an_accident_cut_off_is_played_again_in_a_session_of_its_own() -> None:
    lost: list[int] = []
    deadlines, sessions, environment = [], FakeSessions(), SumTasks()

    async def second_time_lucky(episode: EpisodeSpec) -> AgentResult:
        deadlines.append(episode.deadline_s)
        return await answer_one(episode) if len(deadlines) == 2 else cut_off()

    runner = make_runner(second_time_lucky, sessions=sessions, environment=environment)
    trajectory = await runner.run(make_task(), session=SessionSpec(seed=5), on_cut_off=lost.append)
    assert (trajectory.session_id, trajectory.outcome, trajectory.masked) == ("s2", 1.0, None)
    assert (deadlines, lost) == ([0.1, 0.1], [3]), "the whole deadline again, and no token uncounted"
    assert sessions.opened == [OPENED] * 2 and sessions.closed == ["s1", "s2"]
    assert (environment.opened, environment.closed) == (2, 2)


@pytest.mark.parametrize(("takes_s", "plays"), [(0.0, 4), (0.06, 3), (0.2, 1)])
async def test_an_episode_is_played_four_times_at_most_and_not_begun_later_than_its_first_deadline(
    takes_s: float, plays: int
) -> None:
    lost: list[int] = []

    async def unlucky(episode: EpisodeSpec) -> AgentResult:
        await asyncio.sleep(takes_s)
        return cut_off()

    agent = AgentConfig(command=("agent",), deadline_s=0.1, grace_s=0.2)
    sessions = FakeSessions()
    runner = make_runner(unlucky, sessions=sessions, agent=agent, policy=StopPolicy(environment_failed="train"))
    trajectory = await runner.run(make_task(), session=SessionSpec(), on_cut_off=lost.append)
    assert 1 <= len(sessions.opened) <= plays and (takes_s or len(sessions.opened) == plays)
    assert lost == [3] * (len(sessions.opened) - 1)
    assert (trajectory.stop_reason, trajectory.masked) == (StopReason.ENVIRONMENT_FAILED, "worker_died")
    assert trajectory.sampled_tokens == 3


async def test_an_episode_that_is_cancelled_after_an_accident_is_not_played_again() -> None:
    closing, go_on = asyncio.Event(), asyncio.Event()

    class SlowSessions(FakeSessions):
        async def close(self, session_id: str) -> tuple[Turn, ...]:
            closing.set()
            await go_on.wait()
            return await super().close(session_id)

    async def unlucky(episode: EpisodeSpec) -> AgentResult:
        return cut_off()

    sessions = SlowSessions()
    task = asyncio.create_task(run(make_runner(unlucky, sessions=sessions)))
    await closing.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    assert (await task).masked == "worker_died"
    assert len(sessions.opened) == 1


async def test_an_episode_that_waited_for_its_worker_is_timed_from_its_beginning() -> None:
    async def late(episode: EpisodeSpec) -> AgentResult:
        await asyncio.sleep(0.05)
        return AgentResult(answer="1", began_at=time.monotonic())

    assert (await run(make_runner(late))).active_s < 0.05


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
        super().__init__()
        self._value = value

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        if isinstance(self._value, Exception):
            raise self._value
        if isinstance(self._value, threading.Event):
            self._value.wait()
            return Score(outcome=1.0)
        return Score(outcome=self._value)


class GivesAsScore(SumTasks):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        score: Score = self._make()
        return score


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: None, "it gave None; expected a Score"),
        (lambda: 0.5, "it gave 0.5; expected a Score"),
        (lambda: Score(outcome=None), "the outcome is None; expected a finite number"),  # type: ignore[arg-type]
        (lambda: Score(outcome="1"), "the outcome is '1'; expected a finite number"),  # type: ignore[arg-type]
        (lambda: Score(outcome=1.0, rewards=cast(Any, (0.5,))), "a reward of the score is 0.5; expected a tuple"),
        (lambda: Reward(kind="process", value=float("nan"), at=0.0), "the process reward is nan; expected a finite"),
        (lambda: Reward(kind="style", value=1.0, at=0.0), "the kind of a reward is 'style'"),  # type: ignore[arg-type]
        (lambda: next(iter(())), "StopIteration"),
    ],
)
async def test_what_is_no_score_is_a_failed_environment_at_once(make: Callable[[], Any], sentence: str) -> None:
    environment = GivesAsScore(make)
    trajectory = await asyncio.wait_for(run(make_runner(environment=environment)), 5.0)
    assert (trajectory.stop_reason, trajectory.outcome) == (StopReason.ENVIRONMENT_FAILED, 0.0)
    assert str(trajectory.error).startswith("the scorer failed: ") and sentence in str(trajectory.error)
    assert (environment.opened, environment.closed, trajectory.masked) == (1, 1, "environment_failed")


async def test_a_workspace_that_is_none_is_a_failed_environment() -> None:
    class Odd(SumTasks):
        async def open(self, task: Task) -> Any:
            return None

    trajectory = await run(make_runner(environment=Odd()))
    assert trajectory.error == "the workspace could not be opened: open gave None; expected a Workspace"


@pytest.mark.parametrize("value", [ValueError("what?"), float("nan"), float("inf"), -float("inf")])
async def test_a_scorer_that_fails_is_a_failed_environment(value: float | Exception) -> None:
    trajectory = await run(make_runner(environment=BadScorer(value)))
    assert (trajectory.stop_reason, trajectory.outcome) == (StopReason.ENVIRONMENT_FAILED, 0.0)
    assert "the scorer failed" in str(trajectory.error)
    assert trajectory.answer == "1"


async def test_what_nobody_can_score_is_masked_with_the_reason() -> None:
    trajectory = await run(make_runner(environment=BadScorer(UnscoredError("the tests said nothing"))))
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_FAILED
    assert (trajectory.masked, trajectory.error) == ("environment_failed", "the tests said nothing")


async def test_a_scorer_that_hangs_is_a_failed_environment() -> None:
    stuck = threading.Event()
    trajectory = await run(replace(make_runner(environment=BadScorer(stuck)), score_s=0.1))
    stuck.set()
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_FAILED


async def test_a_score_out_of_range_is_clamped() -> None:
    assert (await run(make_runner(environment=BadScorer(7.0)))).outcome == 1.0


@pytest.mark.parametrize("end", ["answer", "crash", "cancel", "bad scorer", "lost session"])
async def test_every_workspace_is_closed_once_however_its_episode_ends(end: str) -> None:
    class Lost(FakeSessions):
        async def close(self, session_id: str) -> tuple[Turn, ...]:
            raise GatewayError("lost")

    async def crash(episode: EpisodeSpec) -> AgentResult:
        raise RuntimeError("no")

    environment = BadScorer(ValueError("what?")) if end == "bad scorer" else SumTasks()
    sessions = Lost() if end == "lost session" else FakeSessions()
    play = {"crash": crash, "cancel": hang}.get(end, answer_one)
    playing = asyncio.ensure_future(run(make_runner(play, environment=environment, sessions=sessions)))
    await asyncio.sleep(0.01)
    if end == "cancel":
        playing.cancel()
    await playing

    assert (environment.opened, environment.closed) == (1, 1)


async def test_a_workspace_that_cannot_be_opened_is_a_failed_environment_and_no_agent_runs() -> None:
    class Full(SumTasks):
        async def open(self, task: Task) -> Workspace:
            raise OSError("no space")

    async def never(episode: EpisodeSpec) -> AgentResult:
        raise AssertionError("it ran")

    environment, sessions = Full(), FakeSessions()
    trajectory = await run(make_runner(never, environment=environment, sessions=sessions))

    assert trajectory.stop_reason is StopReason.ENVIRONMENT_FAILED
    assert trajectory.error == "the workspace could not be opened: OSError: no space"
    assert (len(sessions.closed), environment.closed) == (1, 0)


async def test_an_environments_own_rewards_count_at_the_times_they_were_granted() -> None:
    class Steps(SumTasks):
        def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
            step = Reward(kind="process", value=0.25, at=trajectory.turns[0].finished_at)
            return Score(outcome=0.5, rewards=(step,))

    trajectory = await run(make_runner(environment=Steps()))

    assert [(reward.kind, reward.value) for reward in trajectory.rewards] == [("process", 0.25), ("outcome", 0.5)]
    assert trajectory.rewards[0].at == trajectory.turns[0].finished_at
    assert trajectory.total_reward == 0.75


async def test_the_agent_is_given_the_episodes_workspace() -> None:
    given: list[Workspace] = []

    async def look(episode: EpisodeSpec) -> AgentResult:
        given.append(episode.workspace)
        return AgentResult(answer="1")

    await run(make_runner(look))

    assert given == [Workspace(variables={"SUM": "task-0"})]


async def test_no_answer_after_a_completion_cut_off_by_length_is_a_truncation() -> None:
    async def give_up(episode: EpisodeSpec) -> AgentResult:
        return AgentResult()

    sessions = FakeSessions(turns=(make_turn(finish=FinishReason.LENGTH),))
    trajectory = await run(make_runner(give_up, sessions=sessions))
    assert (trajectory.stop_reason, trajectory.masked) == (StopReason.TRUNCATED, None)
    assert trajectory.error == "the last completion ended by length"
    assert (await run(make_runner(sessions=sessions))).stop_reason is StopReason.COMPLETED


async def test_a_crash_after_a_completion_cut_off_by_length_is_a_crash_and_trains_nothing() -> None:
    async def crash(episode: EpisodeSpec) -> AgentResult:
        return AgentResult(error="ended with status 3", stop_reason=StopReason.AGENT_FAILED)

    sessions = FakeSessions(turns=(make_turn(finish=FinishReason.LENGTH),))
    trajectory = await run(make_runner(crash, sessions=sessions))
    assert (trajectory.stop_reason, trajectory.masked) == (StopReason.AGENT_FAILED, "agent_failed")
    assert trajectory.error == "the last completion ended by length, then: ended with status 3"


async def test_every_episode_is_told_to_the_tally_as_it_ended() -> None:
    class Shut(FakeSessions):
        def open(self, spec: SessionSpec) -> Session:
            raise GatewayError("full")

    tally = EpisodeTally()
    for runner in (make_runner(tally=tally), make_runner(hang, tally=tally), make_runner(sessions=Shut(), tally=tally)):
        await run(runner)
    await make_runner(tally=tally).run(make_task(), session=SessionSpec(purpose="evaluation"))
    assert tally.counts().ended == {"completed": 1, "deadline": 1, "environment_failed": 1}
    assert tally.counts().masked == {"environment_failed": 1}


async def test_an_episode_without_a_turn_is_masked() -> None:
    assert (await run(make_runner(sessions=FakeSessions(turns=())))).masked == "no_turns"


async def test_what_is_masked_is_decided_by_the_policy() -> None:
    policy = StopPolicy(deadline="mask", agent_failed="train")
    assert (await run(make_runner(hang, policy=policy))).masked == "deadline"
