"""One episode: a gateway session, an agent, a score. Every started episode ends in exactly one Trajectory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from forgejax.agents.scaffolds.base import AgentConfig, AgentResult, EpisodeSpec, Scaffold
from forgejax.agents.tally import EpisodeTally
from forgejax.environments.base import Environment, Score, Workspace
from forgejax.environments.rewards import RewardConfig, compute_rewards
from forgejax.errors import ForgejaxError, UnscoredError
from forgejax.types import (
    FinishReason,
    Purpose,
    Session,
    Sessions,
    SessionSpec,
    StopReason,
    Task,
    Trajectory,
)

Treatment = Literal["train", "mask", "drop_group"]
WORKER_DIED = "worker_died"
PLAYS = 4
_CANCEL_S = 5.0
_OPEN_S = 60.0
_CLOSE_S = 15.0
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StopPolicy:
    """What is done with an episode that did not simply complete.

    ``train``: it is trained like any other; ``mask``: none of its turns is trained and it enters no baseline;
    ``drop_group``: its whole group comes to nothing. What is the policy's own doing is trained by default.
    """

    truncated: Treatment = "train"
    deadline: Treatment = "train"
    agent_failed: Treatment = "mask"
    environment_failed: Treatment = "mask"

    def of(self, reason: StopReason) -> Treatment:
        if reason is StopReason.COMPLETED:
            return "train"
        if reason is StopReason.CANCELLED:
            return "mask"
        policy: Treatment = getattr(self, reason.value)
        return policy


@dataclass(frozen=True, kw_only=True)
class EpisodeRunner:
    """Plays episodes: all that they have in common."""

    sessions: Sessions
    scaffold: Scaffold
    environment: Environment
    agent: AgentConfig
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: StopPolicy = field(default_factory=StopPolicy)
    tally: EpisodeTally = field(default_factory=EpisodeTally)
    score_s: float = 30.0

    @property
    def longest_s(self) -> float:
        """The most seconds that ``run`` takes: the agent's, and the deadlines of all that opens, scores and closes.

        It counts one play in full: plays that an accident cut off are over by the time that the agent's has in it.
        """
        steps = (_OPEN_S, 0.0, _CLOSE_S, self.score_s, _CLOSE_S)  # workspace, agent, session, score, workspace
        return self.agent.longest_s + sum(steps) + len(steps) * _CANCEL_S

    @property
    def play_s(self) -> float:
        """The most seconds from the opening of a session until its agent has ended."""
        return _OPEN_S + self.agent.deadline_s + self.agent.grace_s + 2 * _CANCEL_S

    async def run(
        self,
        task: Task,
        *,
        member: int = 0,
        session: SessionSpec,
        baseline_s: float | None = None,
        on_cut_off: Callable[[int], None] = lambda tokens: None,
    ) -> Trajectory:
        """Plays one episode and never raises: what goes wrong is told by ``stop_reason`` and ``error``.

        Where an accident cuts it off (``AgentResult.accident``), it is played again: from the start, in a session of
        its own and with its whole deadline, PLAYS times in all, and never begun later than one deadline after its first
        beginning. ``on_cut_off`` is told the tokens of each play that is given up so. Cut off once more, it is masked
        as WORKER_DIED.

        It takes at most ``longest_s``. Cancelling it ends the agent and gives the
        Trajectory so far, with StopReason.CANCELLED; an episode whose agent has already ended is concluded as usual.
        """
        until = time.monotonic() + self.agent.deadline_s
        with self.tally.watch_episode():
            for play in range(1, PLAYS + 1):
                trajectory, accident = await self._play_once(task, member, session)
                if not accident or play == PLAYS or time.monotonic() > until or _is_cancelled():
                    break
                on_cut_off(trajectory.sampled_tokens)
        return self._end(trajectory, session.purpose, baseline_s, accident=accident)

    async def _play_once(self, task: Task, member: int, session: SessionSpec) -> tuple[Trajectory, bool]:
        """What became of one play, but for its rewards; and whether an accident cut it off."""
        started_at = time.monotonic()
        try:
            opened = self.sessions.open(replace(session, task_id=task.id, deadline_s=self.play_s))
        except ForgejaxError as error:
            return _make_unopened(task, member, started_at, error), False
        workspace, result = await self._play(task, opened)
        trajectory = Trajectory(
            task_id=task.id,
            session_id=opened.id,
            member=member,
            turns=(),
            rewards=(),
            outcome=0.0,
            started_at=started_at if result.began_at is None else result.began_at,
            finished_at=time.monotonic(),
            stop_reason=result.stop_reason,
            answer=result.answer,
            error=result.error,
        )
        return await carry_through(self._conclude(task, workspace, trajectory)), result.accident

    async def _conclude(self, task: Task, workspace: Workspace | None, trajectory: Trajectory) -> Trajectory:
        """Closes the session, scores the episode and closes the workspace."""
        turns, lost = await _settle(self.sessions.close(trajectory.session_id), _CLOSE_S)
        if turns is None:
            error = f"closing the session failed, its turns are lost: {_describe(lost)}"
            trajectory = _fail_environment(trajectory, error, answer=None)
        else:
            trajectory = _explain_truncation(replace(trajectory, turns=turns))
        if workspace is None:
            return trajectory
        try:
            if trajectory.stop_reason is StopReason.COMPLETED:
                trajectory = await self._score(task, workspace, trajectory)
        finally:
            _, problem = await _settle(self.environment.close(workspace), _CLOSE_S)
            if problem is not None:
                _log.warning("task %s: its workspace could not be closed: %s", task.id, _describe(problem))
        return trajectory

    async def _score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Trajectory:
        score, problem = await _settle(
            _call_in_thread(lambda: self.environment.score(task, workspace, trajectory)), self.score_s
        )
        if problem is not None or not isinstance(score, Score):
            error = f"the scorer failed: it gave {score!r}; expected a Score"
            if isinstance(problem, UnscoredError):
                error = str(problem)
            elif problem is not None:
                error = f"the scorer failed: {_describe(problem)}"
            return _fail_environment(trajectory, error, answer=trajectory.answer)
        return replace(trajectory, outcome=min(1.0, max(0.0, score.outcome)), rewards=score.rewards)

    def _end(self, trajectory: Trajectory, purpose: Purpose, baseline_s: float | None, *, accident: bool) -> Trajectory:
        masked = None
        if accident:
            masked = WORKER_DIED
        elif self.policy.of(trajectory.stop_reason) != "train":
            masked = trajectory.stop_reason.value
        elif not trajectory.turns:
            masked = "no_turns"  # the policy had no part in it
        ended = replace(trajectory, rewards=compute_rewards(self.reward, trajectory, baseline_s), masked=masked)
        self.tally.observe(ended, purpose)
        return ended

    async def _play(self, task: Task, session: Session) -> tuple[Workspace | None, AgentResult]:
        """Opens the workspace and runs the agent in it.

        The scaffold keeps the deadline; one that does not is cut off after the grace.
        """
        workspace: Workspace | None = None
        deadline_s = self.agent.deadline_s
        try:
            opening = asyncio.ensure_future(self.environment.open(task))
            opening.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # a late failure counts as seen
            workspace, problem = await _settle(opening, _OPEN_S)
            if problem is not None or not isinstance(workspace, Workspace):
                how = f"open gave {workspace!r}; expected a Workspace" if problem is None else _describe(problem)
                error = f"the workspace could not be opened: {how}"
                return None, AgentResult(error=error, stop_reason=StopReason.ENVIRONMENT_FAILED)
            episode = EpisodeSpec(
                id=session.id,
                question=task.question,
                base_url=session.base_url,
                api_key=session.api_key,
                model=session.model,
                context_length=session.context_length,
                deadline_s=deadline_s,
                workspace=workspace,
            )
            result, problem = await _settle(self.scaffold.run(episode), deadline_s + self.agent.grace_s)
        except asyncio.CancelledError:
            if workspace is None and opening.done() and not opening.cancelled() and opening.exception() is None:
                workspace = opening.result()  # it was there before anybody had heard of it
            return workspace, AgentResult(error="the episode was cancelled", stop_reason=StopReason.CANCELLED)
        if isinstance(problem, TimeoutError):
            error = f"the scaffold gave no result {self.agent.grace_s:g} s after the deadline of {deadline_s:g} s"
            return workspace, AgentResult(error=error, stop_reason=StopReason.DEADLINE)
        if result is None:
            error = f"the scaffold failed: {_describe(problem)}"
            return workspace, AgentResult(error=error, stop_reason=StopReason.AGENT_FAILED)
        return workspace, result


def _make_unopened(task: Task, member: int, started_at: float, error: ForgejaxError) -> Trajectory:
    return Trajectory(
        task_id=task.id,
        session_id=f"unopened-{task.id}-{member}",
        member=member,
        turns=(),
        rewards=(),
        outcome=0.0,
        started_at=started_at,
        finished_at=time.monotonic(),
        stop_reason=StopReason.ENVIRONMENT_FAILED,
        error=f"the session could not be opened: {error}",
    )


def _explain_truncation(trajectory: Trajectory) -> Trajectory:
    """An agent that ends in good order, without an answer, after a completion that was cut off was truncated.

    One that crashes has crashed: it may do so after every completion, and a policy must not be trained on that. What
    came before is told with its error.
    """
    if trajectory.answer is not None or not trajectory.turns:
        return trajectory
    finish_reason = trajectory.turns[-1].completion.finish_reason
    if finish_reason not in (FinishReason.LENGTH, FinishReason.REPETITION):
        return trajectory
    before = f"the last completion ended by {finish_reason.value}"
    if trajectory.stop_reason is StopReason.COMPLETED:
        return replace(trajectory, error=trajectory.error or before, stop_reason=StopReason.TRUNCATED)
    if trajectory.stop_reason is StopReason.AGENT_FAILED:
        return replace(trajectory, error=f"{before}, then: {trajectory.error}")
    return trajectory


def _fail_environment(trajectory: Trajectory, error: str, *, answer: str | None) -> Trajectory:
    return replace(trajectory, error=error, answer=answer, stop_reason=StopReason.ENVIRONMENT_FAILED)


def _describe(problem: BaseException | None) -> str:
    return f"{type(problem).__name__}: {problem}"


async def _settle(work: Awaitable[_T], deadline_s: float) -> tuple[_T | None, BaseException | None]:
    """The result of ``work`` or what it raised; TimeoutError past the deadline. Being cancelled cancels ``work``.

    ``work`` that ignores its cancellation is left behind after _CANCEL_S, so that nothing waits on it for ever.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a late failure counts as seen
    try:
        await asyncio.wait({task}, timeout=deadline_s)
    finally:
        if task.cancel():
            await asyncio.wait({task}, timeout=_CANCEL_S)
            if not task.done():
                _log.warning("%r ignores its cancellation and is left behind", task)
            late: BaseException | None = TimeoutError(f"nothing within {deadline_s:g} s")
        else:
            late = None
    if late is not None:
        return None, late
    if task.cancelled():
        return None, asyncio.CancelledError("it cancelled itself")
    problem = task.exception()
    return (None, problem) if problem is not None else (task.result(), None)


async def carry_through(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which has deadlines of its own, carried through whatever cancels the caller."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()


def _is_cancelled() -> bool:
    """Whether the running task has been asked to end, also while something was carried through."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _call_in_thread(function: Callable[[], _T]) -> _T:
    """Runs a function that may be slow in a daemon thread, so that one that hangs cannot hold up the end of the run."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def work() -> None:
        try:
            set_outcome = partial(future.set_result, function())
        except StopIteration as error:  # no future takes it
            set_outcome = partial(future.set_exception, RuntimeError(f"StopIteration: {error}"))
        except Exception as error:  # noqa: BLE001 (a boundary: the scorer's exception is handed to the event loop)
            set_outcome = partial(future.set_exception, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, set_outcome)

    threading.Thread(target=work, name="scorer", daemon=True).start()
    return await future
