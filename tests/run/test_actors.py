"""What holds between the engines' records, the pool and the trainer, seen without any of them."""

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self, cast

import pytest

from forgejax.agents import AgentConfig, AgentResult, EpisodeSpec, EpisodeTally, StopPolicy
from forgejax.environments import RewardConfig, SpeedBaseline
from forgejax.errors import AgentError, EngineError, StorageFullError, TrainingError
from forgejax.pool.pool import Pool
from forgejax.run.actors import LoggedFirst, Parts, RolloutService
from forgejax.types import Dispatch, Group, StopReason
from tests.agents.fakes import FakeSessions, SumTasks, make_task
from tests.pool.samples import open_pool

ENDS = 20
DISPATCH = Dispatch(index=0, attempt=0, version=0)


class Recorder:
    """Stands for pool and engines: writes down what is called, and raises what it is told to."""

    def __init__(self, **failures: Exception) -> None:
        self.calls: list[str] = []
        self._failures = failures

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            self.calls.append(name)
            if name in self._failures:
                raise self._failures[name]

        return call


class DispatchingPool(Recorder):
    """Has nothing to dispatch but what goes wrong."""

    def __init__(self, problem: Exception) -> None:
        super().__init__()
        self._problem = problem

    async def next_dispatch(self) -> Dispatch | None:
        raise self._problem


class Part:
    """A gateway, a scaffold or engines, which starts and stops, and does nothing else."""

    healthy, trouble = True, "the inference engine has stopped"

    def __init__(self, start_fails: Exception | None = None) -> None:
        self._start_fails = start_fails
        self.ended = 0

    async def start(self) -> None:
        if self._start_fails is not None:
            raise self._start_fails

    async def stop(self) -> None:
        self.ended += 1

    async def close(self) -> None:
        self.ended += 1


