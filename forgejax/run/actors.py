"""Everything that makes trajectories while the learner learns: the engines, the gateway and the agents.

The engines have threads of their own; gateway and agents share one event loop in another. The training thread
calls the methods here; each of them has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from forgejax.agents import EpisodeRunner, EpisodeTally, GroupRunner, Scaffold
from forgejax.environments import Environment, SpeedBaseline
from forgejax.errors import EngineError, ForgejaxError, TrainingError
from forgejax.gateway import Gateway
from forgejax.pool.pool import Pool, see_through
from forgejax.rollout import Engines, make_warm_ups
from forgejax.run.config import TrainConfig
from forgejax.run.evaluate import Evaluation, evaluate
from forgejax.types import Completion, Dispatch, Group, SampleRequest, SessionSpec, Task

_START_S = 120.0
_STOP_S = 60.0
_PROBE_S = 120.0
_SLACK_S = 30.0
_LOOK_S = 0.5
_T = TypeVar("_T")
SWITCH_S = 0.0005  # of Python's own 5 ms, the event loop would wait as much for each thread that is busy


def freeze_objects() -> None:
    """Takes all objects there are out of the sight of Python's cycle collector, until ``gc.unfreeze``.

    To look through those of jax and its programs takes more than 100 ms, and meanwhile no thread runs.
    """
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the service runs. It starts and stops the engines, the gateway and the scaffold."""

    config: TrainConfig
    engines: Engines
    gateway: Gateway
    scaffold: Scaffold
    environment: Environment
    pool: Pool
    baseline: SpeedBaseline
    tally: EpisodeTally = field(default_factory=EpisodeTally)


