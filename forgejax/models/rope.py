"""Rotary embeddings (arXiv 2104.09864) by explicit positions, whole or partial, with the scalings of open weights.

The pairing is half-split: number i of a rotated vector of size 2c turns together with number c + i. Frequencies are
constants, computed in float64; angles, cosines and sines are FP32 (FP64 for an FP64 policy).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from forgejax.errors import ConfigError

RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which numbers of a head turn, and how fast. The names of the scalings' keys are those of open weights.

    Attributes:
        theta: base of the frequencies, ``theta ** (-2 i / rotary_dim)``.
        rotary_dim: how many of a head's numbers turn, the first ones; the others pass through. 0: the whole head.
        scaling: how a longer context than the original one is reached. ``linear`` divides all frequencies by
            ``factor``; ``llama3`` divides the slow ones and blends (Llama 3.1); ``yarn`` as arXiv 2309.00071.
        factor: by how much the context grows.
        original_positions: the context length before scaling, for ``llama3`` and ``yarn``.
        low_freq_factor: ``llama3``: fewer turns than this within the original context are slow.
        high_freq_factor: ``llama3``: more turns than this are fast, and stay.
        beta_fast: ``yarn``: more turns than this within the original context are fast, and stay.
        beta_slow: ``yarn``: fewer turns than this are slow.
        attention_factor: ``yarn``: multiplies cosines and sines; 0 means ``0.1 ln(factor) + 1``.
        truncate: ``yarn``: the borders between fast and slow are whole indices.
    """

    theta: float = 10_000.0
    rotary_dim: int = 0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"policy.rope.{name} is {getattr(self, name)}; expected a positive number")
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            raise ConfigError(f"policy.rope.rotary_dim is {self.rotary_dim}; expected an even count, or 0 for all")
        if not 0.0 <= self.attention_factor < math.inf:
            raise ConfigError(
                f"policy.rope.attention_factor is {self.attention_factor}; expected a positive number, or 0 for its own"
            )
        if self.scaling in ("llama3", "yarn") and self.original_positions < 1:
            raise ConfigError(
                f"policy.rope.original_positions is {self.original_positions}; {self.scaling} scaling needs the "
                "context length that the weights were first trained with"
            )
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"policy.rope.low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                f"{self.high_freq_factor}"
            )
        if self.scaling == "yarn" and (self.beta_slow >= self.beta_fast or self.theta == 1.0):
            raise ConfigError(
                f"policy.rope: yarn scaling needs beta_slow {self.beta_slow} below beta_fast {self.beta_fast}, "
                f"and a theta that is not 1"
            )


class Rotation(NamedTuple):
    """Cosines and sines of a batch's positions, for half of the numbers that turn; the same for every head."""

    cos_BT1c: jax.Array
    sin_BT1c: jax.Array


def rotary_frequencies(config: RopeConfig, head_size: int) -> tuple[NDArray[np.float64], float]:
    """Radians per position of each turning pair, and the factor on cosines and sines."""
    size = config.rotary_dim or head_size
    frequency_c = config.theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if config.scaling == "linear":
        return frequency_c / config.factor, 1.0
    if config.scaling == "llama3":
        return _llama3(config, frequency_c), 1.0
    if config.scaling == "yarn":
        derived = 0.1 * math.log(config.factor) + 1.0 if config.factor > 1.0 else 1.0
        return _yarn(config, frequency_c, size), config.attention_factor or derived
    return frequency_c, 1.0


def _llama3(config: RopeConfig, frequency_c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blends from slowed to unslowed by how often a pair turns within the original context."""
    turns_c = config.original_positions * frequency_c / (2 * math.pi)
    kept_c = (turns_c - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    return _blended(config, frequency_c, np.clip(kept_c, 0.0, 1.0))


def _yarn(config: RopeConfig, frequency_c: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Blends along the index, between the pairs that turn ``beta_fast`` and ``beta_slow`` times (§3.2)."""

    def index_of(turns: float) -> float:
        return size * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    first, last = index_of(config.beta_fast), index_of(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001  # as the reference implementation does where both borders fall on one index
    return _blended(config, frequency_c, 1.0 - np.clip((np.arange(size // 2) - first) / width, 0.0, 1.0))


def _blended(config: RopeConfig, frequency_c: NDArray[np.float64], kept_c: NDArray[np.float64]) -> NDArray[np.float64]:
    return kept_c * frequency_c + (1.0 - kept_c) * frequency_c / config.factor


def rotation_of(
    config: RopeConfig, head_size: int, positions_BT: Int[Array, "B T"], dtype: DTypeLike = jnp.float32
) -> Rotation:
    """The rotation at each position, in ``dtype`` or FP32, whichever is wider; the same in every layer."""
    real = jnp.promote_types(dtype, jnp.float32)
    frequency_c, factor = rotary_frequencies(config, head_size)
    angle_BT1c = positions_BT[:, :, None, None].astype(real) * jnp.asarray(frequency_c, real)[None, None, None]
    return Rotation(cos_BT1c=jnp.cos(angle_BT1c) * factor, sin_BT1c=jnp.sin(angle_BT1c) * factor)


def rotate(x_BTHC: Float[Array, "B T H C"], rotation: Rotation) -> Float[Array, "B T H C"]:
    """Turns the leading numbers of each head and passes the others through, in x's dtype."""
    cos, sin = rotation.cos_BT1c, rotation.sin_BT1c
    half = cos.shape[-1]
    wide = x_BTHC[..., : 2 * half].astype(cos.dtype)
    first, second = wide[..., :half], wide[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHC.dtype)
    return turned if 2 * half == x_BTHC.shape[-1] else jnp.concatenate([turned, x_BTHC[..., 2 * half :]], axis=-1)
