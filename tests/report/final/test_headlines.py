"""What a reader is told of a run in words."""

from forgejax.report.final.headlines import describe_repeatability
from tests.report.final.example import summary


def test_a_deterministic_run_tells_of_the_episodes_that_make_it_none() -> None:
    sound = {"completed": 70, "truncated": 6}
    assert describe_repeatability(summary()) == "no"
    assert describe_repeatability(summary(deterministic=True, episodes=sound, episodes_masked={})) == "yes"
    told = describe_repeatability(
        summary(deterministic=True, episodes=sound | {"deadline": 2}, episodes_masked={"deadline": 2, "worker_died": 1})
    )
    assert told == "yes, but for episodes that something else than the policy ended: deadline 2, worker_died 1"
