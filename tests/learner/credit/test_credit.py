from __future__ import annotations

import numpy as np
import pytest

from forgejax.errors import ConfigError
from forgejax.learner.credit.credit import CreditConfig, assign_credit, compute_returns, make_judge
from forgejax.learner.packing.config import PackConfig
from forgejax.types import Trajectory
from tests.learner.samples import group, trajectory, turn

_PACKING = PackConfig(row_length=64, trunks=False)


def _member(member: int, reward: float, turns: int = 2) -> Trajectory:
    return trajectory(
        member, [turn(k, requested_at=float(k), request_id=f"{member}-{k}") for k in range(turns)], [(reward, 50.0)]
    )


def test_a_turn_is_credited_with_every_reward_granted_after_its_request() -> None:
    one = trajectory(
        0, [turn(k, requested_at=float(10 * k)) for k in range(3)], [(1.0, 5.0), (2.0, 10.0), (4.0, 15.0), (8.0, 99.0)]
    )

    returns, total = compute_returns(one, 1.0)
    assert returns.tolist() == [15.0, 14.0, 8.0]
    assert total == 15.0

    returns, total = compute_returns(one, 0.5)  # granted during turns 0, 1, 1, 2
    assert returns.tolist() == [1 + 1 + 2 + 2, 2 + 4 + 4, 8]
    assert total == 6.0


def test_turns_are_ordered_by_the_arrival_of_their_request() -> None:
    one = trajectory(0, [turn(0, requested_at=3.0), turn(1, requested_at=1.0)], [(1.0, 2.0)])

    assert compute_returns(one, 1.0)[0].tolist() == [1.0, 0.0]  # the turn requested at 1, then that at 3


def test_leave_one_out_advantages_reach_every_sample() -> None:
    found = assign_credit(group([_member(0, 1.0), _member(1, 0.0), _member(2, 0.5)]), CreditConfig(), _PACKING)

    assert found.drop is None
    assert found.untrained == {}
    advantage = {one.request_id: one.advantage for one in found.samples}
    assert advantage == {"0-0": 0.75, "0-1": 0.75, "1-0": -0.75, "1-1": -0.75, "2-0": 0.0, "2-1": 0.0}


def test_a_masked_trajectory_neither_trains_nor_enters_a_baseline() -> None:
    failed = trajectory(2, [turn(0, requested_at=0.0)], [(100.0, 1.0)], masked="environment_failed")

    found = assign_credit(group([_member(0, 1.0), _member(1, 0.0), failed]), CreditConfig(), _PACKING)

    assert {one.advantage for one in found.samples} == {1.0, -1.0}
    assert found.untrained == {"environment_failed": 2}


def test_one_member_is_no_group() -> None:
    failed = trajectory(1, [turn(0, requested_at=0.0)], [], masked="environment_failed")

    found = assign_credit(group([_member(0, 1.0), failed]), CreditConfig(), _PACKING)

    assert (found.drop, found.untrained) == ("too_few_members", {"environment_failed": 2, "too_few_members": 4})


def test_a_group_is_dropped_by_its_advantages_and_never_by_its_totals() -> None:
    def late(member: int, first: float) -> Trajectory:  # same total, granted at another step
        return trajectory(
            member, [turn(k, requested_at=float(k)) for k in range(2)], [(first, 0.5), (1.0 - first, 1.5)]
        )

    same = group([_member(0, 1.0), _member(1, 1.0)])
    spread = group([late(0, 1.0), late(1, 0.0)])

    verdict = make_judge(CreditConfig(), _PACKING)(same)
    assert (verdict.drop, verdict.untrained) == ("zero_advantage", {"zero_advantage": 8})
    assert make_judge(CreditConfig(), _PACKING)(spread).drop is None


def test_only_the_advantages_of_trained_tokens_count() -> None:
    def member(number: int, reward: float) -> Trajectory:
        turns = [turn(0, requested_at=0.0, untrainable="side_call"), turn(1, requested_at=2.0)]
        return trajectory(number, turns, [(reward, 1.0)])  # granted before the trainable turn was asked for

    found = make_judge(CreditConfig(baseline="loo_step"), _PACKING)(group([member(0, 1.0), member(1, 0.0)]))

    assert (found.drop, found.untrained) == ("zero_advantage", {"side_call": 4, "zero_advantage": 4})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (turn(1, requested_at=1.0, temperature=0.0), "sampling_law"),
        (turn(1, requested_at=1.0, prompt=range(70)), "too_long"),
        (turn(1, requested_at=1.0, untrainable="interrupted"), "interrupted"),
    ],
)
def test_a_turn_that_cannot_be_trained_is_counted_by_its_reason(bad: object, reason: str) -> None:
    first = trajectory(0, [turn(0, requested_at=0.0), bad], [(1.0, 5.0)])  # type: ignore[list-item]

    found = assign_credit(group([first, _member(1, 0.0)]), CreditConfig(), _PACKING)

    assert found.untrained == {reason: 2}
    assert len(found.samples) == 3


def test_a_log_probability_that_is_no_number_is_never_trained() -> None:
    broken = turn(0, requested_at=0.0)
    broken.completion.logprobs[0] = np.nan

    found = assign_credit(group([trajectory(0, [broken], [(1.0, 1.0)]), _member(1, 0.0)]), CreditConfig(), _PACKING)

    assert found.untrained == {"invalid_logprob": 2}


def test_a_group_without_trainable_tokens_is_dropped_under_its_own_name() -> None:
    members = [trajectory(n, [turn(0, requested_at=0.0, untrainable="x")], [(n, 1.0)]) for n in range(2)]

    assert assign_credit(group(members), CreditConfig(), _PACKING).drop == "nothing_trainable"


def test_the_control_hands_the_same_advantages_to_other_trajectories() -> None:
    members = [_member(n, float(n * n), turns=1) for n in range(8)]
    plain = assign_credit(group(members, index=3), CreditConfig(), _PACKING)
    shuffled = assign_credit(group(members, index=3), CreditConfig(shuffle_advantages=True), _PACKING)
    again = assign_credit(group(members, index=3), CreditConfig(shuffle_advantages=True), _PACKING)
    other = assign_credit(group(members, index=4), CreditConfig(shuffle_advantages=True), _PACKING)

    values = [[one.advantage for one in found.samples] for found in (plain, shuffled, again, other)]
    assert values[0] != values[1]
    assert sorted(values[0]) == pytest.approx(sorted(values[1]))
    assert values[1] == values[2]
    assert values[1] != values[3]


def test_every_sampled_token_is_trained_or_has_a_reason() -> None:
    members = [
        _member(0, 1.0),
        trajectory(1, [turn(0, requested_at=0.0), turn(1, requested_at=1.0, untrainable="x")], []),
        trajectory(2, [turn(0, requested_at=0.0)], [], masked="y"),
    ]
    found = assign_credit(group(members), CreditConfig(), _PACKING)

    trained = sum(len(one.token_ids) for one in found.samples)
    assert trained + sum(found.untrained.values()) == group(members).sampled_tokens


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"credit\.gamma is 2"):
        CreditConfig(gamma=2.0)
