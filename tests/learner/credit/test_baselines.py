"""Exact tests on an MDP small enough to enumerate: expectations, not samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgejax.learner.credit.baselines import PerTurn, group, loo, loo_step

Advantages = Callable[[Sequence[PerTurn], np.ndarray, Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class _Path:
    """One trajectory of the MDP: its probability, its score function at each step, its returns-to-go."""

    probability: float
    scores: np.ndarray  # [K, parameters]
    returns: np.ndarray  # [K]


def _paths() -> list[_Path]:
    """Two actions a step. Action 1 at a step ends the episode, with another reward each; three steps at most."""
    logits = np.array([0.3, -0.7, 1.1])
    end = 1 / (1 + np.exp(-logits))
    rewards = np.array([0.9, -0.4, 1.7])
    step_reward = 0.25
    found = []
    for length in (1, 2, 3, 4):
        stops = length <= 3
        steps = min(length, 3)
        chance, scores, gained = 1.0, np.zeros((steps, 3)), np.zeros(steps)
        for k in range(steps):
            last = stops and k == steps - 1
            chance *= end[k] if last else 1 - end[k]
            scores[k, k] = (1 - end[k]) if last else -end[k]
            gained[k] = rewards[k] if last else step_reward
        found.append(_Path(probability=chance, scores=scores, returns=gained[::-1].cumsum()[::-1]))
    assert sum(path.probability for path in found) == pytest.approx(1.0, abs=1e-15)
    return found


def _true_gradient() -> np.ndarray:
    return sum(path.probability * path.returns[0] * path.scores.sum(axis=0) for path in _paths())


def _expected_gradient(baseline: Advantages, size: int) -> np.ndarray:
    """The expectation of the group's gradient estimate over all groups of ``size`` trajectories, by step."""
    total = np.zeros(3)
    for members in itertools.product(_paths(), repeat=size):
        chance = np.prod([path.probability for path in members])
        totals = np.array([path.returns[0] for path in members])
        returns = [path.returns for path in members]
        advantages = baseline(returns, totals, _all_trained(returns))
        estimate = sum(a @ path.scores for a, path in zip(advantages, members, strict=True)) / size
        total += chance * estimate
    return total


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("baseline", [loo, loo_step])
def test_leave_one_out_leaves_the_expected_gradient_as_it_is(baseline: Advantages, size: int) -> None:
    np.testing.assert_allclose(_expected_gradient(baseline, size), _true_gradient(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_mean_that_counts_the_own_reward_shrinks_the_gradient_by_exactly_one_gth(size: int) -> None:
    def own_mean(returns: Sequence[PerTurn], totals: np.ndarray, trained: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [own - totals.mean() for own in returns]

    expected = (size - 1) / size * _true_gradient()
    np.testing.assert_allclose(_expected_gradient(own_mean, size), expected, rtol=1e-12, atol=1e-13)


def test_a_mean_over_those_still_alive_shrinks_each_step_by_another_factor() -> None:
    def alive_mean(returns: Sequence[PerTurn], totals: np.ndarray, trained: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            np.array([own[k] - np.mean([other[k] for other in returns if len(other) > k]) for k in range(len(own))])
            for own in returns
        ]

    factors = _expected_gradient(alive_mean, 3) / _true_gradient()
    assert factors[0] == pytest.approx(2 / 3, abs=1e-12)  # everyone is alive at the first step
    assert factors[0] - factors[1] > 0.05
    assert factors[1] - factors[2] > 0.05


def _all_trained(returns: Sequence[PerTurn]) -> list[np.ndarray]:
    return [np.ones(len(own), np.bool_) for own in returns]


def test_with_rewards_at_the_end_the_group_baseline_is_m1s() -> None:
    returns = [np.array([3.0, 3.0, 3.0]), np.array([1.0]), np.array([0.5, 0.5])]
    totals = np.array([3.0, 1.0, 0.5])

    found = group(returns, totals, _all_trained(returns))

    expected = (totals - totals.mean()) / (totals.std() + 1e-6)
    for own, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, value, rtol=1e-12)


def test_the_group_baseline_by_hand() -> None:
    returns, totals = [np.array([1.0, 2.0, 9.0]), np.array([2.0])], np.array([1.0, 2.0])
    trained = [np.array([True, True, False]), np.array([False])]

    first, second = group(returns, totals, trained)

    # around 1.5: the first's trained turns are 0.5 away, the second, which has none, by its total 0.5 as well
    np.testing.assert_allclose(first, [-1.0, 1.0, 15.0], rtol=1e-5)
    np.testing.assert_allclose(second, [1.0], rtol=1e-5)


_REWARDS = st.one_of(
    st.floats(-1e300, 1e300), st.sampled_from([0.0, 1.0, 0.1 + 0.2, 0.3, 1e-320, 1e9, 1e9 + 1e-7]), st.floats(-2, 2)
)


@given(st.lists(st.tuples(_REWARDS, st.lists(st.tuples(_REWARDS, st.booleans()), max_size=5)), min_size=2, max_size=6))
def test_advantages_of_trained_turns_stay_within_their_bound(
    members: list[tuple[float, list[tuple[float, bool]]]],
) -> None:
    returns = [np.array([value for value, _ in turns]) for _, turns in members]
    trained = [np.array([mark for _, mark in turns], np.bool_) for _, turns in members]

    found = group(returns, np.array([total for total, _ in members]), trained)

    for advantages, which in zip(found, trained, strict=True):
        bound = np.sqrt(len(members) * max(which.sum(), 1))
        assert np.all(np.abs(advantages[which]) <= bound * (1 + 1e-9))
