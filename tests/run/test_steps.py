"""Steps out of the pool: packed, numbered, and the same again from a place they have passed."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np

from forgejax.learner import CreditConfig, PackConfig
from forgejax.pool.pool import Pool
from forgejax.run.steps import PooledSteps
from forgejax.types import Group
from tests.learner.samples import group, trajectory, turn
from tests.pool.samples import open_pool

PACKING = PackConfig(row_length=32, rows=1, block_size=8)


def pair(index: int) -> Group:
    """Two members that differ in their reward, with three sampled tokens each."""
    members = [
        trajectory(
            member,
            [turn(0, requested_at=0.0, prompt=[1, 2], sampled=[index, member, 9], request_id=f"{index}.{member}")],
            [(float(member), 9.0)],
        )
        for member in range(2)
    ]
    return group(members, index=index)


def fill(pool: Pool, count: int) -> None:
    for _ in range(count):
        dispatch = asyncio.run(pool.next_dispatch())
        assert dispatch is not None
        pool.finish(dataclasses.replace(pair(dispatch.index), dispatch=dispatch))


def test_a_step_has_the_groups_of_its_batch_packed_and_comes_again_after_going_back(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=4, p=2)
    fill(pool, 4)
    steps = PooledSteps(pool, credit=CreditConfig(), packing=PACKING, row_shards=1)
    first = steps.next()
    place = steps.get_state()
    steps.set_state({"batch": 0})
    again = steps.next()
    steps.next()
    pool.close()

    assert first is not None and again is not None
    assert (first.number, first.training.groups, place) == (0, (0, 1), {"batch": 1})
    assert first.training.packed.stats.trained_tokens == 12
    assert first.packing_began <= first.packing_ended
    for ours, theirs in zip(first.training.packed.batches, again.training.packed.batches, strict=True):
        np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT)
    assert steps.next() is None
    steps.close()


def test_in_lockstep_no_group_is_taken_before_the_step_is_asked_for(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, n=2, p=2, w=1)
    steps = PooledSteps(pool, credit=CreditConfig(), packing=PACKING, row_shards=1, lockstep=True)
    steps.set_state({"batch": 0})
    fill(pool, 2)
    assert pool.snapshot().finished_waiting == 2
    first = steps.next()
    assert first is not None and first.training.groups == (0, 1)
    assert steps.get_state() == {"batch": 1} and pool.snapshot().finished_waiting == 0
    pool.close()
    assert steps.next() is None
    steps.close()
