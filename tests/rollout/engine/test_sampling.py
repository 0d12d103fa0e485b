"""Tokens follow the law they are drawn from."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.rollout.engine.sampling import Laws
from forgejax.rollout.engine.sampling import draw_tokens as plain_draw
from forgejax.types import SamplingLaw

draw = jax.jit(plain_draw)


def _laws(count: int, law: SamplingLaw, seed: int = 0) -> Laws:
    keys = np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)
    return Laws(
        temperature_S=jnp.full(count, law.temperature, jnp.float32),
        top_p_S=jnp.full(count, law.top_p, jnp.float32),
        top_k_S=jnp.full(count, law.top_k, jnp.int32),
        min_p_S=jnp.full(count, law.min_p, jnp.float32),
        biased_SN=jnp.tile(jnp.array([id_ for id_, _ in law.logit_bias] + [-1], jnp.int32), (count, 1)),
        bias_SN=jnp.tile(jnp.array([bias for _, bias in law.logit_bias] + [0.0], jnp.float32), (count, 1)),
        key_S2=jnp.asarray(keys),
    )


def _frequencies(logits: np.ndarray, law: SamplingLaw, count: int = 40_000) -> np.ndarray:
    tokens, _ = draw(jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1)), _laws(count, law), jnp.arange(count))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def _chi_square(observed: np.ndarray, expected: np.ndarray, count: int = 40_000) -> float:
    kept = expected > 0
    return float(count * ((observed - expected)[kept] ** 2 / expected[kept]).sum())


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = np.random.default_rng(1).normal(size=37) * 2.0
    for temperature in (1.0, 0.5, 3.0):
        seen = _frequencies(logits, SamplingLaw(temperature=temperature))
        # 36 degrees of freedom: the 99.99 % quantile is 75.
        assert _chi_square(seen, _softmax(logits / temperature)) < 75


def test_top_k_draws_only_the_k_likeliest_in_proportion() -> None:
    logits = np.random.default_rng(2).normal(size=37)
    expected = _softmax(logits)
    expected[np.argsort(-expected)[5:]] = 0.0
    seen = _frequencies(logits, SamplingLaw(top_k=5))
    assert set(np.flatnonzero(seen)) == set(np.flatnonzero(expected))
    assert _chi_square(seen, expected / expected.sum()) < 24  # 4 degrees of freedom, 99.99 %


def test_top_p_draws_the_fewest_tokens_that_hold_the_mass() -> None:
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    seen = _frequencies(np.log(probabilities), SamplingLaw(top_p=0.65))
    assert set(np.flatnonzero(seen)) == {0, 1}
    assert abs(seen[0] - 4 / 7) < 0.012
    assert set(np.flatnonzero(_frequencies(np.log(probabilities), SamplingLaw(top_p=0.75)))) == {0, 1, 2}


def test_top_p_counts_mass_inside_the_top_k() -> None:
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    seen = _frequencies(np.log(probabilities), SamplingLaw(top_k=3, top_p=0.7))  # 0.4 + 0.3 of 0.9 is 0.78
    assert set(np.flatnonzero(seen)) == {0, 1}


def test_min_p_draws_what_is_likely_enough_beside_the_likeliest_and_in_the_top_k() -> None:
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    seen = _frequencies(np.log(probabilities), SamplingLaw(min_p=0.45))
    assert set(np.flatnonzero(seen)) == {0, 1, 2} and abs(seen[0] - 4 / 9) < 0.012
    assert set(np.flatnonzero(_frequencies(np.log(probabilities), SamplingLaw(min_p=0.1, top_k=2)))) == {0, 1}


def test_a_bias_is_part_of_the_law_and_of_its_logprobs() -> None:
    logits = np.random.default_rng(6).normal(size=37) * 2.0
    law = SamplingLaw(temperature=0.7, logit_bias=((3, 2.5), (11, -100.0), (36, 1.0)))
    biased = logits.copy()
    biased[[3, 11, 36]] += [2.5, -100.0, 1.0]
    expected = _softmax(biased / 0.7)
    tokens, logps = draw(
        jnp.tile(jnp.asarray(logits, jnp.float32)[None], (40_000, 1)), _laws(40_000, law), jnp.arange(40_000)
    )
    assert 11 not in tokens
    np.testing.assert_allclose(logps, np.log(expected)[tokens], atol=1e-5)
    likely = expected > 1e-4  # of what is rarer, chi square says nothing
    assert _chi_square((np.bincount(np.asarray(tokens), minlength=37) / 40_000)[likely], expected[likely]) < 75


def test_a_slot_without_a_bias_draws_the_same_bits_beside_one_with() -> None:
    logits = jnp.asarray(np.random.default_rng(7).normal(size=(8, 37)), jnp.float32)
    laws = _laws(8, SamplingLaw())
    biased = replace(laws, biased_SN=laws.biased_SN.at[0].set(5), bias_SN=laws.bias_SN.at[0].set(9.0))
    plain, beside = draw(logits, laws, jnp.arange(8)), draw(logits, biased, jnp.arange(8))
    for one, other in zip(plain, beside, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[1:].view(np.uint32), np.asarray(other)[1:].view(np.uint32))
    assert int(beside[0][0]) == 5


def test_the_logprob_is_that_of_the_whole_softmax_even_where_the_law_is_truncated() -> None:
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(6, 37)), jnp.float32)
    laws = replace(
        _laws(6, SamplingLaw()),
        temperature_S=jnp.array([1.0, 0.5, 0.0, 1.0, 1.0, 2.0]),
        top_p_S=jnp.array([1.0, 1.0, 1.0, 0.5, 1.0, 1.0]),
        top_k_S=jnp.array([0, 0, 0, 0, 3, 0]),
        min_p_S=jnp.array([0.0, 0.3, 0.0, 0.0, 0.0, 0.0]),
        key_S2=jnp.arange(12, dtype=jnp.uint32).reshape(6, 2),
    )
    tokens, logps = (np.asarray(x) for x in draw(logits, laws, jnp.arange(6)))
    for row, temperature in enumerate([1.0, 0.5, 1.0, 1.0, 1.0, 2.0]):
        expected = np.log(_softmax(np.asarray(logits[row], np.float64) / temperature))[tokens[row]]
        assert abs(logps[row] - expected) < 1e-5
    assert tokens[2] == int(np.argmax(logits[2]))


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = np.full(1000, -np.inf)
    logits[[0, 511, 999]] = 0.0
    seen = _frequencies(logits, SamplingLaw(), 9_000)
    assert set(np.flatnonzero(seen)) == {0, 511, 999}
    assert np.abs(seen[[0, 511, 999]] - 1 / 3).max() < 0.03


def test_rare_tokens_of_a_large_vocabulary_keep_their_share() -> None:
    logits = np.zeros(50_000)
    tokens, _ = draw(jnp.zeros((200, 50_000)), _laws(200, SamplingLaw()), jnp.arange(200))
    spread = np.asarray(tokens) / len(logits)
    assert abs(spread.mean() - 0.5) < 0.09 and len(np.unique(tokens)) > 190


def _pack(allowed_SV: np.ndarray) -> jax.Array:
    """Masks as the engine takes them."""
    S, V = allowed_SV.shape
    bits = np.zeros((S, -(-V // 32) * 32), np.uint8)
    bits[:, :V] = allowed_SV
    return jnp.asarray(np.packbits(bits, axis=1, bitorder="little").view(np.uint32))


def test_under_a_mask_the_law_is_that_of_the_allowed_tokens() -> None:
    random = np.random.default_rng(4)
    logits, allowed = random.normal(size=(37,)) * 2.0, random.random(37) < 0.3
    count = 40_000
    tokens, logps = draw(
        jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1)),
        _laws(count, SamplingLaw(temperature=0.7)),
        jnp.arange(count),
        _pack(np.tile(allowed, (count, 1))),
    )
    expected = np.where(allowed, np.exp(logits / 0.7), 0.0)
    expected /= expected.sum()
    # 37 tokens at most: the 99.99 % quantile of 36 degrees of freedom is 75.
    assert _chi_square(np.bincount(np.asarray(tokens), minlength=37) / count, expected) < 75
    np.testing.assert_allclose(logps, np.log(expected[tokens]), atol=1e-5)


def test_slots_that_may_draw_anything_draw_the_same_bits_beside_masked_ones() -> None:
    random = np.random.default_rng(5)
    logits = jnp.asarray(random.normal(size=(64, 1000)) * 3.0, jnp.float32)
    laws = replace(
        _laws(64, SamplingLaw()),
        temperature_S=jnp.asarray(random.choice([0.0, 0.5, 1.0, 2.0], 64), jnp.float32),
        top_p_S=jnp.asarray(random.choice([0.5, 1.0], 64), jnp.float32),
        top_k_S=jnp.asarray(random.choice([0, 5], 64), jnp.int32),
    )
    free = random.random(64) < 0.5
    allowed = free[:, None] | (random.random((64, 1000)) < 0.05)
    plain = [np.asarray(x) for x in draw(logits, laws, jnp.arange(64))]
    masked = [np.asarray(x) for x in draw(logits, laws, jnp.arange(64), _pack(allowed))]
    for one, other in zip(plain, masked, strict=True):
        np.testing.assert_array_equal(one[free].view(np.uint32), other[free].view(np.uint32))
    assert allowed[np.arange(64), masked[0]].all() and not allowed[np.arange(64), plain[0]].all()


def test_top_k_and_greedy_choose_among_the_allowed() -> None:
    logits = jnp.asarray([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]] * 200)
    allowed = np.tile(np.array([False, False, True, False, True, True]), (200, 1))
    for law, seen in ((SamplingLaw(top_k=2), {2, 4}), (SamplingLaw(temperature=0.0), {2})):
        tokens, logps = (np.asarray(x) for x in draw(logits, _laws(200, law), jnp.arange(200), _pack(allowed)))
        assert set(tokens) == seen
        assert abs(logps[tokens == 2][0] - np.log(_softmax(np.array([3.0, 1.0, 0.0]))[0])) < 1e-6
