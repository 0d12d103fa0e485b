"""The sums of a run: what they count, and that they survive a checkpoint."""

import msgspec
import numpy as np
import pytest

from forgejax.learner import PackConfig, Sample, pack
from forgejax.run.tally import Tally, fresh_gaps


def drawn(name: str, old_logp: list[float], versions: list[int], oldest: list[int]) -> Sample:
    """A sample with a context of one token; the ids differ by name, so that nothing merges."""
    return Sample(
        request_id=name,
        context_ids=np.array([ord(name)], np.int32),
        token_ids=np.arange(len(old_logp), dtype=np.int32),
        old_logp=np.array(old_logp, np.float32),
        versions=np.array(versions, np.int32),
        oldest_versions=np.array(oldest, np.int32),
        advantage=1.0,
    )


def test_a_skipped_step_trains_nothing_and_a_sound_one_ends_the_row() -> None:
    tally = Tally()
    for skipped in (False, True, True):
        tally.count_step(terms=10, skipped=skipped)

    assert (tally.steps, tally.trained_tokens, tally.skipped_tokens) == (3, 10, 20)
    assert (tally.skipped_steps, tally.skipped_in_a_row) == (2, 2)
    tally.count_step(terms=5, skipped=False)
    assert (tally.trained_tokens, tally.skipped_steps, tally.skipped_in_a_row) == (15, 2, 0)


def test_gaps_add_up_over_calls_and_nothing_measured_is_no_mean() -> None:
    tally = Tally()
    assert (tally.gap_mean, tally.tree_token_ratio) == (None, None)
    tally.count_gaps(np.zeros(0))
    assert tally.gap_mean is None
    tally.count_gaps(np.array([0.5, 0.1]))
    tally.count_gaps(np.array([0.3]))

    assert (tally.gap_max, tally.gap_tokens) == (0.5, 3)
    assert tally.gap_mean == pytest.approx(0.3)


def test_it_comes_back_from_plain_data_as_it_was_and_refuses_anything_else() -> None:
    tally = Tally(steps=3, wall_s=1.5, trained_tokens=7, gap_max=1e-7, gap_sum=2e-7, gap_tokens=2)

    assert Tally.from_mapping(tally.to_mapping()) == tally
    with pytest.raises(msgspec.ValidationError):
        Tally.from_mapping({"steps": "three"})


def test_the_gap_is_measured_only_on_tokens_that_one_version_drew_and_saw() -> None:
    samples = [
        drawn("a", [-1.0, -2.0, -3.0], [4, 4, 4], [4, 4, 3]),  # the last saw keys of version 3
        drawn("b", [-1.5, -2.5], [3, 4], [3, 4]),  # the first was drawn by version 3
    ]
    packed = pack([samples], PackConfig(row_length=32, block_size=32, rows=1))
    scored = [np.asarray(batch.old_logp) + np.float32(0.25) for batch in packed.batches]

    assert fresh_gaps(scored, packed, 4).tolist() == [0.25] * 3
    assert fresh_gaps(scored, packed, 3).tolist() == [0.25]
    assert fresh_gaps(scored, packed, 5).size == 0
