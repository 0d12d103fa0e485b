"""The nouns: what they refuse, and the figures they derive."""

from typing import Any

import numpy as np
import pytest

from forgejax.types import Completion, FinishReason, Reward, SamplingLaw, StopReason, Trajectory, Turn


def turn(index: int, requested_at: float, queued_s: float) -> Turn:
    completion = Completion(
        request_id=f"r{index}",
        prompt_ids=np.ones(1, np.int32),
        token_ids=np.ones(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        oldest_versions=np.zeros(1, np.int32),
        finish_reason=FinishReason.STOP,
        law=SamplingLaw(),
        queued_s=queued_s,
    )
    return Turn(
        index=index,
        completion=completion,
        parent=None,
        requested_at=requested_at,
        finished_at=requested_at + queued_s,
        requested_law=SamplingLaw(),
    )


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(
        task_id="t",
        session_id="s",
        member=0,
        turns=turns,
        rewards=(),
        outcome=0.0,
        started_at=0.0,
        finished_at=10.0,
        stop_reason=StopReason.COMPLETED,
    )


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, None, "1", np.ones(2)])
def test_a_reward_whose_value_or_time_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"the process reward is .*; expected a finite number"):
        Reward(kind="process", value=value, at=0.0)
    with pytest.raises(ValueError, match=r"the time of the speed reward is .*; expected a finite number"):
        Reward(kind="speed", value=0.0, at=value)


@pytest.mark.parametrize("kind", ["style", "", None, ["process"]])
def test_a_reward_of_an_unknown_kind_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"the kind of a reward is .*; expected one of outcome, process, speed"):
        Reward(kind=kind, value=1.0, at=0.0)


def test_turns_that_queue_side_by_side_are_left_out_of_the_clock_once() -> None:
    parallel = trajectory(turn(0, 0.0, 5.0), turn(1, 1.0, 3.0), turn(2, 4.0, 2.0), turn(3, 8.0, 1.0))

    assert parallel.queued_s == pytest.approx(6.0 + 1.0)
    assert parallel.active_s == pytest.approx(3.0)


def test_turns_one_after_another_add_their_queueing() -> None:
    assert trajectory(turn(0, 0.0, 1.0), turn(1, 2.0, 1.5)).active_s == pytest.approx(7.5)


@pytest.mark.parametrize(
    "law", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}, {"logit_bias": ((3, -1.0),)}]
)
def test_a_law_that_is_not_the_whole_policy_cannot_be_trained(law: dict[str, Any]) -> None:
    assert not SamplingLaw(**law).trainable and SamplingLaw(temperature=0.7).trainable


@pytest.mark.parametrize(
    "law", [{"min_p": 1.1}, {"logit_bias": ((3, 1.0), (1, 1.0))}, {"logit_bias": ((3, float("nan")),)}]
)
def test_a_law_that_cannot_be_drawn_from_is_refused(law: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(law))):
        SamplingLaw(**law)
