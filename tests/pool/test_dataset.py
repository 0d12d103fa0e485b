import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from forgejax.errors import PoolError, TrainingError
from forgejax.pool.dataset import GroupBatch, GroupDataset
from forgejax.pool.pool import Pool
from forgejax.types import Dispatch, Group, StopReason, Verdict
from tests.pool.samples import group_of, open_pool


def keep_all(_group: Group) -> Verdict:
    return Verdict(drop=None, untrained={})


def drop_odd(group: Group) -> Verdict:
    odd = group.dispatch.index % 2 == 1
    return Verdict(drop="zero_advantage" if odd else None, untrained={"zero_advantage": 3} if odd else {})


@contextmanager
def rollouts(pool: Pool, limit: int = 10**9, make: Callable[[Dispatch], Group] = group_of) -> Iterator[None]:
    """Finishes groups one after another, in order, in a thread of its own, up to index ``limit``."""

    async def run() -> None:
        while (dispatch := await pool.next_dispatch()) is not None:
            if dispatch.index < limit:
                pool.finish(make(dispatch))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield
    finally:
        pool.close()
        thread.join(10)
        assert not thread.is_alive()


def indices(batch: GroupBatch) -> list[int]:
    return [group.dispatch.index for group in batch.groups]


def end_step(pool: Pool, number: int) -> None:
    pool.publish(number + 1)
    pool.retire(number)


def packed(batch: GroupBatch) -> dict[str, np.ndarray]:
    tokens = [t.turns[0].completion.token_ids for group in batch.groups for t in group.trajectories]
    return {"number": np.array(batch.number), "tokens": np.concatenate(tokens)}


def test_batches_are_numbered_full_and_in_window_order(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2)
    with rollouts(pool):
        iterator = iter(GroupDataset(pool, keep_all))
        for number in range(4):
            batch = next(iterator)
            assert (batch.number, indices(batch)) == (number, [2 * number, 2 * number + 1])
            end_step(pool, number)


def test_a_dropped_group_is_replaced_until_the_batch_is_full(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2, k=2)
    with rollouts(pool):
        iterator = iter(GroupDataset(pool, drop_odd))
        assert indices(next(iterator)) == [0, 2]
        end_step(pool, 0)
        assert indices(next(iterator)) == [4, 6]
    assert pool.snapshot().groups_dropped == {"zero_advantage": 3}
    assert pool.tokens().not_trained["zero_advantage"] == 9


def test_after_too_many_drops_in_a_row_the_batch_goes_out_short(tmp_path: Path) -> None:
    def only_0_and_9(group: Group) -> Verdict:
        kept = group.dispatch.index in (0, 9)
        return Verdict(drop=None if kept else "zero_advantage", untrained={} if kept else {"zero_advantage": 3})

    pool = open_pool(tmp_path, n=4, p=2, k=2)
    with rollouts(pool):
        iterator = iter(GroupDataset(pool, only_0_and_9))
        assert indices(next(iterator)) == [0]  # then 1, 2, 3, 4 are dropped: k * P = 4 in a row
        end_step(pool, 0)
        with pytest.raises(TrainingError, match="batch 1: 4 groups in a row were dropped"):
            next(iterator)  # 5, 6, 7, 8
        assert indices(next(iterator)) == [9]


def test_when_nothing_is_left_to_train_the_error_says_what_the_agents_did(tmp_path: Path) -> None:
    def crashed(dispatch: Dispatch) -> Group:
        group = group_of(dispatch)
        error = "agent command 'solve' ended with status 3; its stderr ends with:\nno such tool"
        ends: dict[str, Any] = {
            "stop_reason": StopReason.AGENT_FAILED,
            "masked": "agent_failed",
            "answer": None,
            "error": error,
        }
        return replace(group, trajectories=tuple(replace(each, **ends) for each in group.trajectories))

    def too_few(_group: Group) -> Verdict:
        return Verdict(drop="too_few_members", untrained={"agent_failed": 3})

    pool = open_pool(tmp_path, n=4, p=2, k=1)
    with rollouts(pool, make=crashed), pytest.raises(TrainingError) as raised:
        next(iter(GroupDataset(pool, too_few)))
    said = str(raised.value)
    assert said.startswith("batch 0: 2 groups in a row were dropped (too_few_members 2), so there is nothing to train")
    assert "the agent or what it works in is at fault, not the tasks" in said
    assert (
        "agent_failed on task t1: agent command 'solve' ended with status 3; its stderr ends with:\nno such tool"
        in said
    )
    assert "too hard" not in said