class Engines(Part):
    """An inference side that is entered and left from the training thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.ended += 1


def parts(pool: Any = None, **changed: Any) -> Any:
    run = SimpleNamespace(group_size=2, seed=0, eval_samples=1, eval_concurrency=4)
    agent = SimpleNamespace(longest_s=3.0)
    tasks = SimpleNamespace(score_s=30.0)
    config = SimpleNamespace(run=run, agent=agent, tasks=tasks, reward=None, stop_policy=None, sampling=None)
    values = {"config": config, "engines": Engines(), "gateway": Part(), "scaffold": Part(), "environment": None}
    values |= {"pool": pool or Recorder(), "baseline": None, "tally": EpisodeTally()}
    return cast(Parts, SimpleNamespace(**(values | changed)))


def check_on(service: RolloutService) -> NoReturn:
    """Looks again and again, as the training loop does, until something has ended the groups."""
    while True:
        service.check()
        time.sleep(0.001)


async def test_a_group_is_accepted_only_once_the_engines_records_are_on_the_disk() -> None:
    both = Recorder()
    await LoggedFirst(pool=cast(Any, both), engines=cast(Any, both)).finish(cast(Group, None), {})

    assert both.calls == ["flush", "finish"]


async def test_no_report_of_a_group_says_more_than_the_engines_records_on_the_disk() -> None:
    both = Recorder()
    sink, dispatch = LoggedFirst(pool=cast(Any, both), engines=cast(Any, both)), Dispatch(index=0, attempt=0, version=0)
    await sink.fail(dispatch, "deadline", 3, {})
    await sink.give_back(dispatch, 3, {"worker_died": 1})

    assert both.calls == ["flush", "fail", "flush", "give_back"]


async def test_a_group_whose_requests_cannot_be_logged_is_not_accepted() -> None:
    both = Recorder(flush=EngineError("the request log cannot be written"))
    with pytest.raises(EngineError):
        await LoggedFirst(pool=cast(Any, both), engines=cast(Any, both)).finish(cast(Group, None), {})

    assert both.calls == ["flush"]


async def test_a_report_holds_nobody_up_and_ends_though_its_caller_be_cancelled() -> None:
    class Slow(Recorder):
        def finish(self, group: Group, apart: Mapping[str, int]) -> None:
            time.sleep(0.1)
            self.calls.append("finish")

    both = Slow()
    sink = LoggedFirst(pool=cast(Any, both), engines=cast(Any, both))
    reporting = asyncio.create_task(sink.finish(cast(Group, None), {}))
    began = time.monotonic()
    await asyncio.sleep(0.02)
    assert time.monotonic() - began < 0.09
    reporting.cancel()
    await reporting

    assert both.calls == ["flush", "finish"]


@pytest.mark.parametrize("problem", [AgentError("the agent cannot run"), StorageFullError("the disk is full")])
def test_what_ends_the_groups_is_told_to_a_trainer_who_waits_for_them(problem: Exception) -> None:
    class WaitingPool(DispatchingPool):
        """Asks, as the trainer it wakes would do, what has happened."""

        def close(self) -> None:
            try:
                service.check()
            except (AgentError, StorageFullError) as error:
                told.append(error)

    told: list[Exception] = []
    service = RolloutService(parts(pool := WaitingPool(problem)))
    with service:
        service.start_groups()
        with pytest.raises(type(problem)):
            check_on(service)

    assert told == [problem]
    assert pool.calls == []


def test_a_report_that_fails_while_the_groups_are_stopped_is_raised_and_everything_is_stopped_all_the_same() -> None:
    values = parts(DispatchingPool(StorageFullError("the disk is full")))
    service = RolloutService(values)
    with service:
        service.start_groups()
        with pytest.raises(StorageFullError):
            check_on(service)
        with pytest.raises(StorageFullError):
            service.stop_groups()
        service.stop_groups()

    assert (values.engines.ended, values.gateway.ended, values.scaffold.ended) == (1, 1, 1)


def test_an_agent_that_does_not_start_takes_the_engine_and_the_gateway_down_again() -> None:
    values = parts(scaffold=Part(AgentError("no such program")))
    with pytest.raises(AgentError, match="no such program"), RolloutService(values):
        pytest.fail("it is not entered")

    assert (values.engines.ended, values.gateway.ended, values.scaffold.ended) == (1, 1, 1)


def test_an_engine_that_has_died_is_an_error_of_the_run() -> None:
    values = parts()
    with RolloutService(values) as service:
        service.check()
        values.engines.healthy = False
        with pytest.raises(TrainingError, match="the inference engine has stopped"):
            service.check()


def test_what_is_there_when_the_groups_begin_is_not_looked_through_for_garbage_until_the_end(
    tmp_path: Path,
) -> None:
    gc.unfreeze()
    pool = open_pool(tmp_path, n=2, p=1)
    pool.close()  # there is nothing to do
    with RolloutService(parts(pool)) as service:
        service.start_groups()
        frozen = gc.get_freeze_count()
        assert frozen > 100_000, "jax alone has more"
        assert len(gc.get_objects()) < frozen / 10
    assert gc.get_freeze_count() == 0


def test_an_evaluation_of_no_tasks_is_empty_and_no_failure() -> None:
    with RolloutService(parts()) as service:
        evaluation = service.evaluate([], "o")

    assert (evaluation.sampled_tokens, evaluation.result.overall.reward) == (0, None)
    assert evaluation.complete


def test_an_evaluation_may_take_all_that_its_episodes_may(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def call(work: Any, deadline_s: float, failure: str) -> None:
        work.close()
        asked.append(deadline_s)

    with RolloutService(parts()) as service:
        monkeypatch.setattr(service, "_call", call)
        service.evaluate([make_task(index) for index in range(9)], "o")
        monkeypatch.undo()
    assert asked == [pytest.approx(3 * (3.0 + 60.0 + 15.0 + 30.0 + 15.0 + 5 * 5.0) + 30.0)]  # four at once


class Gateway(FakeSessions):
    """Sessions of three tokens each."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Chance(Part):
    """An agent that answers, dies with its worker, or tidies up for a while when it is cancelled, as chance has it."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance

    def check(self) -> None: ...

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        try:
            await asyncio.sleep(self.chance.expovariate(200.0))
        except asyncio.CancelledError:
            await asyncio.sleep(self.chance.uniform(0.0, 0.02))
            raise
        if self.chance.random() < 0.1:
            return AgentResult(error="it died", stop_reason=StopReason.ENVIRONMENT_FAILED, accident=True)
        return AgentResult(answer="1")


def take_some(pool: Pool, number: int) -> None:
    """Trains batches of two until the pool is closed, as the training thread does."""
    while (group := pool.take(10.0)) is not None:
        pool.accept(group.dispatch.index, step=number, untrained={})
        if (other := pool.take(10.0)) is None:
            return
        pool.accept(other.dispatch.index, step=number, untrained={})
        pool.seal(number)
        number += 1
        pool.publish(number)
        pool.retire(number - 1)


def test_a_stop_at_any_moment_reports_every_group_and_every_token_and_the_next_attempt_plays_what_it_cut_off(
    tmp_path: Path,
) -> None:
    chance, sessions, cut_off = random.Random(5), Gateway(), 0
    agent = AgentConfig(command=("agent",), deadline_s=5.0)
    run = SimpleNamespace(group_size=3, seed=0)
    config = SimpleNamespace(
        run=run,
        agent=agent,
        tasks=SimpleNamespace(score_s=30.0),
        reward=RewardConfig(),
        stop_policy=StopPolicy(),
        sampling=None,
    )
    for end in range(ENDS):
        pool = open_pool(tmp_path, n=6, p=2, w=6)
        values = {"config": config, "gateway": sessions, "scaffold": Chance(chance), "environment": SumTasks()}
        engines = Engines()
        engines.flush = lambda: None  # type: ignore[attr-defined]
        before = pool.snapshot()
        with RolloutService(parts(pool, **values, engines=engines, baseline=SpeedBaseline())) as service:
            service.start_groups()
            trainer = threading.Thread(target=take_some, args=(pool, 0))
            trainer.start()
            time.sleep(chance.uniform(0.0, 0.1))
            pool.close()
            time.sleep(chance.choice([0.0, chance.uniform(0.0, 0.03)]))
            service.stop_groups()
            trainer.join()
        assert (pool.snapshot().running, pool.snapshot().groups_failed) == (0, {}), f"end {end}"
        assert pool.tokens().total == 3 * len(sessions.closed) == 3 * len(sessions.opened), f"end {end}"
        assert pool.snapshot().groups_dispatched >= before.groups_dispatched
        cut_off += pool.snapshot().waiting
        pool.check_integrity()
    assert cut_off > ENDS
