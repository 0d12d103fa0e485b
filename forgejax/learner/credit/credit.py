"""Credit: rewards with their times to an advantage for every turn of a group.

The return-to-go of turn k counts every reward granted after its request arrived. With parallel sub-agents that is a
superset of what the turn caused, which is safe; a subset would bias the gradient.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from forgejax.errors import ConfigError
from forgejax.learner.credit.baselines import BASELINES
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.samples import Sample, find_untrainable_reason, make_turn_sample
from forgejax.types import Group, Judge, Trajectory, Turn, Verdict

_NO_ADVANTAGE = 1e-8
_STREAM = 0x5B  # keeps the shuffle's random numbers apart from others seeded by a group index


@dataclasses.dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Discount per turn, baseline, and a control: ``shuffle_advantages`` hands them to the wrong trajectories.

    The shuffle permutes each group's advantages among its trajectories, seeded by the group's index. A run under it has
    the same updates in size and number and nothing to learn from.
    """

    gamma: float = 1.0
    baseline: Literal["loo", "loo_step", "group"] = "loo"
    shuffle_advantages: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ConfigError(f"credit.gamma is {self.gamma}; expected 0 to 1")
        if self.baseline not in BASELINES:
            raise ConfigError(f"credit.baseline {self.baseline!r}: expected one of {', '.join(BASELINES)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupCredit:
    """What of a group is trained. ``drop`` and ``untrained`` are those of ``types.Verdict``; a dropped group has no
    samples."""

    samples: tuple[Sample, ...]
    drop: str | None
    untrained: Mapping[str, int]


def make_judge(config: CreditConfig, packing: PackConfig) -> Judge:
    """Says of a finished group whether it is worth training, exactly as ``assign_credit`` would train it."""

    def verdict(group: Group) -> Verdict:
        found = assign_credit(group, config, packing)
        return Verdict(drop=found.drop, untrained=found.untrained)

    return verdict


def assign_credit(group: Group, config: CreditConfig, packing: PackConfig) -> GroupCredit:
    """The samples of a group with their advantages.

    Masked trajectories neither train nor enter a baseline. The group is dropped as ``too_few_members`` if fewer than 2
    others are left, as ``nothing_trainable`` if none of their tokens may be trained, and as ``zero_advantage`` iff the
    advantage of every trained token is within 1e-8 of 0: never by its total rewards.

    Args:
        group: a finished group.
        config: discount and baseline.
        packing: says which samples fit; longer ones are left out as ``too_long``.
    """
    members = [trajectory for trajectory in group.trajectories if trajectory.masked is None]
    untrained: Counter[str] = Counter()
    for trajectory in group.trajectories:
        if trajectory.masked is not None:
            untrained[trajectory.masked] += trajectory.sampled_tokens

    turns: list[tuple[Turn, int, int]] = []  # a trainable turn, its member, its step
    for member, trajectory in enumerate(members):
        for step, turn in enumerate(_in_order(trajectory)):
            reason = find_untrainable_reason(turn, packing)
            if reason is not None:
                untrained[reason] += len(turn.completion.token_ids)
            elif len(turn.completion.token_ids):
                turns.append((turn, member, step))

    drop = "too_few_members" if len(members) < 2 else None if turns else "nothing_trainable"
    samples: tuple[Sample, ...] = ()
    if drop is None:
        advantages = _advantages(group, members, {(member, step) for _, member, step in turns}, config)
        if all(abs(advantages[member][step]) <= _NO_ADVANTAGE for _, member, step in turns):
            drop = "zero_advantage"
        else:
            samples = tuple(make_turn_sample(turn, float(advantages[member][step])) for turn, member, step in turns)
    if drop is not None:
        untrained[drop] += sum(len(turn.completion.token_ids) for turn, _, _ in turns)
    return GroupCredit(samples=samples, drop=drop, untrained={k: n for k, n in untrained.items() if n})


def compute_returns(trajectory: Trajectory, gamma: float) -> tuple[NDArray[np.float64], float]:
    """The return-to-go of each turn, in order of request, and the total return of the episode.

    ``R_k = sum(gamma ** (p - k) * r)`` over the rewards granted at or after the request of turn k, where p is the last
    turn requested by the time of the reward. The total is that of turn 0, rewards granted before any request included.
    """
    requested = np.array([turn.requested_at for turn in _in_order(trajectory)], np.float64)
    granted = np.array([reward.at for reward in trajectory.rewards], np.float64)
    values = np.array([reward.value for reward in trajectory.rewards], np.float64)
    steps = np.maximum(np.searchsorted(requested, granted, side="right") - 1, 0)
    total = float((gamma**steps * values).sum())
    k = np.arange(len(requested))
    distance = steps[None, :] - k[:, None]
    counted = granted[None, :] >= requested[:, None]
    discounted = gamma ** np.maximum(distance, 0) * values[None, :]
    return np.where(counted, discounted, 0.0).sum(axis=1), total


def _in_order(trajectory: Trajectory) -> list[Turn]:
    return sorted(trajectory.turns, key=lambda turn: (turn.requested_at, turn.index))


def _advantages(
    group: Group, members: list[Trajectory], trained: set[tuple[int, int]], config: CreditConfig
) -> list[NDArray[np.float64]]:
    """One advantage for each turn of each member, in order of request; ``trained`` holds (member, step)."""
    found = [compute_returns(trajectory, config.gamma) for trajectory in members]
    returns, totals = [own for own, _ in found], np.array([total for _, total in found])
    marks = [np.array([(i, k) in trained for k in range(len(own))], np.bool_) for i, own in enumerate(returns)]
    advantages = BASELINES[config.baseline](returns, totals, marks)
    if not config.shuffle_advantages:
        return advantages
    rng = np.random.default_rng([_STREAM, group.dispatch.index])
    donors = [advantages[member] for member in rng.permutation(len(members))]
    return [_stretched(donor, len(own)) for donor, own in zip(donors, advantages, strict=True)]


def _stretched(donor: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """The donor's advantages over another number of steps: its last one stands for those it never reached."""
    return donor[np.minimum(np.arange(steps), len(donor) - 1)] if len(donor) else np.zeros(steps)
