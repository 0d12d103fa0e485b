"""Counted are programs, not calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from forgejax.run.compiles import Compiles


def test_a_new_shape_counts_once_and_a_known_one_not_at_all() -> None:
    twice = jax.jit(lambda x: x * 2 + 1)
    inputs = [jnp.zeros(n) for n in (11, 13, 11)]  # made before anything is counted
    compiles = Compiles()
    counts = []
    for x in inputs:
        twice(x)
        counts.append(compiles.count)
    compiles.close()
    twice(jnp.zeros(17))

    assert (counts, compiles.count) == ([1, 2, 2], 2)
