from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.errors import ConfigError, PoolError
from forgejax.pool.window import Live, State, Window, WindowConfig


def window_of(n: int, p: int, w: int) -> Window:
    return Window(WindowConfig(in_flight=n, groups_per_step=p, window=w))


def dispatch_all(window: Window) -> list[int]:
    started = []
    while (index := window.dispatchable()) is not None:
        window.dispatch(index)
        started.append(index)
    return started


class Run:
    """A whole run around the window: rollouts, batches of P, prefetched batches, steps that publish and then retire."""

    def __init__(self, n: int, p: int, w: int, prefetch: int = 0) -> None:
        self.window = window_of(n, p, w)
        self.p, self.prefetch = p, prefetch
        self.version = 0
        self.versions: dict[int, int] = {}
        self.running: list[int] = []
        self.batches: list[list[int]] = [[]]
        self.order: list[int] = []
        self.disorder: list[int] = []
        self.lag: list[int] = []
        self.staleness: list[int] = []
        self.refill()

    def refill(self) -> None:
        for index in dispatch_all(self.window):
            self.versions[index] = self.version
            self.running.append(index)
        self.window.check_integrity()

    def finish(self, index: int) -> None:
        self.running.remove(index)
        self.window.finish(index)

    def fail(self, index: int) -> None:
        self.running.remove(index)
        self.window.fail(index)
        self.refill()

    def take(self, drop: bool = False) -> bool:
        """Takes or drops one group if the window has one and the prefetch has room."""
        full = len(self.batches) == self.prefetch + 1 and len(self.batches[-1]) == self.p
        if full or self.window.takeable() is None:
            return False
        place = self.window.take()
        self.order.append(place.index)
        self.disorder.append(place.disorder)
        self.lag.append(place.lag)
        if drop:
            self.window.drop(place.index)
            self.refill()
            return True
        if len(self.batches[-1]) == self.p:
            self.batches.append([])
        self.batches[-1].append(place.index)
        return True

    def step(self) -> bool:
        """Trains the oldest full batch: publish, then retire."""
        if len(self.batches[0]) < self.p:
            return False
        batch = self.batches.pop(0)
        self.batches = self.batches or [[]]
        self.staleness += [self.version - self.versions[index] for index in batch]
        self.version += 1
        for index in batch:
            self.window.retire(index)
        self.refill()
        return True


shapes = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(1, n), st.integers(0, 2))
)


@settings(max_examples=120, deadline=None)
@given(shape=shapes, data=st.data())
def test_disorder_lag_and_staleness_never_pass_their_bounds(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    n, p, w, prefetch = shape
    run = Run(n, p, w, prefetch)
    for choice in data.draw(st.lists(st.integers(0, 99), max_size=80)):
        if choice < 35 and run.running:
            run.finish(run.running[choice % len(run.running)])
        elif choice < 40 and run.running:
            run.fail(run.running[choice % len(run.running)])
        elif choice < 75:
            run.take(drop=choice >= 70)
        else:
            run.step()
        run.window.check_integrity()
    # From any state the run goes on: finish, take and step in turn reach a new step.
    version = run.version
    for _ in range(20 * n):
        if run.running:
            run.finish(run.running[-1])
        while run.take():
            pass
        run.step()
    assert run.version > version
    assert max(run.disorder) <= w - 1
    assert max(run.lag) <= n + w - 2
    assert max(run.staleness) <= (n + w - 2) // p
    assert len(set(run.order)) == len(run.order)
    if w == 1:
        assert run.order == sorted(run.order)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    w=st.integers(1, 6),
    states=st.lists(st.sampled_from([State.WAITING, State.FINISHED]), min_size=1, max_size=20),
    picks=st.lists(st.integers(0, 99), max_size=60),
)
def test_a_restored_window_keeps_every_group_and_the_lag_bound(
    n: int, w: int, states: list[State], picks: list[int]
) -> None:
    config = WindowConfig(in_flight=n, groups_per_step=1, window=min(n, w))
    live = [Live(index=i, state=state, taken_before=max(0, i - n + 1)) for i, state in enumerate(states)]
    window = Window(config, live=live, next_index=len(states))
    running: list[int] = []
    lags: list[int] = []
    taken: set[int] = set()
    for pick in picks + [0] * (6 * len(states) + 40):
        running += dispatch_all(window)
        if running and (pick % 2 or window.takeable() is None):
            window.finish(running.pop(-1 - pick % len(running)))
        elif window.takeable() is not None:
            place = window.take()
            lags.append(place.lag)
            taken.add(place.index)
            window.retire(place.index)
        window.check_integrity()
    assert taken >= set(range(len(states)))
    assert max(lags) <= n + min(n, w) - 2


def test_the_published_picture() -> None:
    window = window_of(8, 4, 4)
    assert dispatch_all(window) == [0, 1, 2, 3, 4, 5, 6, 7]
    for index in range(7):
        window.finish(index)
        window.take()
        window.retire(index)
    assert dispatch_all(window) == [8, 9, 10, 11, 12, 13, 14]
    for index in (8, 9, 10, 11):
        window.finish(index)
    places = [window.take() for _ in range(3)]
    assert [(place.index, place.disorder) for place in places] == [(8, 1), (9, 2), (10, 3)]
    assert window.head == 7
    assert window.takeable() is None  # 11 is finished and waits: 7 is pending
    window.finish(7)
    last = window.take()
    assert (last.index, last.lag) == (7, 10)
    assert window.take().index == 11
    assert WindowConfig(in_flight=8, groups_per_step=4, window=4).max_lag == 10


