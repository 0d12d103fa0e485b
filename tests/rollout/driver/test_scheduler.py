"""Laws of who gets which slot, and when."""

from __future__ import annotations

import numpy as np

from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.scheduler import Scheduler
from tests.rollout import tiny


def _jobs(count: int, sessions: str = "") -> list[Job]:
    return [
        Job(
            request=tiny.request(f"r{index}", [1], session_id=sessions[index : index + 1]),
            prompt_ids=np.array([1], np.int32),
            budget=1,
            on_draw=None,
            submitted_at=0.0,
        )
        for index in range(count)
    ]


def _always(_slot: int, _job: Job) -> bool:
    return True


def test_the_longest_waiting_job_gets_the_lowest_free_slot() -> None:
    scheduler, jobs = Scheduler(2), _jobs(4)
    assert scheduler.admit(_always) is None
    for job in jobs:
        scheduler.enqueue(job)
    assert [scheduler.admit(_always) for _ in range(3)] == [(0, jobs[0]), (1, jobs[1]), None]
    assert scheduler.release(0) is jobs[0] and list(scheduler.active) == [1]
    assert scheduler.admit(_always) == (0, jobs[2]) and scheduler.waiting == 1


def test_nobody_overtakes_a_job_that_waits_for_room() -> None:
    scheduler, jobs, asked = Scheduler(2), _jobs(2), []

    def has_room(slot: int, job: Job) -> bool:
        asked.append((slot, job.request.request_id))
        return job is jobs[1]

    for job in jobs:
        scheduler.enqueue(job)
    assert scheduler.admit(has_room) is None and scheduler.admit(has_room) is None
    assert asked == [(0, "r0"), (0, "r0")] and scheduler.waiting == 2 and not scheduler.active


def test_jobs_that_ended_leave_the_queue_and_the_others_keep_their_order() -> None:
    scheduler, jobs = Scheduler(4), _jobs(4)
    for job in jobs:
        scheduler.enqueue(job)
    assert scheduler.drop_waiting(lambda job: job in jobs[1:3]) == jobs[1:3]
    assert [scheduler.admit(_always) for _ in range(3)] == [(0, jobs[0]), (1, jobs[3]), None]


def test_sessions_take_turns() -> None:
    scheduler, jobs = Scheduler(6), _jobs(6, "aaabba")
    for job in jobs[:5]:
        scheduler.enqueue(job)
    first = [scheduler.admit(_always) for _ in range(3)]
    scheduler.enqueue(jobs[5])
    order = [found[1] for found in (*first, *(scheduler.admit(_always) for _ in range(3))) if found]
    assert order == [jobs[at] for at in (0, 3, 1, 4, 2, 5)]


def test_who_lost_a_slot_comes_first_and_of_several_the_oldest() -> None:
    scheduler, jobs = Scheduler(3), _jobs(4)
    for job in jobs:
        scheduler.enqueue(job)
    for _ in range(3):
        scheduler.admit(_always)
    assert [scheduler.preempt(slot) for slot in (2, 1)] == [jobs[2], jobs[1]] and scheduler.waiting == 3
    assert scheduler.drop_waiting(lambda job: job is jobs[3]) == [jobs[3]]
    assert [scheduler.admit(_always) for _ in range(3)] == [(1, jobs[1]), (2, jobs[2]), None]
    scheduler.clear()
    assert (scheduler.waiting, scheduler.active) == (0, {}) and scheduler.admit(_always) is None
