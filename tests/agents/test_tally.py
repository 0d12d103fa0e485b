"""The tally: every training episode is counted, and an alarm is raised once."""

from forgejax.agents import EpisodeTally
from forgejax.types import StopReason, Trajectory
from tests.agents.fakes import make_trajectory

GOOD = make_trajectory(answer="1")
CRASHED = make_trajectory(
    stop_reason=StopReason.AGENT_FAILED, masked="agent_failed", error="agent command 'a' ended with status 3"
)


def observe(tally: EpisodeTally, *trajectories: Trajectory) -> None:
    for trajectory in trajectories:
        tally.observe(trajectory, "train")


def test_training_episodes_are_counted_by_stop_reason_and_masked_ones_by_theirs() -> None:
    tally = EpisodeTally()
    observe(tally, GOOD, GOOD, CRASHED, make_trajectory(masked="no_turns"))
    tally.observe(CRASHED, "evaluation")
    tally.observe(make_trajectory(stop_reason=StopReason.CANCELLED, masked="cancelled"), "train")
    counts = tally.counts()
    assert counts.ended == {"completed": 3, "agent_failed": 1, "cancelled": 1}
    assert counts.masked == {"agent_failed": 1, "no_turns": 1, "cancelled": 1}
    assert tally.failed_share == 2 / 5


def test_half_of_the_recent_episodes_failing_is_an_alarm_that_is_raised_once() -> None:
    said: list[str] = []
    tally = EpisodeTally(said.append)
    observe(tally, *[CRASHED] * 15)
    assert said == []  # too few to say anything
    observe(tally, CRASHED)
    observe(tally, *[CRASHED] * 100)
    (alarm,) = said
    assert alarm == (
        "ALARM: of 16 episodes 16 failed (agent_failed 16). The last one, agent_failed on task t: agent command 'a' "
        "ended with status 3\nThe run goes on; look at the agent, or stop it with Ctrl-C"
    )


def test_an_alarm_is_raised_again_once_things_were_well_in_between() -> None:
    said: list[str] = []
    tally = EpisodeTally(said.append)
    observe(tally, *[CRASHED] * 16, *[GOOD] * 32, *[CRASHED] * 16)
    assert len(said) == 1  # 32 of 64 still, and never below a quarter
    observe(tally, *[GOOD] * 64, *[CRASHED] * 31)
    assert len(said) == 1
    observe(tally, CRASHED)
    assert len(said) == 2 and "of 64 episodes 32 failed" in said[1]


def test_the_last_failure_of_each_kind_is_kept() -> None:
    tally = EpisodeTally()
    observe(tally, CRASHED, make_trajectory(stop_reason=StopReason.DEADLINE, error="slow"), CRASHED, GOOD)
    assert {failure.reason: failure.error for failure in tally.failures} == {
        "agent_failed": "agent command 'a' ended with status 3",
        "deadline": "slow",
    }
    assert EpisodeTally().failures == () and EpisodeTally().failed_share is None


def test_it_tells_how_many_episodes_are_being_played_and_for_how_long() -> None:
    now = [100.0]
    tally = EpisodeTally(clock=lambda: now[0])
    assert tally.describe_running() == "no episode is running"
    with tally.watch_episode():
        now[0] += 41.0
        with tally.watch_episode():
            assert tally.describe_running() == "2 episodes are running, the oldest for 41 s"
    assert (tally.played, tally.describe_running()) == (2, "no episode is running")
