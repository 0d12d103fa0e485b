"""How far an outcome moved between two evaluations of the same tasks: a paired bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_DRAWS = 20_000
_COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Mean over ``tasks`` tasks of (after - before), and its 95 % interval from ``low`` to ``high``."""

    mean: float
    low: float
    high: float
    tasks: int


def measure_gain(before: Mapping[str, float], after: Mapping[str, float], seed: int = 0) -> Gain | None:
    """The gain over the tasks that both evaluations measured; None for fewer than two of them.

    Tasks are drawn with replacement, each with its own pair of means, and the interval is that between the percentiles
    (Efron & Tibshirani 1993, ch. 13). Samples of one task stay together: they are not independent.
    """
    shared = sorted(before.keys() & after.keys())
    if len(shared) < 2:
        return None
    moved = np.array([after[task] - before[task] for task in shared])
    rng = np.random.default_rng(seed)
    # How often each task is drawn is all that its mean needs to know.
    counts = rng.multinomial(len(moved), np.full(len(moved), 1 / len(moved)), size=_DRAWS)
    tail = 100 * (1 - _COVERAGE) / 2
    low, high = np.percentile(counts @ moved / len(moved), [tail, 100 - tail])
    return Gain(mean=float(moved.mean()), low=float(low), high=float(high), tasks=len(shared))
