"""Groups of episodes: as many in flight as the pool allows, each ending in one finish, one fail or one give_back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from forgejax.agents.episode import WORKER_DIED, EpisodeRunner, carry_through
from forgejax.environments.base import Environment
from forgejax.environments.rewards import SpeedBaseline
from forgejax.errors import AgentError, ConfigError
from forgejax.types import (
    Dispatch,
    Group,
    GroupSink,
    SessionSpec,
    StopReason,
    Task,
    Trajectory,
)

FAILURES_IN_A_ROW = 16


NO_CALL = (StopReason.COMPLETED, StopReason.AGENT_FAILED, StopReason.ENVIRONMENT_FAILED)


class FailureStreak:
    """Stops a run whose episodes end, again and again, without one call to the model: it will not get better.

    Those that a dying worker took along say nothing of the agent: its scaffold counts them as the one death they are.
    """

    def __init__(self, limit: int = FAILURES_IN_A_ROW) -> None:
        self._limit = limit
        self._count = 0

    def observe(self, trajectory: Trajectory) -> None:
        """Raises AgentError at the limit."""
        if trajectory.masked == WORKER_DIED:
            return
        no_call = not trajectory.turns and trajectory.stop_reason in NO_CALL
        self._count = min(self._count + 1, self._limit) if no_call else 0  # others may end while one is reported
        if self._count >= self._limit:
            how = trajectory.error or f"it answered {trajectory.answer!r} without asking the model"
            raise AgentError(
                f"{self._count} episodes in a row ended without a call to the model; expected the agent to call "
                f"OPENAI_BASE_URL. The last one: {how}\nRun the agent command by hand; correct it or its configuration"
            )


class GroupRunner:
    """Runs the groups that ``sink`` dispatches, ``group_size`` episodes of one task each, all at once.

    The same index always is the same task, so a group lost in a crash is run again as it was. ``session`` is what each
    episode's session is opened with; if it has a seed, every episode gets one of its own, derived from it, the index
    and the member alone: another attempt at a group draws what the first one drew, as long as the weights are the same.
    """

    def __init__(
        self,
        *,
        sink: GroupSink,
        environment: Environment,
        episodes: EpisodeRunner,
        group_size: int,
        baseline: SpeedBaseline,
        session: SessionSpec | None = None,
        failures_in_a_row: int = FAILURES_IN_A_ROW,
    ) -> None:
        if group_size < 2:
            raise ConfigError(f"group_size is {group_size}; expected at least 2 episodes to compare with each other")
        self._sink = sink
        self._environment = environment
        self._episodes = episodes
        self._group_size = group_size
        self._baseline = baseline
        self._session = session or SessionSpec()
        self._streak = FailureStreak(failures_in_a_row)

    async def run(self) -> None:
        """Runs until the sink has no further dispatch, or until it is cancelled; then ends the groups in flight.

        Each dispatch is finished, failed or given back exactly once before this returns, however often it is cancelled:
        those in flight at the end are given back. Raises what the sink and the tasks raise, and AgentError once the
        agent cannot run at all.
        """
        groups: dict[asyncio.Task[None], Dispatch] = {}
        waiting = asyncio.create_task(self._sink.next_dispatch())
        try:
            while True:
                done, _ = await asyncio.wait({waiting, *groups}, return_when=asyncio.FIRST_COMPLETED)
                for group in done - {waiting}:
                    del groups[group]  # type: ignore[arg-type]
                    group.result()
                if waiting in done:
                    dispatch = waiting.result()
                    if dispatch is None:
                        return
                    groups[asyncio.create_task(self._run_group(dispatch))] = dispatch
                    waiting = asyncio.create_task(self._sink.next_dispatch())
        finally:
            await carry_through(self._end(waiting, groups))  # a stop that comes in the middle of it must wait

    async def _end(self, waiting: asyncio.Task[Dispatch | None], groups: dict[asyncio.Task[None], Dispatch]) -> None:
        """Cancels what is in flight and sees each dispatch reported, the ones that had not yet begun too."""
        waiting.cancel()
        for group in groups:
            group.cancel()
        await asyncio.wait({waiting, *groups})
        unbegun = [dispatch for group, dispatch in groups.items() if group.cancelled()]
        if not waiting.cancelled() and waiting.exception() is None:
            last = waiting.result()
            if last is not None and last not in groups.values():
                unbegun.append(last)
        failures = [group.exception() for group in groups if not group.cancelled()]
        for dispatch in unbegun:
            await self._sink.give_back(dispatch, 0, {})
        for failure in filter(None, failures):  # a full disk fails all of them alike; the first one speaks
            raise failure

    async def _run_group(self, dispatch: Dispatch) -> None:
        task = self._environment.task(dispatch.index)
        baseline_s = self._baseline.read(task.family)
        session, cut_off = replace(self._session, owner=dispatch.owner), list[int]()
        members = [
            asyncio.create_task(
                self._episodes.run(
                    task,
                    member=member,
                    session=_seeded(session, dispatch.index, member),
                    baseline_s=baseline_s,
                    on_cut_off=cut_off.append,
                )
            )
            for member in range(self._group_size)
        ]
        try:
            await asyncio.wait(members)
        except asyncio.CancelledError:
            ended = await _cancel(members)
            await self._sink.give_back(dispatch, _sampled(ended), _count_cut_off(cut_off))
            return
        trajectories = tuple(member.result() for member in members)
        await self._report(dispatch, task, trajectories, baseline_s, _count_cut_off(cut_off))

    async def _report(
        self,
        dispatch: Dispatch,
        task: Task,
        trajectories: tuple[Trajectory, ...],
        baseline_s: float | None,
        cut_off: Mapping[str, int],
    ) -> None:
        try:
            self._episodes.scaffold.check()
            for trajectory in trajectories:
                self._streak.observe(trajectory)
        except AgentError:
            await self._sink.give_back(
                dispatch, _sampled(trajectories), cut_off
            )  # it can be played with a mended agent
            raise
        dropped = [
            trajectory.stop_reason.value
            for trajectory in trajectories
            if self._episodes.policy.of(trajectory.stop_reason) == "drop_group"
        ]
        if dropped:
            await self._sink.fail(dispatch, dropped[0], _sampled(trajectories), cut_off)
            return
        group = Group(dispatch=dispatch, task=task, trajectories=trajectories, baseline_s=baseline_s)
        await self._sink.finish(group, cut_off)
        self._baseline.observe(group)


async def run_tasks(
    episodes: EpisodeRunner,
    tasks: Sequence[Task],
    *,
    samples: int = 1,
    session: SessionSpec,
    concurrency: int = 16,
    stop: asyncio.Event | None = None,
    on_cut_off: Callable[[int], None] = lambda tokens: None,
) -> list[Trajectory]:
    """Plays ``samples`` episodes of each task, at most ``concurrency`` at once; task by task, in order.

    Once ``stop`` is set the open episodes are cancelled, and what there is of them is in the result; those that had not
    begun are not. ``on_cut_off`` is told the tokens of plays that were given up.

    Raises AgentError once the agent cannot run at all. Cancelling it ends every episode.
    """
    slots = asyncio.Semaphore(concurrency)
    streak = FailureStreak()

    async def play(number: int, member: int) -> Trajectory:
        async with slots:
            seeded = _seeded(session, number, member)
            trajectory = await episodes.run(tasks[number], member=member, session=seeded, on_cut_off=on_cut_off)
        episodes.scaffold.check()
        streak.observe(trajectory)
        return trajectory

    running = [asyncio.create_task(play(number, member)) for number in range(len(tasks)) for member in range(samples)]
    if not running:
        return []
    played = asyncio.create_task(_await_all(running))
    stopped = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({played, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if played.done():
            played.result()
            return [task.result() for task in running]
    finally:
        for waiting in (played, stopped):
            waiting.cancel()
        ended = await carry_through(_cancel(running))
    return ended


async def _await_all(running: Sequence[asyncio.Task[Trajectory]]) -> None:
    """Until the last has ended or the first has failed; raises what it failed of."""
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


async def _cancel(running: Sequence[asyncio.Task[Trajectory]]) -> list[Trajectory]:
    """Cancels the episodes and gives the trajectories of those that had begun."""
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    return [task.result() for task in running if not task.cancelled() and task.exception() is None]


def _count_cut_off(plays: Sequence[int]) -> dict[str, int]:
    """The tokens of plays that a dying worker took along, as the sink counts them."""
    return {WORKER_DIED: sum(plays)} if plays else {}


def _sampled(trajectories: Sequence[Trajectory]) -> int:
    return sum(trajectory.sampled_tokens for trajectory in trajectories)


def _seeded(session: SessionSpec, index: int, member: int) -> SessionSpec:
    """The session's spec with a seed of its own: of the run's, what is played, and nothing of when or how often."""
    if session.seed is None:
        return session
    key = (session.seed, session.purpose, index, member)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return replace(session, seed=int.from_bytes(digest) >> 1)
