"""How a request ends: its caller is answered, its tokens enter the account, its record the request log. Once."""

from __future__ import annotations

import contextlib

from forgejax.errors import EngineError
from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.inbox import Inbox
from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.request_file import FAILED
from forgejax.rollout.driver.request_log import LoggedRequest, RequestLog
from forgejax.types import FinishReason


class Endings:
    """Each job passes through exactly one of these; a second call for the same job does nothing."""

    def __init__(self, inbox: Inbox, counters: Counters, request_log: RequestLog | None):
        self._inbox, self._counters, self._request_log = inbox, counters, request_log

    def settle(self, job: Job, reason: FinishReason, now: float) -> None:
        """Gives the caller what was drawn, unless it went away or its callback failed.

        Raises EngineError, and gives the caller the same, if it cannot be recorded: nothing unrecorded is returned.
        """
        if job.callback_error is not None:
            self.lose(job, f"its token callback raised {job.callback_error!r}")
            return
        if not self._inbox.claim(job):
            return
        wanted = job.future.set_running_or_notify_cancel()
        try:
            self._record(job, reason if wanted else FinishReason.CANCELLED)
        except EngineError as error:
            self._counters.failed[job.request.purpose] += job.drawn
            if wanted:
                job.future.set_exception(error)
            raise
        account = self._counters.returned if wanted else self._counters.cancelled
        account[job.request.purpose] += job.drawn
        if wanted:
            job.future.set_result(job.complete(reason, now))

    def lose(self, job: Job, why: str) -> None:
        """Gives the caller an EngineError; what was drawn counts as failed."""
        if not self._inbox.claim(job):
            return
        self._counters.failed[job.request.purpose] += job.drawn
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(EngineError(f"request {job.request.request_id}: {why}"))
        self._record(job, FAILED)

    def abandon(self, cause: str) -> None:
        """Refuses everything from now on and fails what is open."""
        self._lose_all(self._inbox.abandon(cause), cause)

    def lose_open(self, cause: str) -> None:
        """Fails what is open; what comes is accepted."""
        self._lose_all(self._inbox.clear(), cause)

    def _lose_all(self, jobs: list[Job], cause: str) -> None:
        for job in jobs:
            with contextlib.suppress(EngineError):  # the request log may be what failed
                self.lose(job, cause)

    def _record(self, job: Job, reason: str) -> None:
        if self._request_log is not None:
            self._request_log.append(
                LoggedRequest(
                    request_id=job.request.request_id,
                    session_id=job.request.session_id,
                    purpose=job.request.purpose,
                    owner=job.request.owner,
                    finish_reason=str(reason),
                    version=int(job.draws[-1].versions[-1]) if job.drawn else -1,
                    prompt_ids=job.prompt_ids,
                    sampled_ids=job.join_ids(),
                )
            )
