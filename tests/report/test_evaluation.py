import math

import numpy as np
import pytest

from forgejax.report.evaluation import find_failed_share, make_evaluation_row, sum_up_evaluation
from forgejax.types import Completion, FinishReason, SamplingLaw, StopReason, Task, Trajectory, Turn


def task(name: str, level: str) -> Task:
    return Task(id=name, family="sums", level=level, question="1 + 1?")


def episode(
    name: str, outcome: float, *, tools: int = 0, seconds: float = 1.0, queued_s: float = 0.0, masked: str | None = None
) -> Trajectory:
    law = SamplingLaw()
    completion = Completion(
        request_id="r",
        prompt_ids=np.array([1], np.int32),
        token_ids=np.array([2], np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        oldest_versions=np.zeros(1, np.int32),
        finish_reason=FinishReason.STOP,
        law=law,
        queued_s=queued_s,
    )
    turn = Turn(
        index=0,
        completion=completion,
        parent=None,
        requested_at=10.0,
        finished_at=11.0,
        requested_law=law,
        tool_calls=tools,
    )
    return Trajectory(
        task_id=name,
        session_id=f"s-{name}",
        member=0,
        turns=(turn,),
        rewards=(),
        outcome=outcome,
        started_at=10.0,
        finished_at=10.0 + seconds,
        stop_reason=StopReason.COMPLETED,
        masked=masked,
    )


def test_figures_are_by_level_and_overall() -> None:
    tasks = [task("a", "easy"), task("b", "easy"), task("c", "hard"), task("d", "hard")]
    result = sum_up_evaluation(
        [
            episode("a", 1.0, seconds=1.0),
            episode("b", 0.0, tools=2, seconds=4.0, queued_s=1.0),
            episode("c", 1.0, tools=1, seconds=7.0),
            episode("d", 1.0, tools=1, seconds=5.0),
        ],
        tasks,
    )
    easy, hard, overall = result.levels["easy"], result.levels["hard"], result.overall
    assert (easy.reward, easy.tool_use, easy.episode_s, easy.episodes) == (0.5, 0.5, 2.0, 2)
    assert (hard.reward, hard.tool_use, hard.episode_s, hard.reward_se) == (1.0, 1.0, 6.0, 0.0)
    assert (overall.reward, overall.tool_use, overall.episodes) == (0.75, 0.75, 4)
    # The sample standard deviation of 1, 0, 1, 1 is 0.5.
    assert overall.reward_se == pytest.approx(0.5 / math.sqrt(4))


def test_repeated_episodes_of_a_task_do_not_shrink_the_error() -> None:
    tasks = [task(name, "easy") for name in "abc"]
    outcomes = {"a": 1.0, "b": 0.0, "c": 0.5}
    once = sum_up_evaluation([episode(name, value) for name, value in outcomes.items()], tasks)
    often = sum_up_evaluation([episode(name, value) for name, value in outcomes.items() for _ in range(10)], tasks)
    assert often.overall.reward_se == pytest.approx(once.overall.reward_se)
    assert often.overall.reward == 0.5 and (often.overall.episodes, often.overall.tasks) == (30, 3)


def test_a_masked_episode_is_counted_and_in_no_mean() -> None:
    result = sum_up_evaluation(
        [episode("a", 1.0), episode("a", 0.0, seconds=900.0, masked="environment_failed")], [task("a", "easy")]
    )
    assert (result.overall.reward, result.overall.episodes, result.overall.masked) == (1.0, 1, 1)
    assert result.overall.episode_s == 1.0 and result.overall.reward_se is None


def test_a_level_without_episodes_has_no_figures() -> None:
    result = sum_up_evaluation([], [task("a", "hard")])
    assert result.levels["hard"].reward is None and result.overall.tool_use is None
    assert make_evaluation_row(result, step=3) == {"step": 3}


def test_an_episode_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'z' is not of this evaluation"):
        sum_up_evaluation([episode("z", 1.0)], [task("a", "easy")])


def test_the_row_of_an_evaluation_carries_the_names_of_the_curve() -> None:
    result = sum_up_evaluation([episode("a", 1.0), episode("b", 0.0, tools=1)], [task("a", "easy"), task("b", "hard")])
    assert make_evaluation_row(result, step=5) == {
        "step": 5,
        "eval/outcome": 0.5,
        "eval/outcome_se": pytest.approx(0.5),
        "eval/failed_share": 0.0,
        "eval/tools_easy": 0.0,
        "eval/tools_hard": 1.0,
    }


def test_the_failed_share_is_of_the_episodes_that_ended_by_themselves() -> None:
    assert find_failed_share({"completed": 2, "truncated": 1, "deadline": 1, "cancelled": 50}) == 0.25
    assert find_failed_share({"environment_failed": 1, "agent_failed": 1}) == 1.0
    assert find_failed_share({}) is None and find_failed_share({"cancelled": 3}) is None
