"""Laws of who gets which slot."""

from __future__ import annotations

import numpy as np

from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.scheduler import Scheduler
from tests.rollout import tiny


def _jobs(count: int) -> list[Job]:
    return [
        Job(
            request=tiny.request(f"r{index}", [1]),
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
    assert scheduler.admit(_always) is None and scheduler.rows == 0
    for job in jobs:
        scheduler.enqueue(job)
    assert [scheduler.admit(_always) for _ in range(3)] == [(0, jobs[0]), (1, jobs[1]), None]
    assert scheduler.release(0) is jobs[0] and scheduler.rows == 2
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
