"""Figures of a step's groups."""

from dataclasses import replace

import pytest

from forgejax.report.figures import average_rates, measure_groups
from forgejax.types import Dispatch, FinishReason, StopReason
from tests.agents.fakes import make_group, make_trajectory, make_turn


def test_staleness_is_of_the_groups_and_replies_are_those_of_episodes_that_count() -> None:
    long = make_turn(1, tokens=40, finish=FinishReason.LENGTH)
    masked = make_trajectory(make_turn(tokens=999), stop_reason=StopReason.AGENT_FAILED, masked="agent_failed")
    groups = [
        replace(
            make_group(make_trajectory(make_turn(tokens=2), long), masked),
            dispatch=Dispatch(index=0, attempt=0, version=7),
        ),
        replace(make_group(make_trajectory(make_turn(tokens=3))), dispatch=Dispatch(index=1, attempt=0, version=4)),
    ]
    figures = measure_groups(groups, step=7)
    assert (figures["staleness/mean"], figures["staleness/max"]) == (1.5, 3)
    assert figures["reply/tokens"] == 15.0 and figures["reply/tokens_p95"] == 40
    assert figures["reply/cut_share"] == pytest.approx(1 / 3)
    assert figures["episode/tokens"] == 22.5


def test_branches_are_counted_by_reason_for_each_episode_that_counts() -> None:
    cut = [replace(make_turn(n), branch="sliding_window") for n in range(3)]
    figures = measure_groups([make_group(make_trajectory(*cut, make_turn(3)), make_trajectory(make_turn()))], step=0)
    assert {name: value for name, value in figures.items() if name.startswith("branches/")} == {
        "branches/sliding_window": 1.5
    }


def test_a_step_of_masked_episodes_alone_has_no_figures_of_episodes() -> None:
    assert measure_groups([make_group(make_trajectory(masked="deadline"))], step=0) == {}


def test_a_rate_over_several_steps_is_all_that_was_done_by_all_the_seconds() -> None:
    assert average_rates([(10.0, {"a": 0.0}), (0.01, {"a": 100_000.0, "b": 5.0})]) == {"a": 1000.0 / 10.01, "b": 5.0}
    assert average_rates([]) == {} and average_rates([(0.0, {"a": 1.0})]) == {}
