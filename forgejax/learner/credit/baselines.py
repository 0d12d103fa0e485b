"""Baselines: returns of a group to advantages, one function each.

``loo`` and ``loo_step`` use only what the other trajectories did, and so leave the expected policy gradient as it is,
at ratio 1 and a constant normaliser (a normaliser that counts sampled tokens is itself not unbiased).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float64

PerTurn = Float64[np.ndarray, " _"]
"""One number for each turn of a trajectory; of how many, each trajectory has its own."""

Trained = Sequence[Bool[np.ndarray, " _"]]
"""Which turns of each trajectory are trained."""

Baseline = Callable[[Sequence[PerTurn], Float64[np.ndarray, " G"], Trained], list[PerTurn]]
"""Takes the returns-to-go of each of G >= 2 trajectories, their total returns and which turns are trained; gives
advantages."""


def loo(returns: Sequence[PerTurn], totals_G: Float64[np.ndarray, " G"], trained: Trained) -> list[PerTurn]:
    """Leave-one-out: minus the mean total return of the other trajectories (RLOO, arXiv 2402.14740)."""
    others_G = (totals_G.sum() - totals_G) / (len(totals_G) - 1)
    return [own - other for own, other in zip(returns, others_G, strict=True)]


def loo_step(returns: Sequence[PerTurn], totals_G: Float64[np.ndarray, " G"], trained: Trained) -> list[PerTurn]:
    """Leave-one-out by step: minus the others' mean return-to-go at the same step, 0 for those that have ended."""
    steps = max((len(own) for own in returns), default=0)
    padded = np.zeros((len(returns), steps))
    for row, own in zip(padded, returns, strict=True):
        row[: len(own)] = own
    others = (padded.sum(axis=0, keepdims=True) - padded) / (len(returns) - 1)
    return [own - other[: len(own)] for own, other in zip(returns, others, strict=True)]


def group(returns: Sequence[PerTurn], totals_G: Float64[np.ndarray, " G"], trained: Trained) -> list[PerTurn]:
    """The group's normalised return (MiniMax-M1, arXiv 2506.13585): biased, for comparison with published runs.

    ``(R - m) / (s + 1e-6)``: m is the mean total return, s² the mean over trajectories of the mean over their trained
    turns of ``(R - m)²``. With rewards at the end alone s is M1's population deviation of the totals. Their deviation
    would be nothing where totals agree and turns do not; of a trained turn of a trajectory that has n, this advantage
    is at most ``sqrt(G * n)``. A trajectory without trained turns counts by its total.
    """
    mean = (totals_G / len(totals_G)).sum()
    apart = [own - mean for own in returns]
    counted = [
        own[which] if which.any() else np.array([total - mean])
        for own, which, total in zip(apart, trained, totals_G, strict=True)
    ]
    largest = max(float(np.abs(own).max()) for own in counted) or 1.0  # taken out, lest squares overflow or vanish
    spread = largest * np.sqrt(np.mean([np.mean((own / largest) ** 2) for own in counted]))
    return [own / (spread + 1e-6) for own in apart]


BASELINES: dict[str, Baseline] = {"loo": loo, "loo_step": loo_step, "group": group}