@dataclass(frozen=True, kw_only=True)
class LoggedFirst:
    """The pool as a ``GroupSink`` that hears of a group once the engines' records of its requests are on the disk.

    Ids are compared with those records when the group is trained, and its tokens are counted by them, which may be
    after a crash. Groups are encoded and written in other threads than the event loop's.
    """

    pool: Pool
    engines: Engines

    async def next_dispatch(self) -> Dispatch | None:
        return await self.pool.next_dispatch()

    async def finish(self, group: Group, apart: Mapping[str, int]) -> None:
        await self._report(partial(self.pool.finish, group, apart))

    async def fail(self, dispatch: Dispatch, reason: str, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        await self._report(partial(self.pool.fail, dispatch, reason, sampled_tokens, apart))

    async def give_back(self, dispatch: Dispatch, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        await self._report(partial(self.pool.give_back, dispatch, sampled_tokens, apart))

    async def _report(self, tell: Callable[[], None]) -> None:
        def flush_and_tell() -> None:
            self.engines.flush()
            tell()

        await see_through(asyncio.to_thread(flush_and_tell))


class RolloutService:
    """Use as a context manager: inside, the gateway listens and agents can be run."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        config = parts.config
        self._episodes = EpisodeRunner(
            sessions=parts.gateway,
            scaffold=parts.scaffold,
            environment=parts.environment,
            agent=config.agent,
            reward=config.reward,
            policy=config.stop_policy,
            tally=parts.tally,
            score_s=config.tasks.score_s,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agents", daemon=True)
        self._groups: Future[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._interrupted = asyncio.Event()  # of the loop

    def __enter__(self) -> RolloutService:
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._thread.start()
        try:
            self._parts.engines.__enter__()
            self._call(self._start(), _START_S, "the gateway and the agents did not start")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stops everything; what cannot be stopped in time is left to die with the process."""
        with contextlib.suppress(ForgejaxError):
            self.stop_groups()
        with contextlib.suppress(ForgejaxError):
            self._call(self._end(), _STOP_S, "the gateway and the agents did not stop")
        with contextlib.suppress(EngineError):
            self._parts.engines.__exit__(None, None, None)
        gc.unfreeze()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
        if not self._thread.is_alive():
            self._loop.close()
        sys.setswitchinterval(self._switch_s)

    @property
    def url(self) -> str:
        return self._parts.gateway.url

    @property
    def tally(self) -> EpisodeTally:
        """How the episodes end, and which are being played. Any thread may ask."""
        return self._parts.tally

    def start_groups(self) -> None:
        """Begins to run the groups that the pool dispatches. A failure closes the pool and is raised by ``check``.

        All programs are compiled by then: what is there stays, and is not looked through any more.
        """
        freeze_objects()
        runner = GroupRunner(
            sink=LoggedFirst(pool=self._parts.pool, engines=self._parts.engines),
            environment=self._parts.environment,
            episodes=self._episodes,
            group_size=self._parts.config.run.group_size,
            baseline=self._parts.baseline,
            session=SessionSpec(law=self._parts.config.sampling, seed=self._parts.config.run.seed),
        )
        self._groups = asyncio.run_coroutine_threadsafe(self._run_groups(runner), self._loop)
        # Nothing will come any more: wakes a trainer that waits for groups, who by then can be told why.
        self._groups.add_done_callback(lambda _: self._parts.pool.close())

    def stop_groups(self) -> None:
        """Cancels the groups in flight; each is reported to the pool. Raises what a report raises. Idempotent."""
        if self._groups is None:
            return
        groups, self._groups = self._groups, None
        groups.cancel()
        self._call(self._await_groups(), _STOP_S, "the episodes in flight did not end")

    def check(self) -> None:
        """Raises what ended the groups or the engines, if something did."""
        if self._groups is not None and self._groups.done():
            with contextlib.suppress(CancelledError):
                error = self._groups.exception()
                if error is not None:
                    raise error
        if not self._parts.engines.healthy:
            raise TrainingError(self._parts.engines.trouble)

    def interrupt(self) -> None:
        """Breaks off the evaluation that is under way, and any later one. Any thread may call it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: there is none
            self._loop.call_soon_threadsafe(self._interrupted.set)

    def evaluate(self, tasks: Sequence[Task], owner: str) -> Evaluation:
        """Plays held-out tasks on the weights published last, for this owner. The caller publishes nothing meanwhile.

        After ``interrupt`` it gives what was played so far.
        """
        run = self._parts.config.run
        work = evaluate(
            self._episodes,
            tasks,
            law=self._parts.config.sampling,
            samples=run.eval_samples,
            concurrency=run.eval_concurrency,
            seed=run.seed,
            owner=owner,
            stop=self._interrupted,
        )
        waves = max(1, -(-len(tasks) * run.eval_samples // run.eval_concurrency))
        deadline_s = waves * self._episodes.longest_s + _SLACK_S
        return self._call(work, deadline_s, "the evaluation did not end")

    def warm_up(self, owner: str) -> list[Completion]:
        """Has the engines compile their programs by use: every prefill length, every number of busy slots.

        The first episodes would else wait for it, and their times would say nothing of the policy.
        """
        batches = make_warm_ups(self._parts.config.engine, owner)
        return [completion for batch in batches for completion in self.probe(batch)]

    def probe(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Draws completions for prompts given as ids, past the gateway."""

        async def draw() -> list[Completion]:
            return await asyncio.gather(*(self._parts.engines.sample(request) for request in requests))

        return self._call(draw(), _PROBE_S, "the engine did not answer a probe")

    async def _start(self) -> None:
        await self._parts.gateway.start()
        await self._parts.scaffold.start()

    async def _end(self) -> None:
        await self._parts.scaffold.close()
        await self._parts.gateway.stop()

    async def _run_groups(self, runner: GroupRunner) -> None:
        self._running = asyncio.current_task()
        watching = asyncio.create_task(self._watch_engines())
        try:
            await runner.run()
        finally:
            watching.cancel()

    async def _watch_engines(self) -> None:
        """Wakes a trainer that waits for groups once no engine is left to draw any, so that it can be told why."""
        while self._parts.engines.healthy:  # noqa: ASYNC110 (it changes in other threads)
            await asyncio.sleep(_LOOK_S)
        self._parts.pool.close()

    async def _await_groups(self) -> None:
        """Until the cancelled runner has reported its groups. It has no task where it was cancelled before it began."""
        if self._running is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(self._running)

    def _call(self, work: Coroutine[Any, Any, _T], deadline_s: float, failure: str) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(deadline_s)
        except FutureTimeoutError as error:
            future.cancel()
            raise TrainingError(f"{failure} within {deadline_s:g} s") from error
