"""Open requests: who waits, and who has which slot."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable

from forgejax.rollout.driver.job import Job


class Scheduler:
    """Sessions take turns over a fixed number of slots; within a session, first come, first served.

    Who lost a slot to others comes before all who wait for their first. The lowest free slot is taken first, because a
    decode step over the first few slots costs less than one over all.
    """

    def __init__(self, slots: int):
        self._slots = slots
        self.clear()

    def clear(self) -> None:
        """Forgets every job."""
        self._preempted: deque[Job] = deque()
        self._sessions: OrderedDict[str, deque[Job]] = OrderedDict()  # the next to take a turn first
        self._free = list(range(self._slots))
        self.active: dict[int, Job] = {}

    def enqueue(self, job: Job) -> None:
        self._sessions.setdefault(job.request.session_id, deque()).append(job)

    def admit(self, reserve: Callable[[int, Job], bool]) -> tuple[int, Job] | None:
        """Gives the next waiting job the lowest free slot, if ``reserve`` finds room for it there.

        None if there is no job, no slot or no room: nobody overtakes a job that waits for room.
        """
        job = self._peek()
        if job is None or not self._free or not reserve(self._free[0], job):
            return None
        slot = heapq.heappop(self._free)
        self._take()
        self.active[slot] = job
        return slot, job

    def release(self, slot: int) -> Job:
        """Frees a slot and gives back the job that held it."""
        heapq.heappush(self._free, slot)
        return self.active.pop(slot)

    def preempt(self, slot: int) -> Job:
        """Frees a slot; the job that held it waits before all others."""
        job = self.release(slot)
        self._preempted.appendleft(job)
        return job

    def drop_waiting(self, ended: Callable[[Job], bool]) -> list[Job]:
        """Takes the waiting jobs that have ended out of the queue."""
        dropped: list[Job] = []
        for queue in (self._preempted, *self._sessions.values()):
            for job in [job for job in queue if ended(job)]:
                queue.remove(job)
                dropped.append(job)
        for session in [session for session, queue in self._sessions.items() if not queue]:
            del self._sessions[session]
        return dropped

    @property
    def waiting(self) -> int:
        return len(self._preempted) + sum(map(len, self._sessions.values()))

    def _peek(self) -> Job | None:
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._sessions.values()))[0] if self._sessions else None

    def _take(self) -> None:
        if self._preempted:
            self._preempted.popleft()
            return
        session, queue = next(iter(self._sessions.items()))
        queue.popleft()
        if queue:
            self._sessions.move_to_end(session)
        else:
            del self._sessions[session]
