"""The optimizer: AdamW with FP32 moments, global-norm clipping and a learning-rate schedule (MiniMax-M1 §3.2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from forgejax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The rate rises linearly over ``warmup_steps``, then stays or falls as a cosine until ``total_steps``.

    ``total_steps`` of 0 are those of the run, whatever their number.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    total_steps: int = 0
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        finite = 0 <= self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and 0 < self.eps < math.inf
        if not (finite and self.max_grad_norm > 0):
            raise ConfigError(
                "optimizer.learning_rate and weight_decay must be finite and not negative, eps finite and positive, "
                "max_grad_norm positive"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 <= self.final_fraction <= 1):
            raise ConfigError("optimizer.b1 and b2: expected 0 up to but not 1; final_fraction: 0 to 1")
        if self.warmup_steps < 0 or self.total_steps < 0:
            raise ConfigError(
                f"optimizer.warmup_steps is {self.warmup_steps} and total_steps {self.total_steps}; expected counts"
            )
        if self.schedule == "cosine" and 0 < self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer.total_steps {self.total_steps}: a cosine schedule ends after its {self.warmup_steps} "
                "warm-up steps; leave it out for the steps of the run"
            )

    def ending_at(self, steps: int) -> OptimizerConfig:
        """The same with ``total_steps`` of a run of so many steps, unless it has its own."""
        return self if self.total_steps else dataclasses.replace(self, total_steps=max(steps, self.warmup_steps + 1))


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The rate of update 0, 1, 2, ...; warm-up starts above 0, so that no update is wasted.

    Raises ValueError for a cosine whose end nobody has set: see ``ending_at``.
    """
    peak = config.learning_rate
    if config.schedule == "cosine":
        if not config.total_steps:
            raise ValueError("a cosine schedule of 0 steps; give the steps of the run by OptimizerConfig.ending_at")
        decay_steps = config.total_steps - config.warmup_steps
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    first = peak / (config.warmup_steps + 1)
    return optax.join_schedules([optax.linear_schedule(first, peak, config.warmup_steps), after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW, for gradients that were clipped. Initialise it on FP32 parameters: the moments take their dtype."""
    return optax.adamw(
        make_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )


def clip_gradients(grads: Any, norm: jax.Array, config: OptimizerConfig) -> Any:
    """Gradients of global norm ``norm``, made shorter where that exceeds ``max_grad_norm``."""
    scale = jnp.minimum(1.0, config.max_grad_norm / norm)  # 1 for a norm of 0
    return optax.tree.scale(scale, grads)


def _decayed(params: Any) -> Any:
    """Matrices decay, norms and biases do not: every matrix reads from or writes to the ``embed`` axis."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return True
        return leaf.replace("embed" in leaf.get_metadata("logical_axes", ("embed",)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
