"""The gap between trainer and sampler, counted by depth."""

from __future__ import annotations

import numpy as np
import pytest

from forgejax.learner import PackConfig, Sample, pack
from forgejax.learner.gap import GapFigures, count_by_depth, find_fresh


def drawn(name: str, old_logp: list[float], versions: list[int], oldest: list[int], depth: int = 1) -> Sample:
    """A sample with a context of ``depth`` tokens; the ids differ by name, so that nothing merges."""
    return Sample(
        request_id=name,
        context_ids=np.full(depth, ord(name), np.int32),
        token_ids=np.arange(len(old_logp), dtype=np.int32),
        old_logp=np.array(old_logp, np.float32),
        versions=np.array(versions, np.int32),
        oldest_versions=np.array(oldest, np.int32),
        advantage=1.0,
    )


def test_the_gap_is_measured_only_on_tokens_that_one_version_drew_and_saw() -> None:
    samples = [
        drawn("a", [-1.0, -2.0, -3.0], [4, 4, 4], [4, 4, 3]),  # the last saw keys of version 3
        drawn("b", [-1.5, -2.5], [3, 4], [3, 4]),  # the first was drawn by version 3
    ]
    packed = pack([samples], PackConfig(row_length=32, block_size=32, rows=1))
    scored = [np.asarray(batch.old_logp_BM) + np.float32(0.25) for batch in packed.batches]

    differences, depths = find_fresh(scored, packed, 4)
    assert differences.tolist() == [0.25] * 3 and sorted(depths.tolist()) == [1, 2, 2]
    assert find_fresh(scored, packed, 3)[0].tolist() == [0.25]
    assert find_fresh(scored, packed, 5)[0].size == 0


def test_depths_count_the_tokens_before_whatever_is_shared() -> None:
    samples = [drawn("a", [-1.0] * 3, [0] * 3, [0] * 3, depth=9), drawn("a", [-1.0] * 5, [0] * 5, [0] * 5, depth=9)]
    packed = pack([samples], PackConfig(row_length=32, block_size=32, rows=1))
    _, depths = find_fresh([np.asarray(part.batch.old_logp_BM) for part in packed.parts], packed, 0)
    assert sorted(depths.tolist()) == [9, 9, 10, 10, 11, 11, 12, 13]


def test_figures_add_up_by_depth_and_equal_those_of_all_tokens_at_once() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 10.0 ** rng.uniform(-6, -1, 4000))
    depths = rng.integers(1, 3000, 4000)
    figures: dict[str, GapFigures] = {}
    for part in range(4):
        figures = count_by_depth(figures, differences[part::4], depths[part::4])
    assert list(figures) == ["to_128", "to_1k", "to_8k"]
    bounds = {"to_128": (0, 128), "to_1k": (129, 1024), "to_8k": (1025, 8192)}
    for name, (low, high) in bounds.items():
        own = differences[(depths >= low) & (depths <= high)]
        ratios = np.exp(own)
        found = figures[name]
        assert found.tokens == own.size
        assert found.mean == pytest.approx(np.abs(own).mean())
        assert found.largest == np.abs(own).max()
        exact = np.quantile(np.abs(own), 0.99)
        assert exact <= found.p99 * 1.001 and found.p99 <= exact * 10**0.25
        assert found.ess == pytest.approx(ratios.sum() ** 2 / (own.size * (ratios**2).sum()))


def test_agreement_to_the_bit_has_figures_too() -> None:
    (found,) = count_by_depth({}, np.zeros(5, np.float32), np.full(5, 9)).values()
    assert (found.tokens, found.mean, found.p99, found.largest, found.ess) == (5, 0.0, 0.0, 0.0, 1.0)
    assert count_by_depth({}, np.zeros(0), np.zeros(0, np.int32)) == {}