def test_a_kept_group_ends_a_row_of_drops(tmp_path: Path) -> None:
    def every_fourth(group: Group) -> Verdict:
        kept = group.dispatch.index % 4 == 3
        return Verdict(drop=None if kept else "zero_advantage", untrained={} if kept else {"zero_advantage": 3})

    pool = open_pool(tmp_path, n=4, p=2, k=2)
    with rollouts(pool):
        assert indices(next(iter(GroupDataset(pool, every_fourth)))) == [3, 7]  # 6 drops, never 4 in a row


def test_setting_the_state_rewinds_the_pool(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2)
    with rollouts(pool):
        iterator = iter(GroupDataset(pool, keep_all))
        for number in range(3):
            next(iterator)
            end_step(pool, number)
        iterator.set_state({"batch": 1})
        batch = next(iterator)
        assert (batch.number, indices(batch)) == (1, [2, 3])
        assert pool.snapshot().groups_trained == 2


def test_a_batch_cut_off_by_the_deadline_goes_on_where_it_was(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2, timeout_s=0.3)
    with rollouts(pool, limit=1):
        iterator = iter(GroupDataset(pool, keep_all))
        with pytest.raises(TrainingError, match=r"group 1 blocks the head of the window; it has been running for"):
            next(iterator)
        pool.finish(group_of(Dispatch(index=1, attempt=0, version=0)))
        assert indices(next(iterator)) == [0, 1]


async def test_a_wait_that_ends_for_want_of_groups_tells_of_those_that_failed(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=1, timeout_s=0.1)
    for _ in range(2):
        dispatch = await pool.next_dispatch()
        assert dispatch is not None
        pool.fail(dispatch, "agent_failed", 5)
    await pool.next_dispatch()
    with pytest.raises(TrainingError, match="groups that came to nothing so far: agent_failed 2"):
        next(iter(GroupDataset(pool, keep_all)))


def test_iteration_ends_when_the_pool_is_closed(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2)
    dataset = grain.experimental.ThreadPrefetchIterDataset(GroupDataset(pool, keep_all), prefetch_buffer_size=1)
    with rollouts(pool, limit=3):
        iterator = iter(dataset)
        assert indices(next(iterator)) == [0, 1]
        threading.Timer(0.05, pool.close).start()
        assert list(iterator) == []
    iterator.close()


def test_the_state_is_that_of_the_batch_handed_out_not_the_prefetched_one(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=8, p=2)
    dataset = GroupDataset(pool, keep_all).map(packed)
    dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
    with rollouts(pool):
        iterator = iter(dataset)
        assert iterator.get_state() == {"batch": 0}
        for number in range(3):
            assert next(iterator)["number"] == number
            assert iterator.get_state() == {"batch": number + 1}
            end_step(pool, number)
    iterator.close()


@pytest.mark.parametrize("state", [{}, {"batch": -1}, {"batch": "x"}])
def test_a_state_that_is_none_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    iterator = iter(GroupDataset(open_pool(tmp_path), keep_all))
    with pytest.raises(PoolError, match=r"expected \{'batch': n\}"):
        iterator.set_state(state)


