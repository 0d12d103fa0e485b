import asyncio
import math
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.errors import ConfigError, PoolError, StorageFullError, TrainingError
from forgejax.pool import schema
from forgejax.pool.pool import Pool, PoolConfig, read_groups
from forgejax.types import Dispatch
from tests.pool.samples import group_of, open_pool


async def dispatch_all(pool: Pool) -> list[Dispatch]:
    """Every dispatch the pool gives without waiting."""
    started: list[Dispatch] = []
    while True:
        try:
            dispatch = await asyncio.wait_for(pool.next_dispatch(), 0.005)
        except TimeoutError:
            return started
        assert dispatch is not None
        started.append(dispatch)


def take(pool: Pool) -> int:
    group = pool.take(2.0)
    assert group is not None
    return group.dispatch.index


def train(pool: Pool, step: int, size: int = 2) -> list[int]:
    """Takes a batch and trains on it."""
    indices = [take(pool) for _ in range(size)]
    for index in indices:
        pool.accept(index, step=step, untrained={})
    pool.seal(step)
    pool.publish(step + 1)
    pool.retire(step)
    return indices


async def test_dispatch_waits_for_a_slot_and_starts_on_the_weights_just_published(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=2)
    for dispatch in await dispatch_all(pool):
        pool.finish(group_of(dispatch))
    waiting = asyncio.create_task(pool.next_dispatch())
    for index in (take(pool), take(pool)):
        pool.accept(index, step=0, untrained={})
    pool.seal(0)
    await asyncio.sleep(0.01)
    assert not waiting.done()  # the batch is in training: it holds its slots
    await asyncio.to_thread(pool.publish, 1)
    await asyncio.to_thread(pool.retire, 0)
    assert await asyncio.wait_for(waiting, 2) == Dispatch(index=2, attempt=0, version=1)


async def test_a_dropped_or_failed_group_is_replaced_at_once(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=3, p=2, w=3)
    first, second, _ = await dispatch_all(pool)
    pool.finish(group_of(first, tokens=4))
    pool.drop(take(pool), step=0, reason="zero_advantage", untrained={"zero_advantage": 4})
    pool.fail(second, "deadline", 9)
    pool.fail(second, "deadline", 9)
    assert [d.index for d in await dispatch_all(pool)] == [3, 4]
    snapshot = pool.snapshot()
    assert (snapshot.head, snapshot.in_flight, snapshot.running) == (2, 3, 3)
    assert snapshot.groups_not_trained == {"deadline": 1, "zero_advantage": 1}
    assert pool.tokens().not_trained == {"deadline": 9, "zero_advantage": 4}


async def test_an_asker_wakes_when_a_slot_frees_by_drop_or_failure(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=2)
    first, second = await dispatch_all(pool)
    pool.finish(group_of(first))
    index = take(pool)
    for number, free in enumerate(
        (
            lambda: pool.drop(index, step=0, reason="flat", untrained={"flat": 3}),
            lambda: pool.fail(second, "deadline", 0),
        )
    ):
        asking = asyncio.create_task(pool.next_dispatch())
        await asyncio.sleep(0.01)
        assert not asking.done()
        free()
        assert await asyncio.wait_for(asking, 2) == Dispatch(index=2 + number, attempt=0, version=0)


async def test_close_ends_every_wait_and_reports_are_still_accepted(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=1)
    (first, _) = await dispatch_all(pool)
    asking = [asyncio.create_task(pool.next_dispatch()) for _ in range(3)]
    taking = asyncio.create_task(asyncio.to_thread(pool.take, 30.0))
    await asyncio.sleep(0.02)
    cancelled = asking.pop()
    cancelled.cancel()
    await asyncio.to_thread(pool.close)
    assert await asyncio.wait_for(asyncio.gather(*asking, taking), 2) == [None, None, None]
    assert cancelled.cancelled()
    pool.finish(group_of(first, tokens=6))
    assert await pool.next_dispatch() is None
    assert pool.take(1.0) is None
    assert pool.tokens().not_trained == {"unused_at_end": 6}


async def test_a_take_wakes_when_its_group_finishes(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=1)
    first, second = await dispatch_all(pool)
    taking = asyncio.create_task(asyncio.to_thread(pool.take, 5.0))
    pool.finish(group_of(second))  # beyond the window
    await asyncio.sleep(0.02)
    assert not taking.done()
    pool.finish(group_of(first))
    group = await asyncio.wait_for(taking, 2)
    assert group is not None
    assert group.dispatch == first


