"""What the engine is asked for a request."""

from __future__ import annotations

from forgejax.gateway.sampling import derive_seed


def test_seeds_are_reproducible_and_differ_between_requests_and_sessions() -> None:
    seeds = [derive_seed(seed, number) for seed in range(30) for number in range(30)]
    assert len(set(seeds)) == 900 and derive_seed(3, 4) == seeds[94] and max(seeds) < 2**31
