"""What an environment may say of an episode."""

import math

import pytest

from forgejax.environments import Score
from forgejax.types import Reward


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"the outcome is {value}; expected a finite number"):
        Score(outcome=value)
    with pytest.raises(ValueError, match=rf"the process reward is {value}; expected a finite number"):
        Score(outcome=1.0, rewards=(Reward(kind="process", value=value, at=0.0),))
