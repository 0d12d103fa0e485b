"""Groups: each dispatch is finished, failed or given back exactly once."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from forgejax.agents import AgentConfig, AgentResult, EpisodeRunner, EpisodeSpec, GroupRunner, StopPolicy, run_tasks
from forgejax.environments import RewardConfig, SpeedBaseline
from forgejax.errors import AgentError, ConfigError, StorageFullError
from forgejax.types import Dispatch, Group, SessionSpec, StopReason
from tests.agents.fakes import FakeScaffold, FakeSessions, FakeSink, SumTasks, make_task

AGENT = AgentConfig(command=("agent",), deadline_s=5.0, grace_s=0.1)


async def solve(episode: EpisodeSpec) -> AgentResult:
    await asyncio.sleep(0.001)
    return AgentResult(answer=str(int(episode.question.split()[0]) + 1))


async def hang(episode: EpisodeSpec) -> AgentResult:
    await asyncio.Event().wait()
    raise AssertionError


async def crash(episode: EpisodeSpec) -> AgentResult:
    return AgentResult(error="no openai module", stop_reason=StopReason.AGENT_FAILED)


def make_episodes(play: Any = solve, sessions: FakeSessions | None = None, **fields: Any) -> EpisodeRunner:
    return EpisodeRunner(
        sessions=sessions or FakeSessions(), scaffold=FakeScaffold(play), environment=SumTasks(), agent=AGENT, **fields
    )


def make_runner(sink: FakeSink, episodes: EpisodeRunner, **fields: Any) -> GroupRunner:
    given: dict[str, Any] = {"environment": SumTasks(), "group_size": 2, "baseline": SpeedBaseline()}
    return GroupRunner(sink=sink, episodes=episodes, **(given | fields))


async def test_every_dispatch_is_finished_with_all_members_of_its_task() -> None:
    sink = FakeSink(total=10)
    await make_runner(sink, make_episodes(), group_size=3).run()
    assert sorted(group.dispatch.index for group in sink.finished) == list(range(10))
    assert not sink.failed
    for group in sink.finished:
        assert group.task == make_task(group.dispatch.index)
        assert [trajectory.member for trajectory in group.trajectories] == [0, 1, 2]
        assert [trajectory.outcome for trajectory in group.trajectories] == [1.0, 1.0, 1.0]


async def test_groups_in_flight_run_at_once_and_a_slow_one_holds_up_nobody() -> None:
    release = asyncio.Event()

    async def first_is_slow(episode: EpisodeSpec) -> AgentResult:
        if episode.question.startswith("0 "):
            await release.wait()
        return await solve(episode)

    sink = FakeSink(total=6, in_flight=2)
    running = asyncio.create_task(make_runner(sink, make_episodes(first_is_slow)).run())
    await sink.reported(5)
    release.set()
    await running
    assert [group.dispatch.index for group in sink.finished] == [1, 2, 3, 4, 5, 0]


async def test_the_baseline_of_a_group_comes_from_earlier_groups_only() -> None:
    sink = FakeSink(total=3, in_flight=1)
    await make_runner(sink, make_episodes(reward=RewardConfig(speed_weight=1.0))).run()
    first, second, third = sink.finished
    assert first.baseline_s is None
    kinds = [{reward.kind for reward in trajectory.rewards} for trajectory in first.trajectories]
    assert kinds == [{"outcome"}, {"outcome"}]
    assert second.baseline_s == pytest.approx(sum(member.active_s for member in first.trajectories) / 2)
    rebuilt = SpeedBaseline()
    for group in (first, second):
        rebuilt.observe(group)
    assert third.baseline_s == rebuilt.read("sums")


async def test_every_episode_has_a_seed_of_its_own_that_a_rerun_repeats() -> None:
    seeds = []
    for _ in range(2):
        sessions = FakeSessions()
        sink = FakeSink(total=4, in_flight=1)
        await make_runner(sink, make_episodes(sessions=sessions), session=SessionSpec(seed=1)).run()
        seeds.append([spec.seed for spec in sessions.opened])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 8


async def test_a_seed_is_of_the_run_the_purpose_the_group_and_the_member_and_of_no_attempt() -> None:
    class Again(FakeSink):
        """Dispatches the same indices for the third time."""

        async def next_dispatch(self) -> Dispatch | None:
            first = await super().next_dispatch()
            return None if first is None else replace(first, attempt=2)

    async def seeds_of(sink: FakeSink, spec: SessionSpec) -> list[int | None]:
        sessions = FakeSessions()
        await make_runner(sink, make_episodes(sessions=sessions), session=spec).run()
        return [each.seed for each in sessions.opened]

    first = await seeds_of(FakeSink(total=2, in_flight=1), SessionSpec(seed=1))
    assert await seeds_of(Again(total=2, in_flight=1), SessionSpec(seed=1)) == first
    sessions, spec = FakeSessions(), SessionSpec(purpose="evaluation", seed=1)
    await run_tasks(make_episodes(sessions=sessions), [make_task(0), make_task(1)], samples=2, session=spec)
    evaluated = [each.seed for each in sessions.opened]
    other = await seeds_of(FakeSink(total=2, in_flight=1), SessionSpec(seed=2))
    assert len({*first, *evaluated, *other}) == 12


async def test_what_is_in_flight_at_the_end_is_cancelled_and_given_back_with_its_tokens() -> None:
    sink = FakeSink(total=3)
    sessions = FakeSessions()
    running = asyncio.create_task(make_runner(sink, make_episodes(hang, sessions)).run())
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [(dispatch.index, tokens) for dispatch, tokens in sink.given_back] == [(0, 6), (1, 6), (2, 6)]
    assert len(sessions.closed) == 6 and not sink.failed


async def test_a_dispatch_cancelled_before_it_began_is_reported_too() -> None:
    sink = FakeSink(total=3)
    running = asyncio.create_task(make_runner(sink, make_episodes(hang)).run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # dispatched, and its group not yet begun
    assert sink.dispatched
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sink.given_back == [(dispatch, 0) for dispatch in sink.dispatched]


class Ends(FakeSink):
    """Ends the run once everything is dispatched, whatever has become of it."""

    async def next_dispatch(self) -> Any:
        return await super().next_dispatch() if len(self.dispatched) < self.total else None


async def test_the_end_of_the_run_ends_what_is_in_flight() -> None:
    sink = Ends(total=2)
    await make_runner(sink, make_episodes(hang)).run()
    assert [tokens for _, tokens in sink.given_back] == [6, 6]


async def test_a_runner_that_is_cancelled_while_it_ends_gives_every_group_back_before_it_returns() -> None:
    async def tidies_up(episode: EpisodeSpec) -> AgentResult:
        try:
            return await hang(episode)
        finally:
            await asyncio.sleep(0.2)

    sink = Ends(total=6, in_flight=6)
    running = asyncio.create_task(make_runner(sink, make_episodes(tidies_up)).run())
    for _ in range(3):
        await asyncio.sleep(0.05)
        running.cancel()  # the first in the midst of the clean-up, as when a stop closes the pool and then the service
    await asyncio.wait({running})
    given_back = sorted((dispatch.index, tokens) for dispatch, tokens in sink.given_back)  # they end in any order
    assert given_back == [(index, 6) for index in range(6)]


async def test_a_policy_may_drop_the_whole_group() -> None:
    async def second_fails(episode: EpisodeSpec) -> AgentResult:
        return await (crash(episode) if episode.id == "s2" else solve(episode))

    sink = FakeSink(total=1)
    await make_runner(sink, make_episodes(second_fails, policy=StopPolicy(agent_failed="drop_group"))).run()
    assert [(reason, tokens) for _, reason, tokens in sink.failed] == [("agent_failed", 6)]


async def test_an_agent_that_always_fails_before_its_first_call_stops_the_run() -> None:
    sink = FakeSink(total=1000, in_flight=1)
    with pytest.raises(AgentError, match=r"4 episodes in a row.*\n?.*no openai module"):
        await make_runner(sink, make_episodes(crash, FakeSessions(turns=())), failures_in_a_row=4).run()
    assert len(sink.finished) == 1
    assert len(sink.dispatched) == len(sink.finished) + len(sink.given_back) <= 3


async def test_an_agent_that_answers_without_the_model_stops_the_run() -> None:
    with pytest.raises(AgentError, match="without asking the model"):
        await make_runner(FakeSink(total=1000), make_episodes(solve, FakeSessions(turns=()))).run()


async def test_the_death_of_a_worker_is_no_streak_of_failures_and_its_tokens_are_counted() -> None:
    async def unlucky(episode: EpisodeSpec) -> AgentResult:
        return AgentResult(error="the worker died", stop_reason=StopReason.ENVIRONMENT_FAILED, accident=True)

    silent = FakeSink(total=3)
    await make_runner(silent, make_episodes(unlucky, FakeSessions(turns=())), failures_in_a_row=2).run()
    assert [{each.masked for each in group.trajectories} for group in silent.finished] == [{"worker_died"}] * 3

    sink = FakeSink(total=1)
    await make_runner(sink, make_episodes(unlucky)).run()
    assert sink.apart == [{"worker_died": 18}], "three plays of two episodes were given up"
    assert sink.finished[0].sampled_tokens == 6


async def test_failures_after_a_model_call_are_data() -> None:
    sink = FakeSink(total=20)
    await make_runner(sink, make_episodes(crash), failures_in_a_row=2).run()
    assert len(sink.finished) == 20


async def test_a_broken_scaffold_stops_the_run() -> None:
    episodes = make_episodes()
    assert isinstance(episodes.scaffold, FakeScaffold)
    episodes.scaffold.problem = AgentError("worker died 4 times")
    sink = FakeSink(total=1)
    with pytest.raises(AgentError, match="worker died"):
        await make_runner(sink, episodes).run()
    assert sink.given_back == [(sink.dispatched[0], 6)] and not sink.failed, "a mended agent plays it"


async def test_a_full_disk_ends_the_run_with_its_error_and_leaves_nothing_running() -> None:
    class Full(FakeSink):
        async def finish(self, group: Group, apart: Mapping[str, int]) -> None:
            raise StorageFullError("the disk is full")

    async def rest_hangs(episode: EpisodeSpec) -> AgentResult:
        return await (solve(episode) if episode.question.startswith("0 ") else hang(episode))

    sink = Full(total=3)
    before = asyncio.all_tasks()
    with pytest.raises(StorageFullError):
        await make_runner(sink, make_episodes(rest_hangs)).run()
    assert sorted(dispatch.index for dispatch, _ in sink.given_back) == [1, 2]
    assert asyncio.all_tasks() == before


def test_a_group_of_one_has_nobody_to_compare_with() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        make_runner(FakeSink(total=1), make_episodes(), group_size=1)


async def test_evaluation_keeps_the_order_and_the_bound() -> None:
    running = most = 0

    async def counted(episode: EpisodeSpec) -> AgentResult:
        nonlocal running, most
        running += 1
        most = max(most, running)
        result = await solve(episode)
        running -= 1
        return result

    sessions = FakeSessions()
    tasks = [make_task(index) for index in range(6)]
    spec = SessionSpec(purpose="evaluation", seed=3)
    trajectories = await run_tasks(make_episodes(counted, sessions), tasks, samples=2, session=spec, concurrency=4)
    order = [(trajectory.task_id, trajectory.member) for trajectory in trajectories]
    assert order == [(task.id, member) for task in tasks for member in range(2)]
    assert most == 4
    assert {spec.purpose for spec in sessions.opened} == {"evaluation"}
    assert len({spec.seed for spec in sessions.opened}) == 12


async def test_an_evaluation_that_is_stopped_ends_at_once_with_what_was_played() -> None:
    async def third_hangs(episode: EpisodeSpec) -> AgentResult:
        return await (solve(episode) if int(episode.question.split()[0]) < 2 else hang(episode))

    stop, before = asyncio.Event(), asyncio.all_tasks()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    tasks = [make_task(index) for index in range(50)]
    played = await run_tasks(make_episodes(third_hangs), tasks, session=SessionSpec(), concurrency=3, stop=stop)
    assert [each.task_id for each in played] == [f"task-{index}" for index in range(5)]
    assert [each.stop_reason.value for each in played] == ["completed"] * 2 + ["cancelled"] * 3
    assert sum(each.sampled_tokens for each in played) == 15
    assert asyncio.all_tasks() == before


async def test_an_evaluation_plays_what_a_dying_worker_took_along_again_and_tells_its_tokens() -> None:
    died: set[str] = set()

    async def dies_once(episode: EpisodeSpec) -> AgentResult:
        if episode.question in died:
            return await solve(episode)
        died.add(episode.question)
        return AgentResult(error="the worker died", stop_reason=StopReason.ENVIRONMENT_FAILED, accident=True)

    cut_off: list[int] = []
    tasks = [make_task(index) for index in range(20)]
    played = await run_tasks(make_episodes(dies_once), tasks, session=SessionSpec(), on_cut_off=cut_off.append)
    assert [(each.outcome, each.masked) for each in played] == [(1.0, None)] * 20
    assert cut_off == [3] * 20


async def test_an_evaluation_whose_agent_cannot_run_stops() -> None:
    episodes = make_episodes(crash, FakeSessions(turns=()))
    with pytest.raises(AgentError, match="16 episodes in a row"):
        await run_tasks(episodes, [make_task(i) for i in range(100)], session=SessionSpec(), concurrency=2)