@pytest.mark.parametrize(("n", "p", "w", "staleness"), [(8, 2, 4, 5), (8, 4, 4, 2), (6, 1, 6, 10), (4, 4, 1, 0)])
def test_the_bounds_are_reached(n: int, p: int, w: int, staleness: int) -> None:
    run = Run(n, p, w)
    while len(run.running) + run.window.count(State.FINISHED) < n or run.running[-1] < 3 * n:
        run.finish(run.running[0])
        run.take()
        run.step()
    victim = run.running[-1]  # just dispatched, so on the weights just published
    while True:
        ahead = [index for index in run.running if index != victim]
        if ahead and ahead[0] < victim + w:
            run.finish(ahead[0])
        elif victim in run.running:
            run.finish(victim)
        if not run.take():
            assert run.step()
            continue
        run.step()
        if run.order[-1] == victim:
            break
    while not run.step():
        run.finish(run.running[0])
        run.take()
    assert run.lag[run.order.index(victim)] == n + w - 2
    assert max(run.lag) == n + w - 2
    assert max(run.disorder) == w - 1
    assert max(run.staleness) == staleness == (n + w - 2) // p


def test_a_finished_group_beyond_the_window_waits() -> None:
    window = window_of(4, 1, 2)
    dispatch_all(window)
    window.finish(2)
    assert window.takeable() is None
    window.fail(0)  # the head moves on to 1
    assert window.takeable() == 2


def test_the_oldest_finished_group_is_taken_first() -> None:
    window = window_of(4, 2, 4)
    dispatch_all(window)
    for index in (3, 1, 2):
        window.finish(index)
    assert [window.take().index for _ in range(3)] == [1, 2, 3]


def test_holes_do_not_widen_the_view() -> None:
    window = window_of(6, 1, 3)
    dispatch_all(window)
    for index in (1, 2):
        window.fail(index)
    for index in (3, 4):
        window.finish(index)
    assert window.takeable() is None  # head 0 sees 0..2, though 1 and 2 are gone


def test_greedy_takes_whatever_is_finished() -> None:
    window = window_of(4, 1, -1)
    dispatch_all(window)
    window.finish(3)
    assert window.take().disorder == 3


def test_a_taken_group_holds_its_slot_until_it_retires_and_a_dropped_one_does_not() -> None:
    window = window_of(3, 2, 3)
    dispatch_all(window)
    window.finish(0)
    window.finish(1)
    window.take()
    assert window.dispatchable() is None
    window.drop(window.take().index)
    assert window.dispatchable() == 3
    window.dispatch(3)
    assert window.dispatchable() is None
    window.retire(0)
    assert window.dispatchable() == 4


def test_a_group_that_is_given_back_is_the_next_to_be_dispatched() -> None:
    window = window_of(4, 2, 4)
    dispatch_all(window)
    window.finish(0)
    window.give_back(2)
    assert (window.dispatchable(), window.count(State.WAITING), window.head) == (2, 1, 0)
    window.dispatch(2)
    assert window.dispatchable() is None
    window.check_integrity()


@pytest.mark.parametrize(
    "move",
    [
        lambda window: window.dispatch(9),
        lambda window: window.finish(3),
        lambda window: window.finish(9),
        lambda window: window.fail(3),
        lambda window: window.give_back(3),
        lambda window: window.drop(0),
        lambda window: window.retire(3),
        lambda window: (window.take(), window.take()),
    ],
)
def test_a_move_against_the_laws_raises_and_changes_nothing(move: Callable[[Window], object]) -> None:
    window = window_of(4, 1, 4)
    dispatch_all(window)
    window.finish(3)
    before = window.count(State.RUNNING)
    with pytest.raises(PoolError):
        move(window)
    assert window.count(State.RUNNING) == before
    window.check_integrity()


def test_integrity_notices_more_live_groups_than_slots() -> None:
    window = window_of(2, 1, 1)
    dispatch_all(window)
    window._live[2] = Live(index=2, state=State.RUNNING)
    with pytest.raises(PoolError, match="not in order below the next index 2"):
        window.check_integrity()
    window._next = 3
    with pytest.raises(PoolError, match="3 groups are live; at most 2"):
        window.check_integrity()


def test_the_default_width_is_three_tenths_of_the_slots() -> None:
    widths = {n: WindowConfig(in_flight=n, groups_per_step=1).width for n in (1, 3, 4, 10, 16, 20, 64)}
    assert widths == {1: 1, 3: 1, 4: 1, 10: 3, 16: 4, 20: 6, 64: 19}
    assert WindowConfig(in_flight=8, groups_per_step=2, window=-1).max_staleness is None


@pytest.mark.parametrize(("n", "p", "w"), [(3, 4, 1), (4, 0, 1), (4, 2, 5), (4, 2, -2)])
def test_an_impossible_window_is_refused(n: int, p: int, w: int) -> None:
    with pytest.raises(ConfigError, match=r"expected|never fill"):
        WindowConfig(in_flight=n, groups_per_step=p, window=w)
