"""Policy losses over single terms, one function each, of one signature.

A term is one trained token of one sample. Each loss takes the trainer's log-probability (differentiated), the one the
sampler recorded and the advantage, all [B, M], and gives the loss of each term and whether its ratio was clipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from forgejax.errors import ConfigError
from forgejax.learner.step.corrections import CORRECTIONS, CorrectionConfig, PerTerm, bounded_ratio

LossName = Literal["cispo", "reinforce", "ppo_clip", "sft"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss, and its clip range.

    ``eps_high`` bounds the ratio of CISPO at ``1 + eps_high``, ``eps_low`` at ``1 - eps_low`` from below; 1 is no lower
    clip. One below 1, with ``packing.loss_norm = "sample"``, is MiniMax-M1's remedy where failures grow longer than
    successes.
    """

    name: LossName = "cispo"
    eps_high: float = 4.0
    eps_low: float = 1.0
    ppo_low: float = 0.2
    ppo_high: float = 0.2
    correction: CorrectionConfig = dataclasses.field(default_factory=CorrectionConfig)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ConfigError(f"loss.name {self.name!r}: expected one of {', '.join(LOSSES)}")
        if not (self.eps_high > 0 and 0 < self.ppo_low < 1 and self.ppo_high > 0):
            raise ConfigError("loss.eps_high, loss.ppo_low and loss.ppo_high: expected positive, ppo_low below 1")
        if not 0 < self.eps_low <= 1:
            raise ConfigError(f"loss.eps_low is {self.eps_low}; expected more than 0, up to 1 for no lower clip")
        if self.name in ("cispo", "ppo_clip") and CORRECTIONS[self.correction.name].weighs:
            raise ConfigError(
                f"loss.correction {self.correction.name!r} multiplies by the ratio; loss {self.name!r} already does: "
                "use it with loss 'reinforce'"
            )
        if self.name == "sft" and self.correction.name != "none":
            raise ConfigError(f"loss.correction {self.correction.name!r}: loss 'sft' has no ratio to correct")


Loss = Callable[[PerTerm, PerTerm, PerTerm, LossConfig], tuple[PerTerm, Bool[Array, "B M"]]]


def cispo(
    logp_BM: PerTerm, old_logp_BM: PerTerm, advantage_BM: PerTerm, config: LossConfig
) -> tuple[PerTerm, Bool[Array, "B M"]]:
    """Clipped importance weights (MiniMax-M1, arXiv 2506.13585 eq. 4-5): ``-sg(clip(r, low, high)) * A * log pi``.

    The weight is clipped and never the gradient: every term keeps one. No KL term; the range is
    ``1 - eps_low`` to ``1 + eps_high``.
    """
    ratio_BM = jax.lax.stop_gradient(bounded_ratio(logp_BM - old_logp_BM))
    low, high = 1.0 - config.eps_low, 1.0 + config.eps_high
    clipped_BM = (ratio_BM > high) | (ratio_BM < low)
    return -jnp.clip(ratio_BM, low, high) * advantage_BM * logp_BM, clipped_BM


def reinforce(
    logp_BM: PerTerm, old_logp_BM: PerTerm, advantage_BM: PerTerm, config: LossConfig
) -> tuple[PerTerm, Bool[Array, "B M"]]:
    """``-A * log pi``, as if the samples were on-policy."""
    return -advantage_BM * logp_BM, jnp.zeros(logp_BM.shape, jnp.bool_)


def ppo_clip(
    logp_BM: PerTerm, old_logp_BM: PerTerm, advantage_BM: PerTerm, config: LossConfig
) -> tuple[PerTerm, Bool[Array, "B M"]]:
    """``-min(r * A, clip(r, 1 - ppo_low, 1 + ppo_high) * A)`` (PPO, arXiv 1707.06347 eq. 7); clipped terms lose their
    gradient."""
    ratio_BM = bounded_ratio(logp_BM - old_logp_BM)
    plain_BM = ratio_BM * advantage_BM
    bounded_BM = jnp.clip(ratio_BM, 1.0 - config.ppo_low, 1.0 + config.ppo_high) * advantage_BM
    return -jnp.minimum(plain_BM, bounded_BM), bounded_BM < plain_BM


def sft(
    logp_BM: PerTerm, old_logp_BM: PerTerm, advantage_BM: PerTerm, config: LossConfig
) -> tuple[PerTerm, Bool[Array, "B M"]]:
    """Cross-entropy of the given tokens, scaled by the advantage (1 for supervised samples)."""
    return -advantage_BM * logp_BM, jnp.zeros(logp_BM.shape, jnp.bool_)


LOSSES: dict[str, Loss] = {"cispo": cispo, "reinforce": reinforce, "ppo_clip": ppo_clip, "sft": sft}