async def test_a_take_past_its_deadline_names_what_blocks_the_head(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=3, p=3)
    with pytest.raises(TrainingError, match="group 0 is next and was not asked for"):
        pool.take(0.01)
    first, second, third = await dispatch_all(pool)
    pool.finish(group_of(second))
    with pytest.raises(
        TrainingError, match=r"0\.01 s: group 0 blocks the head .* running for 0 s \(1 finished groups wait"
    ):
        pool.take(0.01)
    pool.finish(group_of(first))
    pool.finish(group_of(third))
    for _ in range(3):
        take(pool)
    with pytest.raises(TrainingError, match="all 3 groups in flight are in batches that have not retired"):
        pool.take(0.01)


async def test_the_time_a_step_takes_does_not_count_against_the_next_group(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=1, p=1)
    (first,) = await dispatch_all(pool)
    pool.finish(group_of(first))
    pool.accept(take(pool), step=0, untrained={})
    pool.seal(0)
    began = time.monotonic()
    taking = asyncio.create_task(asyncio.to_thread(pool.take, 1.0))
    await asyncio.sleep(0.6)
    pool.publish(1)
    pool.retire(0)
    await asyncio.sleep(0.6)
    (second,) = await dispatch_all(pool)
    pool.finish(group_of(second))
    assert await taking is not None
    assert time.monotonic() - began > 1.0


