"""What an environment may say of an episode."""

import math

import numpy as np
import pytest

from forgejax.environments import Score
from forgejax.types import Reward


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"the outcome is {value}; expected a finite number"):
        Score(outcome=value)


def test_numbers_of_numpy_are_kept_as_floats() -> None:
    score = Score(outcome=np.float32(0.5), rewards=[Reward(kind="process", value=np.int64(1), at=np.float64(2))])
    assert (score.outcome, score.rewards) == (0.5, (Reward(kind="process", value=1.0, at=2.0),))
    assert {type(each) for each in (score.outcome, score.rewards[0].value, score.rewards[0].at)} == {float}
