"""Corrections for a gap between trainer and sampler: multipliers of each term's loss, one function each.

Each takes the log-ratio of trainer to sampler [B, M] as it is, the advantages, which sample of its row a term belongs
to and which terms are real, and gives [B, M] factors through which no gradient flows. Ratios are bounded where they are
taken, log-ratios are not: a sum of bounded ones would be another sequence's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forgejax.errors import ConfigError

PerTerm = Float[Array, "B M"]
CorrectionName = Literal["none", "truncated", "masked_sequence", "masked_geometric", "icepop", "m1_mask"]


_LOG_RATIO_BOUND = 20.0


def bounded_ratio(log_ratio_BM: PerTerm) -> PerTerm:
    """Policy over behaviour probability, its logarithm clamped to ±20 so that it stays finite."""
    return jnp.exp(jnp.clip(log_ratio_BM, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Which correction, and the ratios between which a term or a sequence is kept."""

    name: CorrectionName = "none"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in CORRECTIONS:
            raise ConfigError(f"loss.correction.name {self.name!r}: expected one of {', '.join(CORRECTIONS)}")
        if not 0.0 <= self.low < 1.0 < self.high:
            raise ConfigError(f"loss.correction keeps ratios {self.low} to {self.high}; expected a range around 1")


def none(
    log_ratio_BM: PerTerm,
    advantage_BM: PerTerm,
    sample_BM: Int[Array, "B M"],
    mask_BM: Bool[Array, "B M"],
    config: CorrectionConfig,
) -> PerTerm:
    """No correction."""
    return jnp.ones_like(log_ratio_BM)


def truncated(
    log_ratio_BM: PerTerm,
    advantage_BM: PerTerm,
    sample_BM: Int[Array, "B M"],
    mask_BM: Bool[Array, "B M"],
    config: CorrectionConfig,
) -> PerTerm:
    """Truncated importance sampling: ``min(r, high)``."""
    return jnp.minimum(bounded_ratio(log_ratio_BM), config.high)


def masked_sequence(
    log_ratio_BM: PerTerm,
    advantage_BM: PerTerm,
    sample_BM: Int[Array, "B M"],
    mask_BM: Bool[Array, "B M"],
    config: CorrectionConfig,
) -> PerTerm:
    """Keeps the samples whose product of ratios lies in ``[low, high]``."""
    total_BM, _ = _by_sample(log_ratio_BM, sample_BM, mask_BM)
    return _inside(total_BM, config)


def masked_geometric(
    log_ratio_BM: PerTerm,
    advantage_BM: PerTerm,
    sample_BM: Int[Array, "B M"],
    mask_BM: Bool[Array, "B M"],
    config: CorrectionConfig,
) -> PerTerm:
    """Keeps the samples whose geometric mean of ratios lies in ``[low, high]``."""
    total_BM, count_BM = _by_sample(log_ratio_BM, sample_BM, mask_BM)
    return _inside(total_BM / jnp.maximum(count_BM, 1.0), config)


def icepop(
    log_ratio_BM: PerTerm,
    advantage_BM: PerTerm,
    sample_BM: Int[Array, "B M"],
    mask_BM: Bool[Array, "B M"],
    config: CorrectionConfig,
) -> PerTerm:
    """IcePop: the ratio where it lies in ``[low, high]``, else 0, token by token."""
    return bounded_ratio(log_ratio_BM) * _inside(log_ratio_BM, config)


def m1_mask(
    log_ratio_BM: PerTerm,
    advantage_BM: PerTerm,
    sample_BM: Int[Array, "B M"],
    mask_BM: Bool[Array, "B M"],
    config: CorrectionConfig,
) -> PerTerm:
    """MiniMax-M1 eq. 7: 0 where PPO's clip would stop the update (A > 0 and r > high, or A < 0 and r < low), else 1."""
    ratio_BM = bounded_ratio(log_ratio_BM)
    stopped_BM = ((advantage_BM > 0) & (ratio_BM > config.high)) | ((advantage_BM < 0) & (ratio_BM < config.low))
    return jnp.where(stopped_BM, 0.0, 1.0).astype(log_ratio_BM.dtype)


def _inside(log_value_BM: PerTerm, config: CorrectionConfig) -> PerTerm:
    low, high = jnp.log(config.low), jnp.log(config.high)
    return ((log_value_BM >= low) & (log_value_BM <= high)).astype(log_value_BM.dtype)


def _by_sample(
    log_ratio_BM: PerTerm, sample_BM: Int[Array, "B M"], mask_BM: Bool[Array, "B M"]
) -> tuple[PerTerm, PerTerm]:
    """For each term, the sum over its sample's terms and their count."""
    M = log_ratio_BM.shape[1]

    def row(values_M: jax.Array, ids_M: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_M, ids_M, num_segments=M)[ids_M]

    real_BM = mask_BM.astype(log_ratio_BM.dtype)
    return jax.vmap(row)(log_ratio_BM * real_BM, sample_BM), jax.vmap(row)(real_BM, sample_BM)


Correction = Callable[[PerTerm, PerTerm, Int[Array, "B M"], Bool[Array, "B M"], CorrectionConfig], PerTerm]


class CorrectionLaw(NamedTuple):
    """A correction, and whether it weighs terms by their ratio (else it only keeps or drops them)."""

    factor: Correction
    weighs: bool


CORRECTIONS: dict[str, CorrectionLaw] = {
    "none": CorrectionLaw(none, False),
    "truncated": CorrectionLaw(truncated, True),
    "masked_sequence": CorrectionLaw(masked_sequence, False),
    "masked_geometric": CorrectionLaw(masked_geometric, False),
    "icepop": CorrectionLaw(icepop, True),
    "m1_mask": CorrectionLaw(m1_mask, False),
}
