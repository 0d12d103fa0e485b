from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.errors import ConfigError
from forgejax.learner.step.corrections import CORRECTIONS, CorrectionConfig, CorrectionName
from forgejax.learner.step.losses import LOSSES, LossConfig, LossName


def _slopes(
    name: LossName, ratios: list[float], advantages: list[float], config: LossConfig | None = None
) -> tuple[np.ndarray, list[bool]]:
    """d loss / d log pi of each term, and which terms were clipped, at log pi = -1."""
    config = config or LossConfig(name=name)
    logp, advantage = jnp.full((1, len(ratios)), -1.0), jnp.asarray([advantages])
    old = logp - jnp.log(jnp.asarray([ratios]))
    grad = jax.grad(lambda x: LOSSES[name](x, old, advantage, config)[0].sum())(logp)
    return np.asarray(grad[0]), LOSSES[name](logp, old, advantage, config)[1][0].tolist()


def test_cispo_clips_the_weight_above_and_never_the_gradient() -> None:
    slopes, clipped = _slopes("cispo", [0.01, 1.0, 4.0, 6.0, 100.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0, -3.0])

    np.testing.assert_allclose(slopes, [-0.01, -1.0, -4.0, -5.0, -5.0, 6.0], rtol=1e-5)
    assert clipped == [False, False, False, True, True, False]


def test_a_ratio_beyond_e_to_the_20_stays_finite() -> None:
    logp, old = jnp.zeros((1, 2)), jnp.asarray([[-500.0, 500.0]])

    loss, _ = LOSSES["ppo_clip"](logp, old, -jnp.ones((1, 2)), LossConfig(name="ppo_clip"))

    np.testing.assert_allclose(loss, [[np.exp(20.0), 0.8]], rtol=1e-5)


def test_ppo_loses_the_gradient_of_clipped_terms() -> None:
    slopes, clipped = _slopes("ppo_clip", [1.0, 1.5, 0.5, 1.5, 0.5], [1.0, 1.0, 1.0, -1.0, -1.0])

    np.testing.assert_allclose(slopes, [-1.0, 0.0, -0.5, 1.5, 0.0], rtol=1e-5)
    assert clipped == [False, True, False, False, True]


@pytest.mark.parametrize("name", ["reinforce", "sft"])
def test_losses_without_a_ratio_ignore_it(name: LossName) -> None:
    slopes, _ = _slopes(name, [0.1, 1.0, 50.0], [1.0, -2.0, 3.0])

    np.testing.assert_allclose(slopes, [-1.0, 2.0, -3.0], rtol=1e-6)


def _factors(name: CorrectionName, ratios: list[float], advantages: list[float] | None = None) -> list[float]:
    """Two samples: the first three terms, and the two after; one padding term whose ratio is absurd."""
    log_ratio = jnp.log(jnp.asarray([[*ratios, 1e6]]))
    advantage = jnp.asarray([[*(advantages or [1.0] * len(ratios)), 0.0]])
    sample, mask = jnp.asarray([[0, 0, 0, 1, 1, 5]]), jnp.asarray([[True] * 5 + [False]])
    config = CorrectionConfig(name=name, low=0.5, high=2.0)
    factor = CORRECTIONS[name].factor(log_ratio, advantage, sample, mask, config)
    return [round(float(x), 4) for x in factor[0, :5]]


def test_each_correction_by_hand() -> None:
    ratios = [0.4, 1.5, 2.5, 1.9, 1.8]

    assert _factors("none", ratios) == [1, 1, 1, 1, 1]
    assert _factors("truncated", ratios) == [0.4, 1.5, 2.0, 1.9, 1.8]
    assert _factors("icepop", ratios) == [0, 1.5, 0, 1.9, 1.8]
    assert _factors("masked_sequence", ratios) == [1, 1, 1, 0, 0]  # products 1.5 and 3.42
    assert _factors("masked_geometric", ratios) == [1, 1, 1, 1, 1]  # means 1.14 and 1.85
    assert _factors("masked_geometric", [3.0, 3.0, 3.0, 0.4, 0.4]) == [0, 0, 0, 0, 0]
    assert _factors("m1_mask", ratios, [-1, -1, 1, 1, -1]) == [0, 1, 0, 1, 1]
    assert _factors("m1_mask", ratios, [1, 1, -1, 1, -1]) == [1, 1, 1, 1, 1]


def test_a_sequence_is_judged_by_the_sum_of_its_log_ratios_as_they_are() -> None:
    """+30 and -30 are a product of 1, +30 and -20 one of e^10, though a ratio alone stops at e^20."""

    def kept(*log_ratios: float) -> list[float]:
        shape = (1, len(log_ratios))
        args = jnp.asarray([log_ratios]), jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.ones(shape, jnp.bool_)
        factor = CORRECTIONS["masked_sequence"].factor(*args, CorrectionConfig(name="masked_sequence"))
        return [float(x) for x in factor[0]]

    assert kept(30.0, -30.0) == [1, 1]
    assert kept(30.0, -20.0) == [0, 0]
    assert kept(-30.0, 30.4, -0.1) == [1, 1, 1]
    assert kept(25.0, -20.0, -4.0) == [0, 0, 0]


@pytest.mark.parametrize("correction", ["truncated", "icepop", "m1_mask"])
def test_a_correction_stays_finite_at_any_ratio(correction: CorrectionName) -> None:
    ratio = jnp.asarray([[500.0, -500.0, 0.0]])
    args = jnp.ones((1, 3)), jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), jnp.bool_)
    factor = CORRECTIONS[correction].factor(ratio, *args, CorrectionConfig(name=correction))
    assert np.isfinite(np.asarray(factor)).all()


def test_a_lower_clip_bounds_the_weight_from_below_and_keeps_the_gradient() -> None:
    config = LossConfig(eps_low=0.5, eps_high=1.0)
    slopes, clipped = _slopes("cispo", [0.1, 0.5, 1.5, 4.0], [1.0, 1.0, -1.0, -1.0], config)
    np.testing.assert_allclose(slopes, [-0.5, -0.5, 1.5, 2.0], rtol=1e-6)
    assert clipped == [True, False, False, True]
    with pytest.raises(ConfigError, match="eps_low"):
        LossConfig(eps_low=0.0)


@pytest.mark.parametrize("correction", ["truncated", "icepop"])
def test_a_correction_that_weighs_by_the_ratio_is_refused_where_the_loss_does(correction: CorrectionName) -> None:
    with pytest.raises(ConfigError, match="already does"):
        LossConfig(name="cispo", correction=CorrectionConfig(name=correction))
    LossConfig(name="reinforce", correction=CorrectionConfig(name=correction))


def test_truncated_importance_sampling_of_reinforce_is_cispo() -> None:
    slopes, _ = _slopes("cispo", [0.5, 3.0, 9.0], [1.0, 1.0, 1.0], LossConfig(eps_high=1.0))

    np.testing.assert_allclose(-slopes, _factors("truncated", [0.5, 3.0, 9.0, 1.0, 1.0])[:3], rtol=1e-5)
