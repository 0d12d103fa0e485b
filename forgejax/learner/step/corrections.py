"""Corrections for a gap between trainer and sampler: multipliers of each term's loss, one function each.

Each takes the log-ratio of trainer to sampler [B, M], the advantages, which sample of its row a term belongs to and
which terms are real, and gives [B, M] factors through which no gradient flows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forgejax.errors import ConfigError

Terms = Float[Array, "B M"]
CorrectionName = Literal["none", "truncated", "masked_sequence", "masked_geometric", "icepop", "m1_mask"]


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
    log_ratio: Terms, advantage: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"], config: CorrectionConfig
) -> Terms:
    """No correction."""
    return jnp.ones_like(log_ratio)


def truncated(
    log_ratio: Terms, advantage: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"], config: CorrectionConfig
) -> Terms:
    """Truncated importance sampling: ``min(r, high)``."""
    return jnp.minimum(jnp.exp(log_ratio), config.high)


def masked_sequence(
    log_ratio: Terms, advantage: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"], config: CorrectionConfig
) -> Terms:
    """Keeps the samples whose product of ratios lies in ``[low, high]``."""
    total, _ = _by_sample(log_ratio, sample, mask)
    return _inside(total, config)


def masked_geometric(
    log_ratio: Terms, advantage: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"], config: CorrectionConfig
) -> Terms:
    """Keeps the samples whose geometric mean of ratios lies in ``[low, high]``."""
    total, count = _by_sample(log_ratio, sample, mask)
    return _inside(total / jnp.maximum(count, 1.0), config)


def icepop(
    log_ratio: Terms, advantage: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"], config: CorrectionConfig
) -> Terms:
    """IcePop: the ratio where it lies in ``[low, high]``, else 0, token by token."""
    return jnp.exp(log_ratio) * _inside(log_ratio, config)


def m1_mask(
    log_ratio: Terms, advantage: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"], config: CorrectionConfig
) -> Terms:
    """MiniMax-M1 eq. 7: 0 where PPO's clip would stop the update (A > 0 and r > high, or A < 0 and r < low), else 1."""
    ratio = jnp.exp(log_ratio)
    stopped = ((advantage > 0) & (ratio > config.high)) | ((advantage < 0) & (ratio < config.low))
    return jnp.where(stopped, 0.0, 1.0).astype(log_ratio.dtype)


def _inside(log_value: Terms, config: CorrectionConfig) -> Terms:
    low, high = jnp.log(config.low), jnp.log(config.high)
    return ((log_value >= low) & (log_value <= high)).astype(log_value.dtype)


def _by_sample(log_ratio: Terms, sample: Int[Array, "B M"], mask: Bool[Array, "B M"]) -> tuple[Terms, Terms]:
    """For each term, the sum over its sample's terms and their count."""
    M = log_ratio.shape[1]

    def row(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, ids, num_segments=M)[ids]

    real = mask.astype(log_ratio.dtype)
    return jax.vmap(row)(log_ratio * real, sample), jax.vmap(row)(real, sample)


Correction = Callable[[Terms, Terms, Int[Array, "B M"], Bool[Array, "B M"], CorrectionConfig], Terms]


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