async def test_a_verdict_must_account_for_the_tokens(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    pool.finish(group_of((await dispatch_all(pool))[0], tokens=5))
    index = take(pool)
    for wrong in ({"masked": 6}, {"masked": -1}, {"a": 7, "b": -3}):
        with pytest.raises(PoolError, match="expected 0 to 5 of its 5"):
            pool.accept(index, step=0, untrained=wrong)
    with pytest.raises(PoolError, match="expected 5 to 5 of its 5"):
        pool.drop(index, step=0, reason="zero_advantage", untrained={"zero_advantage": 4})
    with pytest.raises(PoolError, match="batch 1 is not filling; the batch to fill is 0"):
        pool.accept(index, step=1, untrained={})
    pool.accept(index, step=0, untrained={"masked": 2})
    with pytest.raises(PoolError, match="group 0 cannot be dropped: it is not waiting for a verdict"):
        pool.drop(index, step=0, reason="late", untrained={"late": 5})
    account = pool.tokens()
    assert (account.trained, account.waiting, dict(account.not_trained)) == (0, 5, {})
    pool.seal(0)
    pool.retire(0)
    account = pool.tokens()
    assert (account.trained, account.waiting, dict(account.not_trained)) == (3, 0, {"masked": 2})


def test_calls_against_the_laws_are_refused(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    pool.publish(2)
    calls: list[tuple[Callable[[], None], str]] = [
        (lambda: pool.publish(1), "version 1 is published after version 2"),
        (lambda: pool.retire(0), "batch 0 cannot retire"),
        (lambda: pool.count_tokens("", 3, owner="o"), "expected a reason"),
        (lambda: pool.count_tokens("probe", -3, owner="o"), "at least 0"),
        (lambda: pool.rewind(4), "knows 0 steps"),
        (lambda: pool.finish(group_of(Dispatch(index=3, attempt=0, version=0))), "never dispatched"),
    ]
    for call, message in calls:
        with pytest.raises(PoolError, match=message):
            call()
    for wrong in (
        {"take_timeout_s": 0.0},
        {"take_timeout_s": math.nan},
        {"take_timeout_s": math.inf},
        {"max_drop_batches": 0},
    ):
        with pytest.raises(ConfigError):
            PoolConfig(**wrong)


async def test_a_resume_returns_unconsumed_groups_oldest_first_and_redispatches_the_running(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2, w=4)
    dispatches = {d.index: d for d in await dispatch_all(pool)}
    for index in (0, 1, 3):
        pool.finish(group_of(dispatches[index], tokens=10 + index))
    assert train(pool, 0) == [0, 1]
    dispatches |= {d.index: d for d in await dispatch_all(pool)}  # 4 and 5, on version 1
    pool.finish(group_of(dispatches[5]))
    assert train(pool, 1) == [3, 5]

    pool = open_pool(tmp_path, n=4, p=2, w=4, resume_step=1)
    assert pool.next_step == 1
    snapshot = pool.snapshot()
    assert (snapshot.groups_trained, snapshot.finished_waiting, snapshot.version) == (2, 2, 1)
    again = await dispatch_all(pool)
    assert again == [
        Dispatch(index=2, attempt=1, version=1),
        Dispatch(index=4, attempt=1, version=1),
    ]  # 3 and 5 are finished: with them 4 slots are full
    pool.finish(group_of(dispatches[2], tokens=7))  # the dead run's worker reports late
    assert pool.tokens().not_trained == {"lost_attempt": 7}
    assert train(pool, 1) == [3, 5]
    pool.finish(group_of(again[0]))
    pool.finish(group_of(again[1]))
    assert train(pool, 2) == [2, 4]
    assert [d.index for d in await dispatch_all(pool)] == [6, 7, 8, 9]
    pool.check_integrity()


async def test_a_stop_leaves_the_groups_it_cut_off_as_a_crash_does_and_counts_their_tokens(tmp_path: Path) -> None:
    again: dict[str, list[Dispatch]] = {}
    for end in ("crash", "stop"):
        folder = tmp_path / end
        folder.mkdir()
        pool = open_pool(folder, n=4, p=2, w=4)
        dispatches = await dispatch_all(pool)
        pool.finish(group_of(dispatches[1], tokens=5))
        if end == "stop":
            pool.close()
            for dispatch in (dispatches[3], dispatches[0], dispatches[2], dispatches[2]):
                pool.give_back(dispatch, 7)
            pool.rewind(0)
            assert pool.tokens().not_trained == {"in_flight_at_end": 21, "unused_at_end": 5}
            assert (pool.snapshot().waiting, pool.snapshot().groups_not_trained) == (3, {})
        pool = open_pool(folder, n=4, p=2, w=4, resume_step=0)
        assert pool.tokens().total == (5 if end == "crash" else 26)
        again[end] = await dispatch_all(pool)
        for dispatch in again[end]:
            pool.finish(group_of(dispatch))
        assert train(pool, 0) + train(pool, 1) == [0, 1, 2, 3]
        pool.check_integrity()
    assert again["stop"] == again["crash"] == [Dispatch(index=index, attempt=1, version=0) for index in (0, 2, 3)]


async def test_a_rewind_in_the_same_process_leaves_the_running_alone(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2, w=4)
    dispatches = await dispatch_all(pool)
    for dispatch in dispatches[:3]:
        pool.finish(group_of(dispatch))
    assert train(pool, 0) == [0, 1]
    assert take(pool) == 2  # taken, no verdict yet
    pool.rewind(0)
    assert pool.snapshot().version == 0
    pool.finish(group_of(dispatches[3]))
    assert train(pool, 0) == [0, 1]
    assert train(pool, 1) == [2, 3]
    assert pool.tokens().not_trained == {}


async def test_a_full_disk_leaves_the_pool_as_it_was_and_the_report_can_be_repeated(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=1)
    first, second = await dispatch_all(pool)
    pool.finish(group_of(first))
    with pool._journal._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    before = pool.snapshot()
    with pytest.raises(StorageFullError):
        pool.finish(group_of(second, tokens=10_000))
    assert pool.snapshot() == before
    with pool._journal._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 100000")
    pool.finish(group_of(second, tokens=10_000))
    assert train(pool, 0) == [0, 1]
    assert pool.tokens().trained == 10_003


def damage(pool: Pool, index: int) -> None:
    """Flips one bit in the middle of a group's stored bytes."""
    data = bytearray(pool._journal.payload(index))
    data[len(data) // 2] ^= 1
    with pool._journal._engine.begin() as connection:
        changed = sa.update(schema.groups).where(schema.groups.c.index == index).values(payload=bytes(data))
        connection.execute(changed)


async def test_a_damaged_group_is_dropped_and_counted_and_those_behind_it_are_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = open_pool(tmp_path, n=4, p=2, w=4)
    for dispatch in await dispatch_all(pool):
        pool.finish(group_of(dispatch, tokens=10 + dispatch.index))
    damage(pool, 1)
    assert train(pool, 0) == [0, 2]
    assert "group 1: its" in caplog.text and "its 11 tokens count as damaged, and the run goes on" in caplog.text
    assert (pool.snapshot().groups_dropped, pool.tokens().not_trained) == ({"damaged": 1}, {"damaged": 11})
    assert [d.index for d in await dispatch_all(pool)] == [4, 5, 6]  # its slot is filled anew
    pool.check_integrity()

    pool = open_pool(tmp_path, n=4, p=2, w=4, resume_step=0)  # and goes the same way after a resume
    assert train(pool, 0) == [0, 2]
    assert pool.tokens().not_trained == {"damaged": 11}


async def test_damage_to_a_group_that_was_trained_hinders_no_resume(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2, w=4)
    for dispatch in await dispatch_all(pool):
        pool.finish(group_of(dispatch))
    assert train(pool, 0) == [0, 1]
    damage(pool, 0)
    pool = open_pool(tmp_path, n=4, p=2, w=4, resume_step=1)
    assert [group.dispatch.index for group in read_groups(pool._journal)] == [1, 2, 3]
    assert train(pool, 1) == [2, 3]
    assert pool.tokens().not_trained == {}


async def test_who_asks_for_work_is_not_held_up_by_what_is_being_written(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=1)
    with pool._changed:  # as while a large group is on its way to the disk
        asking = asyncio.create_task(pool.next_dispatch())
        began = time.monotonic()
        await asyncio.sleep(0.05)
        assert time.monotonic() - began < 0.5
        cancelled = asyncio.create_task(pool.next_dispatch())
        await asyncio.sleep(0.01)
        cancelled.cancel()
    assert sorted(each.index for each in await asyncio.gather(asking, cancelled) if each is not None) == [0, 1]
    waiting = asyncio.create_task(pool.next_dispatch())
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert pool.snapshot().running == 2


async def test_what_is_forgotten_tells_which_versions_are_still_needed(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=2)
    for step in range(3):
        for dispatch in await dispatch_all(pool):
            pool.finish(group_of(dispatch))
        train(pool, step)
    assert [pool.forget(step) for step in range(4)] == [0, 1, 2, 3]


async def test_figures_after_a_resume_are_those_of_the_surviving_lineage(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2, w=4)
    dispatches = await dispatch_all(pool)
    for dispatch in dispatches:
        pool.finish(group_of(dispatch, tokens=3))
    train(pool, 0)
    pool.count_tokens("evaluation", 100, owner="o")
    before = pool.snapshot(), pool.tokens()
    assert before[0].staleness_max == 0
    train(pool, 1)
    assert pool.snapshot().staleness_max == 1
    pool = open_pool(tmp_path, n=4, p=2, w=4, resume_step=1)
    after = pool.snapshot()
    assert after == before[0]
    assert pool.tokens() == before[1]
    assert pool.tokens().total == 112


@settings(max_examples=25, deadline=None)
@given(
    shape=st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(1, n))),
    moves=st.lists(st.tuples(st.sampled_from("ddfffxaaaaarcLk"), st.integers(0, 99)), max_size=60),
)
def test_in_the_surviving_lineage_each_finished_group_is_trained_exactly_once(
    shape: tuple[int, int, int], moves: list[tuple[str, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(Story(Path(folder), *shape).tell(moves))


class Story:
    """A run that is killed at any moment, beside a model of what must be true of it."""

    def __init__(self, folder: Path, n: int, p: int, w: int) -> None:
        self.folder, self.n, self.p, self.w = folder, n, p, w
        self.pool = self.reopen(0)
        self.running: list[Dispatch] = []
        self.lost: list[Dispatch] = []
        self.finished: set[int] = set()
        self.filling: list[int] = []
        self.trained: list[list[int]] = []  # by step
        self.dropped: list[set[int]] = [set()]  # by the step that was filling
        self.checkpoint = 0
        self.told = 0  # tokens

    def reopen(self, step: int) -> Pool:
        return open_pool(self.folder, n=self.n, p=self.p, w=self.w, resume_step=step)

    async def tell(self, moves: list[tuple[str, int]]) -> None:
        for move, pick in moves:
            await self.move(move, pick)
            self.pool.check_integrity()
        self.kill()  # and from here on nothing goes wrong
        for round_ in range(400):
            await self.move("d", 0)
            await self.move("f", 0)
            await self.move("a", 0)
            consumed = {i for batch in self.trained for i in batch}.union(*self.dropped)
            if round_ > 20 and consumed >= self.finished - {d.index for d in self.running} and len(self.trained) > 1:
                break
        self.check()

    async def move(self, move: str, pick: int) -> None:
        pool = self.pool
        if move == "d" and pool._window.dispatchable() is not None:
            dispatch = await pool.next_dispatch()
            assert dispatch is not None
            self.running.append(dispatch)
        elif move in "fx" and self.running:
            dispatch = self.running.pop(pick % len(self.running))
            tokens = 1 + pick % 5
            self.told += tokens
            if move == "x":
                pool.fail(dispatch, "deadline", tokens)
            else:
                pool.finish(group_of(dispatch, tokens))
                pool.finish(group_of(dispatch, tokens))
                self.finished.add(dispatch.index)
        elif move in "ar" and pool._window.takeable() is not None:
            self.consume(drop=move == "r")
        elif move == "c":
            self.checkpoint = len(self.trained)
        elif move == "L" and self.lost:
            pool.finish(group_of(self.lost.pop(), 3))
            self.told += 3
        elif move == "k":
            self.kill()

    def consume(self, drop: bool) -> None:
        group = self.pool.take(1.0)
        assert group is not None
        index, step = group.dispatch.index, len(self.trained)
        if drop:
            self.pool.drop(index, step=step, reason="flat", untrained={"flat": group.sampled_tokens})
            self.dropped[step].add(index)
            return
        self.pool.accept(index, step=step, untrained={"masked": 1})
        self.filling.append(index)
        if len(self.filling) == self.p:
            self.trained.append(self.filling)
            self.filling = []
            self.dropped.append(set())
            self.pool.seal(step)
            self.pool.publish(step + 1)
            self.pool.retire(step)

    def kill(self) -> None:
        self.lost += self.running
        self.running = []
        self.filling = []
        self.trained = self.trained[: self.checkpoint]
        self.dropped = [*self.dropped[: self.checkpoint], set()]
        self.pool = self.reopen(self.checkpoint)

    def check(self) -> None:
        trained = [index for batch in self.trained for index in batch]
        dropped = [index for indices in self.dropped for index in indices]
        assert len(set(trained + dropped)) == len(trained + dropped)
        assert set(trained + dropped) <= self.finished
        left = self.finished - set(trained + dropped) - set(self.filling)
        snapshot = self.pool.snapshot()
        assert snapshot.finished_waiting == len(left)
        assert snapshot.groups_trained == len(trained)
        assert self.pool.tokens().total == self.told
        # The same figures come from the journal alone.
        again = self.reopen(len(self.trained))
        assert again.snapshot().groups_trained == len(trained)
        assert again.tokens().total == self.told
        assert again.tokens().trained == self.pool.tokens().trained


def test_many_threads_lose_and_repeat_nothing(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=8, p=2, w=4)
    batches: list[list[int]] = []

    async def worker() -> None:
        while (dispatch := await pool.next_dispatch()) is not None:
            await asyncio.sleep(0.001 * (dispatch.index % 3))
            pool.finish(group_of(dispatch))

    async def rollouts() -> None:
        await asyncio.gather(*(worker() for _ in range(8)))

    thread = threading.Thread(target=asyncio.run, args=(rollouts(),))
    thread.start()
    for step in range(10):
        batches.append(train(pool, step))
    pool.close()
    thread.join(10)
    assert not thread.is_alive()
    taken = [index for batch in batches for index in batch]
    assert len(set(taken)) == 20
    snapshot = pool.snapshot()
    assert snapshot.groups_trained == 20
    assert snapshot.staleness_max <= 5
    account = pool.tokens()
    assert account.trained == 60
    assert account.total == 3 * snapshot.groups_dispatched
    pool.check_integrity()


async def test_it_tells_how_far_the_batch_is_that_is_being_filled(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=3)
    dispatches = await dispatch_all(pool)
    assert pool.describe_filling() == "0 of 3 groups done"
    for dispatch in dispatches[:2]:
        pool.finish(group_of(dispatch))
    pool.accept(take(pool), step=0, untrained={})
    assert pool.describe_filling() == "1 of 3 groups done (and 1 waiting)"
