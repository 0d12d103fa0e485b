"""Laws of rotary embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.errors import ConfigError
from forgejax.models.rope import RopeConfig, rotary_frequencies, rotate, rotation_of
from tests.models import reference

LLAMA31 = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_positions=8192)
YARN = RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_positions=32_768)
KINDS = [
    RopeConfig(theta=5e6, rotary_dim=64),
    RopeConfig(scaling="linear", factor=2.5),
    LLAMA31,
    RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_positions=512, high_freq_factor=2.0),
    YARN,
    RopeConfig(scaling="yarn", factor=8.0, original_positions=4096, truncate=False, attention_factor=1.25),
    RopeConfig(scaling="yarn", factor=40.0, original_positions=64, beta_fast=2.0, rotary_dim=32),
]


@pytest.mark.parametrize("rope", KINDS)
def test_frequencies_are_those_of_the_formula_written_out_pair_by_pair(rope: RopeConfig) -> None:
    ours, factor = rotary_frequencies(rope, 128)
    expected, expected_factor = reference.frequencies(rope, rope.rotary_dim or 128)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert factor == pytest.approx(expected_factor, rel=1e-14)


@pytest.mark.parametrize("rope", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_rotation_is_that_of_complex_numbers_in_both_precisions(rope: RopeConfig, dtype: str, bound: float) -> None:
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 3, 2, 128)).astype(dtype), np.array([[0, 1, 30], [7, 2, 64]], np.int32)
    with jax.enable_x64(dtype == "float64"):
        ours = rotate(jnp.asarray(x), rotation_of(rope, 128, jnp.asarray(positions), jnp.dtype(dtype)))
        assert ours.dtype == dtype
    for b, t, h in np.ndindex(2, 3, 2):
        expected = reference.rotate(x[b, t, h].astype(np.float64), int(positions[b, t]), rope)
        np.testing.assert_allclose(np.asarray(ours)[b, t, h], expected, rtol=0, atol=bound)


def test_numbers_beyond_the_rotary_ones_pass_through_untouched() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 16)), jnp.bfloat16)
    turned = rotate(x, rotation_of(RopeConfig(rotary_dim=6), 16, jnp.asarray([[3, 9]], jnp.int32)))
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    assert float(jnp.min(jnp.abs(turned[..., :6] - x[..., :6]).max(axis=-1))) > 0.1


def test_llama3_keeps_fast_pairs_and_slows_slow_ones_by_the_factor() -> None:
    plain = rotary_frequencies(RopeConfig(theta=500_000.0), 128)[0]
    ratio = plain / rotary_frequencies(LLAMA31, 128)[0]
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 2048], 1.0, rtol=1e-15)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8.0, rtol=1e-15)
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) >= 5 and np.all((between > 1) & (between < 8)) and np.all(np.diff(between) > 0)


def test_yarn_lengthens_cosines_and_sines_by_its_attention_factor() -> None:
    assert rotary_frequencies(YARN, 128)[1] == pytest.approx(1.1386294361119891, rel=1e-15)
    x = jnp.ones((1, 1, 1, 128))
    turned = rotate(x, rotation_of(YARN, 128, jnp.asarray([[5]], jnp.int32)))
    assert float(jnp.linalg.norm(turned) / jnp.linalg.norm(x)) == pytest.approx(1.1386294, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"theta": 0.0}, r"rope.theta is 0.0; expected a positive number"),
        ({"factor": float("nan")}, r"rope.factor is nan"),
        ({"rotary_dim": 5}, r"rotary_dim is 5; expected an even count"),
        ({"scaling": "llama3"}, r"original_positions is 0; llama3 scaling needs"),
        ({"scaling": "yarn"}, r"original_positions is 0; yarn scaling needs"),
        ({"scaling": "llama3", "original_positions": 8, "low_freq_factor": 4.0}, r"low_freq_factor 4.0 is not below"),
        ({"scaling": "yarn", "original_positions": 8, "beta_slow": 40.0}, r"beta_slow 40.0 below beta_fast 32.0"),
        ({"attention_factor": -1.0}, r"attention_factor is -1.0"),
    ],
)
def test_an_impossible_rotation_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RopeConfig(**changes)
