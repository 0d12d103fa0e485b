from __future__ import annotations

import numpy as np
import pytest

from forgejax.errors import TrainingError
from forgejax.learner.credit.credit import CreditConfig
from forgejax.learner.pack import PackGroups, TrainingBatch
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.drift import count_drift
from forgejax.types import Group
from tests.learner.samples import group, trajectory, turn

_PACKING = PackConfig(row_length=32, rows=1, block_size=8)


def _group(index: int, rewards: tuple[float, ...]) -> Group:
    """Two turns a member, the second prompted by all of the first."""
    members = []
    for number, reward in enumerate(rewards):
        first = turn(0, requested_at=0.0, prompt=[1, 2, 3], sampled=[4, number], request_id=f"{index}.{number}.0")
        second = turn(
            1, requested_at=1.0, prompt=[1, 2, 3, 4, number, 7], sampled=[5, 6], request_id=f"{index}.{number}.1"
        )
        members.append(trajectory(number, [first, second], [(reward, 9.0)]))
    return group(members, index=index)


def _given(groups: list[Group]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    turns = [turn for group in groups for one in group.trajectories for turn in one.turns]
    return {turn.completion.request_id: (turn.completion.prompt_ids, turn.completion.token_ids) for turn in turns}


def _pack(groups: list[Group], packing: PackConfig = _PACKING) -> TrainingBatch:
    return PackGroups(credit=CreditConfig(), packing=packing)(groups)


def test_every_sampled_token_of_the_groups_is_trained_or_counted() -> None:
    groups = [_group(3, (1.0, 0.0, 0.0)), _group(5, (1.0, 1.0))]

    batch = _pack(groups)

    assert batch.groups == (3, 5)
    assert batch.untrained == {"zero_advantage": 8}
    assert batch.packed.stats.trained_tokens == 12
    assert batch.packed.stats.samples == 6


def test_what_is_trained_is_what_was_given_and_drawn() -> None:
    groups = [_group(0, (1.0, 0.0)), _group(1, (0.0, 1.0, 0.5))]
    for row_length in (8, 32):
        packed = _pack(groups, PackConfig(row_length=row_length, rows=1, block_size=8)).packed
        assert count_drift(packed, _given(groups)) == 0


def test_one_changed_id_anywhere_is_drift() -> None:
    groups = [_group(0, (1.0, 0.0))]
    packed, given = _pack(groups).packed, _given(groups)
    prompt, sampled = given["0.1.1"]

    assert count_drift(packed, given | {"0.1.1": (np.array([1, 2, 9, 4, 1, 7]), sampled)}) == 1
    assert count_drift(packed, given | {"0.1.1": (prompt, np.array([5, 8]))}) == 1
    assert count_drift(packed, given | {"0.1.1": (prompt, np.array([5, 6, 6]))}) == 1
    del given["0.1.1"]
    assert count_drift(packed, given) == 8


def test_a_broken_index_in_the_packed_batch_is_drift() -> None:
    groups = [_group(0, (1.0, 0.0))]
    packed = _pack(groups).packed
    packed.batches[0].tokens_BT[0, 0] += 1  # the root that all four samples share

    assert count_drift(packed, _given(groups)) == 4


def test_the_same_groups_give_the_same_batch() -> None:
    groups = [_group(0, (1.0, 0.0)), _group(1, (0.0, 1.0, 0.5))]

    first, second = _pack(groups).packed, _pack(groups).packed

    assert first.placements == second.placements
    assert all((a.tokens_BT == b.tokens_BT).all() for a, b in zip(first.batches, second.batches, strict=True))


def test_nothing_to_train_is_said_in_a_sentence() -> None:
    with pytest.raises(TrainingError, match=r"none of 1 groups has a token to train"):
        _pack([_group(0, (1.0, 1.0))])
