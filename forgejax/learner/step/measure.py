"""What a step reports, summed over its micro-batches on the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from forgejax.models.moe import RouterLoad

_FIELDS = [
    "loss", "terms", "clipped", "ratio", "entropy", "gap_max", "gap_sum", "moments", "router",
]  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "mean_x", "mean_y", "square_x", "square_y", "product"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, means and centred second moments of pairs (x, y): they merge without cancellation."""

    count: Any
    mean_x: Any
    mean_y: Any
    square_x: Any
    square_y: Any
    product: Any

    @staticmethod
    def of(x: jax.Array, y: jax.Array, mask: jax.Array) -> Moments:
        real = mask.astype(x.dtype)
        count = real.sum()
        mean_x, mean_y = (x * real).sum() / jnp.maximum(count, 1), (y * real).sum() / jnp.maximum(count, 1)
        dx, dy = (x - mean_x) * real, (y - mean_y) * real
        return Moments(
            count=count,
            mean_x=mean_x,
            mean_y=mean_y,
            square_x=(dx * dx).sum(),
            square_y=(dy * dy).sum(),
            product=(dx * dy).sum(),
        )

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets (Chan et al. 1979)."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        cross = self.count * share
        return Moments(
            count=count,
            mean_x=self.mean_x + dx * share,
            mean_y=self.mean_y + dy * share,
            square_x=self.square_x + other.square_x + dx * dx * cross,
            square_y=self.square_y + other.square_y + dy * dy * cross,
            product=self.product + other.product + dx * dy * cross,
        )

    def correlation(self) -> jax.Array:
        """Pearson's; NaN where fewer than two pairs differ."""
        return self.product / jnp.sqrt(self.square_x * self.square_y)


@functools.partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """Sums over terms; ``moments`` and the gaps cover the terms drawn by the very weights that are trained."""

    loss: Any
    terms: Any
    clipped: Any
    ratio: Any
    entropy: Any
    gap_max: Any
    gap_sum: Any
    moments: Any  # Moments
    router: Any  # a RouterLoad, or None without a mixture of experts

    def merge(self, other: Tally) -> Tally:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _FIELDS[:-2]}
        sums["gap_max"] = jnp.maximum(self.gap_max, other.gap_max)
        router = None if self.router is None else self.router.merge(other.router)
        return Tally(**sums, moments=self.moments.merge(other.moments), router=router)

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars. ``gap_*`` compare log-probabilities, ``probability_correlation`` probabilities (MiniMax-M1)."""
        terms = jnp.maximum(self.terms, 1)
        return ({} if self.router is None else self.router.metrics()) | {
            "loss": self.loss,
            "trained_terms": self.terms,
            "clip_fraction": self.clipped / terms,
            "ratio_mean": self.ratio / terms,
            "entropy": self.entropy / terms,
            "gap_max": self.gap_max,
            "gap_sum": self.gap_sum,
            "gap_tokens": self.moments.count,
            "probability_correlation": self.moments.correlation(),
        }


def tally_terms(
    *,
    loss: jax.Array,
    logp: jax.Array,
    old_logp: jax.Array,
    ratio: jax.Array,
    entropy: jax.Array,
    clipped: jax.Array,
    mask: jax.Array,
    fresh: jax.Array,
    router: RouterLoad | None,
) -> Tally:
    """One micro-batch: arrays [B, M]; ``mask`` marks real terms, ``fresh`` those that the trained weights drew."""
    gap = jnp.where(fresh, jnp.abs(logp - old_logp), 0.0)
    return Tally(
        loss=loss,
        terms=mask.sum(dtype=jnp.int32),
        clipped=(clipped & mask).sum(dtype=jnp.int32),
        ratio=jnp.where(mask, ratio, 0.0).sum(),
        entropy=jnp.where(mask, entropy, 0.0).sum(),
        gap_max=gap.max(),
        gap_sum=gap.sum(),
        moments=Moments.of(jnp.exp(logp), jnp.exp(old_logp), fresh),
        router=router,
    )
