"""What an environment may say of an episode."""

import math
from typing import cast

import numpy as np
import pytest

from forgejax.environments import Score
from forgejax.types import Reward


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"the outcome is {value}; expected a finite number"):
        Score(outcome=value)


def test_numbers_of_numpy_are_kept_as_floats() -> None:
    half, one, two = (cast(float, number) for number in (np.float32(0.5), np.int64(1), np.float64(2)))
    score = Score(outcome=half, rewards=cast(tuple[Reward], [Reward(kind="process", value=one, at=two)]))
    assert (score.outcome, score.rewards) == (0.5, (Reward(kind="process", value=1.0, at=2.0),))
    assert {type(each) for each in (score.outcome, score.rewards[0].value, score.rewards[0].at)} == {float}
