"""What a micro-batch adds to the loss of its step, and to the figures that are reported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forgejax.learner.packing.batch import PackedBatch
from forgejax.learner.step.corrections import CORRECTIONS
from forgejax.learner.step.losses import LOSSES, LossConfig, log_ratio
from forgejax.learner.step.measure import Tally, tally
from forgejax.models.moe import RouterLoad

Terms = tuple[Float[Array, "B M"], Float[Array, "B M"], RouterLoad | None]
"""Log-probability of each term, entropy of the distribution it was drawn from, and what the routers did."""


def objective(terms: Terms, batch: PackedBatch, version: jax.Array, config: LossConfig) -> tuple[jax.Array, Tally]:
    """The sum over the batch's terms of ``weight * correction * loss(term)``, and its figures.

    ``version`` is the policy version of the weights: log-probability gaps are measured on the terms it drew.
    """
    logp, entropy, router = terms
    advantage, weight, mask = (jnp.asarray(x) for x in (batch.advantage, batch.weight, batch.term_mask))
    fixed = jax.lax.stop_gradient(logp)
    # Supervised tokens have no behaviour policy: their ratio is one.
    old_logp = fixed if config.name == "sft" else jnp.asarray(batch.old_logp)
    term_loss, clipped = LOSSES[config.name](logp, old_logp, advantage, config)
    ratio = log_ratio(fixed, old_logp)
    correction = config.correction
    factor = CORRECTIONS[correction.name].factor(ratio, advantage, jnp.asarray(batch.term_sample), mask, correction)
    loss = jnp.where(mask, weight * factor * term_loss, 0.0).sum()
    fresh = mask & (jnp.asarray(batch.version) == version) & (jnp.asarray(batch.oldest_version) == version)
    counted = tally(
        loss=jax.lax.stop_gradient(loss),
        logp=fixed,
        old_logp=old_logp,
        ratio=jnp.exp(ratio),
        entropy=entropy,
        clipped=clipped,
        mask=mask,
        fresh=fresh,
        router=router,
    )
    return loss, counted