def test_a_resume_through_orbax_gives_the_same_batches(tmp_path: Path) -> None:
    def pipeline(pool: Pool) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        dataset = GroupDataset(pool, drop_odd).map(packed)
        return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2))

    def steps(pool: Pool, iterator: grain.DatasetIterator[dict[str, np.ndarray]], numbers: range) -> list[list[int]]:
        tokens = []
        for number in numbers:
            batch = next(iterator)
            assert batch["number"] == number
            tokens.append(batch["tokens"].tolist())
            end_step(pool, number)
        return tokens

    pool = open_pool(tmp_path, n=6, p=2, k=2)
    with rollouts(pool), ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        iterator = pipeline(pool)
        steps(pool, iterator, range(3))
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = steps(pool, iterator, range(3, 6))
    iterator.close()

    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        step = manager.latest_step()
        assert step == 3
        pool = open_pool(tmp_path, n=6, p=2, k=2, resume_step=step)
        iterator = pipeline(pool)
        manager.restore(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator)))
        with rollouts(pool):
            assert steps(pool, iterator, range(3, 6)) == expected
    iterator.close()
    assert expected == [[12] * 3 + [14] * 3, [16] * 3 + [18] * 3, [20] * 3 + [22] * 3]
    assert pool.snapshot().groups_trained == 12
    pool.check_integrity()


async def test_in_lockstep_a_short_batch_waits_for_the_groups_that_still_run(tmp_path: Path) -> None:
    """Else the update would change the weights that draw for them. Group 0 is kept; 1 and 2 are dropped in a row."""

    def keep_the_first(group: Group) -> Verdict:
        kept = group.dispatch.index == 0
        return Verdict(drop=None if kept else "zero_advantage", untrained={} if kept else {"zero_advantage": 3})

    pool = open_pool(tmp_path, n=2, p=2, w=1)
    iterator = iter(GroupDataset(pool, keep_the_first, lockstep=True))
    waiting = asyncio.create_task(asyncio.to_thread(next, iterator))
    for index in range(3):
        dispatch = await asyncio.wait_for(pool.next_dispatch(), 5)
        assert dispatch is not None and (dispatch.index, dispatch.version) == (index, 0)
        pool.finish(group_of(dispatch))
    last = await asyncio.wait_for(pool.next_dispatch(), 5)
    assert last is not None and (last.index, last.version) == (3, 0)
    await asyncio.wait({waiting}, timeout=0.1)
    assert not waiting.done() and pool.next_step == 0
    pool.finish(group_of(last))
    assert indices(await asyncio.wait_for(waiting, 5)) == [0]
    end_step(pool, 0)
    after = await asyncio.wait_for(pool.next_dispatch(), 5)
    assert after is not None and (after.index, after.version) == (4, 1)
    pool.close()


async def test_a_lockstep_that_is_closed_as_it_waits_gives_no_batch_and_stays_in_its_place(tmp_path: Path) -> None:
    def drop_all_but_0(group: Group) -> Verdict:
        kept = group.dispatch.index == 0
        return Verdict(drop=None if kept else "zero_advantage", untrained={} if kept else {"zero_advantage": 3})

    pool = open_pool(tmp_path, n=2, p=2, w=1)
    iterator = iter(GroupDataset(pool, drop_all_but_0, lockstep=True))
    waiting = asyncio.create_task(asyncio.to_thread(next, iterator, None))
    for _ in range(3):
        dispatch = await asyncio.wait_for(pool.next_dispatch(), 5)
        assert dispatch is not None
        pool.finish(group_of(dispatch))
    assert await asyncio.wait_for(pool.next_dispatch(), 5) is not None
    await asyncio.wait({waiting}, timeout=0.1)
    pool.close()
    assert await asyncio.wait_for(waiting, 5) is None
    assert iterator.get_state() == {"batch": 0} and pool.next_step == 0


def test_a_group_that_never_ends_is_named_by_a_lockstep_past_its_time(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=1, p=1, w=1)
    dispatch = asyncio.run(pool.next_dispatch())
    assert dispatch is not None
    with pytest.raises(TrainingError, match=r"did not all end within 0\.05 s: group 0 blocks the head of the window"):
        pool.await_quiet(0.05)
    pool.finish(group_of(dispatch))
    assert pool.await_quiet(0.05)
    pool.close()
