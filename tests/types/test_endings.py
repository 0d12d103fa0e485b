"""EpisodeEnds: counts of how episodes ended, and the right culprit named."""

from typing import Any

import pytest

from forgejax.types import EpisodeEnds, Failure, StopReason
from tests.agents.fakes import make_trajectory


def endings(*groups: tuple[int, dict[str, Any]]) -> EpisodeEnds:
    return EpisodeEnds.of(make_trajectory(**(ANSWERED | fields)) for count, fields in groups for _ in range(count))


ANSWERED: dict[str, Any] = {"outcome": 0.0, "answer": "1"}
CRASH = {"stop_reason": StopReason.AGENT_FAILED, "answer": None, "error": "agent command 'a' ended with status 3"}
HANG = {"stop_reason": StopReason.DEADLINE, "answer": None, "error": "agent command 'a' did not end within 4 s"}


def test_endings_add_up_and_keep_the_last_failure() -> None:
    both = endings((3, CRASH), (1, {"answer": None})) + endings((2, HANG), (2, {"outcome": 0.5}))
    assert (both.episodes, both.failed, both.unanswered, both.outcomes) == (8, 5, 1, 1.0)
    assert both.reasons == {"agent_failed": 3, "completed": 3, "deadline": 2}
    error = "agent command 'a' did not end within 4 s"
    assert both.last_failure == Failure(task_id="t", reason="deadline", error=error)
    assert (both + endings((1, {}))).last_failure == both.last_failure


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            endings((31, CRASH), (1, HANG), (32, {})),
            "the agent or what it works in is at fault, not the tasks: of 64 episodes 32 failed (deadline 1, "
            "agent_failed 31). The last one, deadline on task t: agent command 'a' did not end within 4 s\nRun",
        ),
        (
            endings((3, {"stop_reason": StopReason.TRUNCATED, "answer": None}), (1, {})),
            "3 were cut off by their length",
        ),
        (endings((4, {"answer": None})), "of 4 episodes 4 ended in good order and without an answer: the agent has to"),
        (endings((4, {})), "all too hard for the policy (mean outcome 0.00 of 4 answers)"),
        (endings((4, {"outcome": 1.0})), "all too easy for the policy (mean outcome 1.00 of 4 answers)"),
        (
            endings((6, {}), (2, CRASH)),
            "too hard for the policy (mean outcome 0.00 of 6 answers): mix in other levels, ",
        ),
        (
            endings((6, {}), (2, CRASH)),
            "of 8 episodes 2 failed (agent_failed 2). The last one, agent_failed on task t: agent comm",
        ),
        (endings(), "none of 0 episodes failed"),
    ],
)
def test_who_is_at_fault_is_what_most_episodes_say(given: EpisodeEnds, said: str) -> None:
    assert said in given.explain()
