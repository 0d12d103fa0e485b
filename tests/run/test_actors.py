"""What holds between the engines' records, the pool and the trainer, seen without any of them."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn, Self, cast

import pytest

from forgejax.errors import AgentError, EngineError, StorageFullError, TrainingError
from forgejax.run.actors import LoggedFirst, Parts, RolloutService
from forgejax.types import Dispatch, Group

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

    healthy = True

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

    def __exit__(self, *_: object) -> None:
        self.ended += 1


def parts(pool: Any = None, **changed: Any) -> Any:
    run = SimpleNamespace(group_size=2, seed=0, eval_samples=1, eval_concurrency=4)
    agent = SimpleNamespace(longest_s=3.0)
    config = SimpleNamespace(run=run, agent=agent, reward=None, stop_policy=None, sampling=None)
    values = {"config": config, "engines": Engines(), "gateway": Part(), "scaffold": Part(), "environment": None}
    values |= {"pool": pool or Recorder(), "baseline": None}
    return cast(Parts, SimpleNamespace(**(values | changed)))


def check_on(service: RolloutService) -> NoReturn:
    """Looks again and again, as the training loop does, until something has ended the groups."""
    while True:
        service.check()
        time.sleep(0.001)


def test_a_group_is_accepted_only_once_the_engines_records_are_on_the_disk() -> None:
    both = Recorder()
    LoggedFirst(pool=cast(Any, both), engines=cast(Any, both)).finish(cast(Group, None))

    assert both.calls == ["flush", "finish"]


def test_a_group_whose_requests_cannot_be_logged_is_not_accepted() -> None:
    both = Recorder(flush=EngineError("the request log cannot be written"))
    with pytest.raises(EngineError):
        LoggedFirst(pool=cast(Any, both), engines=cast(Any, both)).finish(cast(Group, None))

    assert both.calls == ["flush"]


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


def test_an_evaluation_of_no_tasks_is_empty_and_no_failure() -> None:
    with RolloutService(parts()) as service:
        evaluation = service.evaluate([])

    assert (evaluation.sampled_tokens, evaluation.result.overall.reward) == (0, None)
    assert evaluation.complete
