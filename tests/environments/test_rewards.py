"""Reward terms and the speed baseline."""

import pytest

from forgejax.environments import RewardConfig, SpeedBaseline
from forgejax.environments.rewards import compute_rewards
from forgejax.errors import ConfigError
from tests.agents.fakes import make_group, make_trajectory, make_turn


def test_the_outcome_is_granted_at_the_end_with_its_weight() -> None:
    (reward,) = compute_rewards(RewardConfig(outcome_weight=2.0), make_trajectory(make_turn(), outcome=0.5), None)
    assert (reward.kind, reward.value, reward.at) == ("outcome", 1.0, 10.0)


def test_no_reward_at_the_end_is_granted_before_the_last_turn_ended() -> None:
    (reward,) = compute_rewards(RewardConfig(), make_trajectory(make_turn(at=10.5), seconds=10.0), None)
    assert reward.at == 11.5


def test_each_malformed_tool_call_costs_alpha_at_the_end_of_its_turn() -> None:
    trajectory = make_trajectory(make_turn(0, at=1.0, malformed=2), make_turn(1, at=4.0))
    process, outcome = compute_rewards(RewardConfig(process_weight=0.25), trajectory, None)
    assert (process.kind, process.value, process.at) == ("process", -0.5, 2.0)
    assert outcome.value == 1.0


@pytest.mark.parametrize(("seconds", "expected"), [(5.0, 0.25), (10.0, 0.0), (15.0, -0.25), (40.0, -0.5), (0.0, 0.5)])
def test_speed_is_beta_times_the_clipped_saving_over_the_baseline(seconds: float, expected: float) -> None:
    granted = compute_rewards(RewardConfig(speed_weight=0.5), make_trajectory(make_turn(), seconds=seconds), 10.0)
    assert granted[-1].kind == "speed"
    assert granted[-1].value == pytest.approx(expected)


def test_time_queued_in_our_engine_is_not_the_agents() -> None:
    trajectory = make_trajectory(make_turn(queued_s=5.0), seconds=10.0)
    assert compute_rewards(RewardConfig(speed_weight=1.0), trajectory, 10.0)[-1].value == pytest.approx(0.5)


@pytest.mark.parametrize(("outcome", "baseline_s"), [(0.9, 10.0), (1.0, None)])
def test_there_is_no_speed_reward_without_success_or_baseline(outcome: float, baseline_s: float | None) -> None:
    granted = compute_rewards(RewardConfig(speed_weight=1.0), make_trajectory(make_turn(), outcome=outcome), baseline_s)
    assert [reward.kind for reward in granted] == ["outcome"]


def test_the_baseline_is_the_median_of_earlier_unmasked_successes_of_the_family() -> None:
    baseline = SpeedBaseline()
    assert baseline.read("sums") is None
    trajectories = [make_trajectory(make_turn(), seconds=seconds) for seconds in (4.0, 6.0, 100.0)]
    failures = [
        make_trajectory(make_turn(), outcome=0.0, seconds=1.0),
        make_trajectory(make_turn(), seconds=1.0, masked="agent_failed"),
    ]
    baseline.observe(make_group(*trajectories, *failures))
    assert baseline.read("sums") == 6.0
    assert baseline.read("products") is None


def test_the_baseline_forgets_what_lies_beyond_its_history() -> None:
    baseline = SpeedBaseline(history=2)
    for seconds in (100.0, 3.0, 5.0):
        baseline.observe(make_group(make_trajectory(make_turn(), seconds=seconds)))
    assert baseline.read("sums") == 4.0


@pytest.mark.parametrize("fields", [{"speed_weight": -1.0}, {"process_weight": float("nan")}, {"success_at": 0.0}])
def test_an_impossible_weight_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        RewardConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "most"),
    [({"speed_weight": 1.5}, 1), ({"speed_weight": 1.0, "success_at": 0.5}, 0.5), ({"outcome_weight": 0.0}, 0)],
)
def test_a_speed_weight_that_makes_a_slow_success_worse_than_a_failure_is_refused(
    fields: dict[str, float], most: float
) -> None:
    with pytest.raises(ConfigError, match=rf"a slow success could earn less .* set speed_weight to {most:g} at most"):
        RewardConfig(**({"speed_weight": 0.1} | fields))


@pytest.mark.parametrize("fields", [{"outcome_weight": 1.0}, {"outcome_weight": 3.0}, {"success_at": 0.25}])
def test_under_the_largest_speed_weight_the_slowest_success_earns_what_a_failure_does(fields: dict[str, float]) -> None:
    least = RewardConfig(**fields).outcome_weight * RewardConfig(**fields).success_at
    config = RewardConfig(**fields, speed_weight=least)
    slowest = make_trajectory(make_turn(), seconds=1e9, outcome=config.success_at)
    assert sum(reward.value for reward in compute_rewards(config, slowest, 1.0)) == 0.0
