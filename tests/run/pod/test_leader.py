"""A leader and its followers over real connections, with a store of names in place of jax's."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from forgejax.errors import ConfigError, PodError
from forgejax.run.pod import leader as leader_module
from forgejax.run.pod.followed import Followed
from forgejax.run.pod.hello import Hello
from forgejax.run.pod.leader import LOST, Leader
from forgejax.sharding import DistributedConfig, Processes

TOLD = DistributedConfig(coordinator="127.0.0.1:1", processes=3, process_id=0, start_s=5.0, silence_s=1.0, order_s=1.0)


@dataclass
class Store:
    """``Processes`` of one process, with names and values in memory."""

    index: int = 0
    count: int = 3
    host: str = "127.0.0.1"
    values: dict[str, str] = field(default_factory=dict)
    told: threading.Condition = field(default_factory=threading.Condition)

    def share(self, name: str, value: str) -> None:
        with self.told:
            self.values[name] = value
            self.told.notify_all()

    def hear(self, name: str, within_s: float) -> str:
        with self.told:
            assert self.told.wait_for(lambda: name in self.values, within_s)
            return self.values[name]


class Exits:
    """What would have ended the processes: its codes, and when one has come."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.came = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.came.set()


def hello(process: int, **changes: Any) -> Hello:
    return Hello(process=process, config={"run": {"steps": 1}}, code="aa", versions={}, **changes)


class Member:
    """A follower in a thread of its own."""

    def __init__(
        self,
        store: Store,
        process: int,
        orders: dict[str, Callable[..., Any]],
        asked: frozenset[str] = frozenset(),
        leave: Callable[[int], None] = lambda code: None,
    ):
        self._store, self._process, self._leave = store, process, leave
        self._orders, self._asked = orders, asked
        self._end: list[Any] = []
        self._made: Future[Followed] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def followed(self) -> Followed:
        return self._made.result(10)

    def join(self) -> Any:
        """What it ended with: a code, or an error."""
        self._thread.join(10)
        return self._end[0]

    def _run(self) -> None:
        followed = Followed(TOLD, cast("Processes", self._store), hello(self._process), self._leave)
        self._made.set_result(followed)
        try:
            self._end.append(followed.carry_out(self._orders, self._asked))
        except PodError as error:
            self._end.append(error)


def gather(
    store: Store,
    orders: list[dict[str, Callable[..., Any]]],
    asked: frozenset[str] = frozenset(),
    leave: Callable[[int], None] = lambda code: None,
) -> tuple[Leader, list[Member]]:
    leader = Leader(TOLD, leave)
    members = [Member(store, number, each, asked, leave) for number, each in enumerate(orders, 1)]
    leader.gather(cast("Processes", store), hello(0))
    return leader, members


def test_every_follower_carries_out_every_order_in_the_leaders_order_and_answers_in_its_own_place() -> None:
    done: list[list[Any]] = [[], []]

    def orders_of(number: int) -> dict[str, Callable[..., Any]]:
        return {
            "add": lambda x: done[number].append(float(x.sum())),
            "name": lambda: f"process {number + 1}, after {len(done[number])}",
        }

    leader, members = gather(Store(), [orders_of(0), orders_of(1)], frozenset({"name"}))
    for value in range(5):
        leader.give("add", np.full(1000, value, np.float32))
    assert leader.ask("name") == ["process 1, after 5", "process 2, after 5"]
    leader.end(130)

    assert [member.join() for member in members] == [130, 130]
    assert done == [[0.0, 1000.0, 2000.0, 3000.0, 4000.0]] * 2


def test_what_a_follower_is_asked_and_cannot_do_is_an_error_of_the_leaders_own() -> None:
    def fail() -> None:
        raise ConfigError("there is no folder here")

    leader, members = gather(Store(), [{"see": fail}, {"see": lambda: None}], frozenset({"see"}))
    with pytest.raises(PodError, match=r"process 1 on .*: there is no folder here"):
        leader.ask("see")
    leader.refuse("there is no folder here")
    assert all("there is no folder here" in str(member.join()) for member in members)


def test_a_follower_that_fails_at_an_order_ends_the_job_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    exits = Exits()

    def fail() -> None:
        raise ConfigError("the disk is full")

    leader, _ = gather(Store(), [{"save": fail}, {"save": lambda: None}], leave=exits)
    leader.give("save")
    assert exits.came.wait(5)
    assert set(exits.codes) == {LOST}
    assert "process 1 on" in (said := capsys.readouterr().err) and "order 1, save: the disk is full" in said


def test_a_follower_that_is_late_with_an_order_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = Exits()
    monkeypatch.setattr(leader_module, "_LOOK_S", 0.05)
    release = threading.Event()
    leader, _ = gather(Store(), [{"update": release.wait}, {"update": lambda: None}], leave=exits)
    leader.give("update")
    assert exits.came.wait(5)
    release.set()
    assert "process 1 on" in (said := capsys.readouterr().err) and "has not done order 1, update, within 1 s" in said


def test_a_process_that_may_not_take_part_ends_the_job_before_it_begins() -> None:
    store = Store(count=2)
    leader = Leader(TOLD, lambda code: None)
    member = Member(store, 1, {})
    with pytest.raises(PodError, match=r"process 1 on .* with another configuration"):
        leader.gather(cast("Processes", store), dataclasses.replace(hello(0), config={"run": {"steps": 2}}))
    leader.refuse("another configuration")
    assert "another configuration" in str(member.join())


def test_a_process_that_does_not_come_is_named_by_its_number() -> None:
    store = Store()
    leader = Leader(dataclasses.replace(TOLD, start_s=0.4), lambda code: None)
    Member(store, 2, {})
    with pytest.raises(PodError, match=r"processes \[1\] have joined the job and not said hello"):
        leader.gather(cast("Processes", store), hello(0))
    leader.refuse("one is missing")


def test_a_follower_that_is_asked_to_end_asks_the_leader_whenever_that_listens() -> None:
    store = Store(count=2)
    leader, (member,) = gather(store, [{}])
    member.followed.ask_to_stop()
    asked = threading.Event()
    leader.watch_stop(asked.set)
    assert asked.wait(5)
    leader.end(0)
    assert member.join() == 0
