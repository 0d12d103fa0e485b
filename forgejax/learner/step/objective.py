"""What a micro-batch adds to the loss of its step, and to the figures that are reported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forgejax.learner.packing.batch import PackedBatch
from forgejax.learner.step.corrections import CORRECTIONS, bounded_ratio
from forgejax.learner.step.losses import LOSSES, LossConfig
from forgejax.learner.step.measure import Tally, tally_terms
from forgejax.models.moe import RouterLoad

Terms = tuple[Float[Array, "B M"], Float[Array, "B M"], RouterLoad | None]
"""Log-probability of each term, entropy of the distribution it was drawn from, and what the routers did."""


def sum_objective(
    terms: Terms, batch: PackedBatch, version: Int[Array, ""], config: LossConfig
) -> tuple[Float[Array, ""], Tally]:
    """The sum over the batch's terms of ``weight * correction * loss(term)``, and its figures.

    ``version`` is the policy version of the weights: log-probability gaps are measured on the terms it drew.
    """
    logp_BM, entropy_BM, router = terms
    advantage_BM, weight_BM, mask_BM = (
        jnp.asarray(x) for x in (batch.advantage_BM, batch.weight_BM, batch.term_mask_BM)
    )
    fixed_BM = jax.lax.stop_gradient(logp_BM)
    # Supervised tokens have no behaviour policy: their ratio is one.
    old_logp_BM = fixed_BM if config.name == "sft" else jnp.asarray(batch.old_logp_BM)
    loss_BM, clipped_BM = LOSSES[config.name](logp_BM, old_logp_BM, advantage_BM, config)
    log_ratio_BM = fixed_BM - old_logp_BM
    correct = CORRECTIONS[config.correction.name].factor
    factor_BM = correct(log_ratio_BM, advantage_BM, jnp.asarray(batch.term_sample_BM), mask_BM, config.correction)
    loss = jnp.where(mask_BM, weight_BM * factor_BM * loss_BM, 0.0).sum()
    fresh_BM = mask_BM & (jnp.asarray(batch.version_BM) == version) & (jnp.asarray(batch.oldest_version_BM) == version)
    counted = tally_terms(
        loss=jax.lax.stop_gradient(loss),
        logp=fixed_BM,
        old_logp=old_logp_BM,
        ratio=bounded_ratio(log_ratio_BM),
        entropy=entropy_BM,
        clipped=clipped_BM,
        mask=mask_BM,
        fresh=fresh_BM,
        router=router,
    )
    return loss, counted
