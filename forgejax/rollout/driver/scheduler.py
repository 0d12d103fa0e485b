"""Open requests: who waits, and who decodes in which slot."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from forgejax.rollout.driver.job import Job


class Scheduler:
    """First come, first served over a fixed number of slots; the lowest free slot is taken first.

    Low slots are filled first because a decode step over the first few slots costs less than one over all.
    """

    def __init__(self, slots: int):
        self._waiting: deque[Job] = deque()
        self._free = list(range(slots))
        self.active: dict[int, Job] = {}

    def enqueue(self, job: Job) -> None:
        self._waiting.append(job)

    def admit(self, reserve: Callable[[int, Job], bool]) -> tuple[int, Job] | None:
        """Gives the longest-waiting job the lowest free slot, if ``reserve`` finds room for it there.

        None if there is no job, no slot or no room: nobody overtakes a job that waits for room.
        """
        if not self._waiting or not self._free or not reserve(self._free[0], self._waiting[0]):
            return None
        slot, job = heapq.heappop(self._free), self._waiting.popleft()
        self.active[slot] = job
        return slot, job

    def release(self, slot: int) -> Job:
        """Frees a slot and gives back the job that held it."""
        heapq.heappush(self._free, slot)
        return self.active.pop(slot)

    def drop_waiting(self, ended: Callable[[Job], bool]) -> list[Job]:
        """Takes the waiting jobs that have ended out of the queue."""
        kept: deque[Job] = deque()
        dropped: list[Job] = []
        for job in self._waiting:
            (dropped if ended(job) else kept).append(job)
        self._waiting = kept
        return dropped

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """How many of the first slots a decode step has to serve."""
        return max(self.active) + 1 if self.active else 0
