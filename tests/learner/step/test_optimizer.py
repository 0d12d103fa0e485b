from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from forgejax.errors import ConfigError
from forgejax.learner.step.optimizer import OptimizerConfig, clip_gradients, make_optimizer, make_schedule


def test_the_rate_warms_up_and_then_stays_or_falls() -> None:
    constant = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=3))
    cosine = make_schedule(
        OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule="cosine", total_steps=13, final_fraction=0.2)
    )

    np.testing.assert_allclose([constant(n) for n in (0, 1, 2, 3, 100)], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose([cosine(n) for n in (0, 3, 8, 13, 50)], [0.25, 1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def test_matrices_decay_and_norms_do_not() -> None:
    params = nnx.State(
        {
            "w": nnx.Param(jnp.ones((2, 2)), logical_axes=("embed", "mlp")),
            "norm": nnx.Param(jnp.ones((2,)), logical_axes=("norm",)),
        }
    )
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)

    updates, _ = optimizer.update(zeros, optimizer.init(params), params)

    np.testing.assert_allclose(updates["w"][...], -0.05 * np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_allclose(updates["norm"][...], [0.0, 0.0])


def test_a_gradient_longer_than_the_limit_is_shortened_to_it_and_a_shorter_one_left() -> None:
    grads = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[0.0, 4.0]])}
    config = OptimizerConfig(max_grad_norm=1.0)

    np.testing.assert_allclose(clip_gradients(grads, jnp.asarray(5.0), config)["b"], [[0.0, 0.8]], rtol=1e-6)
    for longer in (5.0, 50.0):
        kept = clip_gradients(grads, jnp.asarray(5.0), OptimizerConfig(max_grad_norm=longer))
        np.testing.assert_array_equal(kept["b"], grads["b"])
    nothing = clip_gradients({"a": jnp.zeros(2)}, jnp.asarray(0.0), config)
    np.testing.assert_array_equal(nothing["a"], [0.0, 0.0])


def test_a_cosine_ends_with_the_run_unless_it_has_an_end_of_its_own() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine", final_fraction=0.25)

    for steps in (7, 20, 200):
        rates = [float(make_schedule(config.ending_at(steps))(step)) for step in range(steps + 1)]
        assert rates[2] == 1.0 and rates[-1] == 0.25 and rates[-2] > 0.25
    own = dataclasses.replace(config, total_steps=9)
    assert own.ending_at(200) == own
    assert config.ending_at(0).total_steps == 3  # nothing is trained, and that is no error
    with pytest.raises(ValueError, match="ending_at"):
        make_schedule(config)
    with pytest.raises(ConfigError, match="total_steps 2"):
        dataclasses.replace(config, total_steps=2)


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": math.nan}, {"learning_rate": math.inf}, {"weight_decay": math.nan}, {"eps": 0.0}]
)
def test_a_rate_that_would_ruin_the_weights_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be finite"):
        OptimizerConfig(**wrong)  # type: ignore[arg-type]
