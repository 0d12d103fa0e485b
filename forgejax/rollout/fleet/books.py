"""What one server process drew for the trainer, from what it says of itself, what arrived, and what its log holds."""

from __future__ import annotations

import threading
from collections.abc import Callable

from forgejax.rollout.fleet.base import EngineAccount
from forgejax.rollout.server.admin import StatusBody


class ServerBooks:
    """Of one process, from the moment the trainer heard of it. Any thread may call.

    The process counts what it draws; whether a completion was given is known here alone, for the last line of an answer
    may get lost, and the caller may go away.
    """

    def __init__(self, first: StatusBody):
        self._first, self.last = first, first
        self._lock = threading.Lock()
        self._given = 0
        self._broken: dict[str, int] = {}
        self._drawn: int | None = None  # in the end

    @property
    def instance(self) -> str:
        return self.last.instance

    def give(self, tokens: int) -> None:
        """A completion of so many tokens was handed to whoever asked."""
        with self._lock:
            self._given += tokens

    def break_off(self, request_id: str, tokens: int) -> None:
        """A request's answer broke off, after so many tokens."""
        with self._lock:
            self._broken[request_id] = tokens

    def close(self, logged: int | None, find: Callable[[str], bool]) -> None:
        """The process is no more. ``logged`` tokens are in its log, of all processes (None: out of reach), where
        ``find`` looks a request up. What it drew beyond the log and these books is known to nobody."""
        with self._lock:
            self._drawn = self._estimate(logged, find)

    def _estimate(self, logged: int | None, find: Callable[[str], bool]) -> int:
        seen = sum(tokens for name, tokens in self._broken.items() if not find(name))
        least = self._given if logged is None else logged - self._first.inherited
        return max(self.last.sampled - self._first.sampled, least + seen, self._given)

    def count(self, open_requests: int, *, reached: bool) -> EngineAccount:
        """Its account now; ``open_requests`` are those that wait for its answer here.

        Of a process that is not ``reached`` all that was not given counts as lost, until it is heard of again.
        """
        first, last = self._first, self.last
        prompts = {
            "prompt_tokens": last.prompt_tokens - first.prompt_tokens,
            "cached_tokens": last.cached_tokens - first.cached_tokens,
            "computed_tokens": last.computed_tokens - first.computed_tokens,
        }
        with self._lock:
            given = self._given
            drawn = self._estimate(None, lambda _: False) if self._drawn is None and not reached else self._drawn
            if drawn is not None:
                return EngineAccount(sampled=drawn, lost=drawn - given, **prompts)
        sampled, failed = last.sampled - first.sampled, last.failed - first.failed
        still_open = last.sampled - last.returned - last.cancelled - last.failed
        return EngineAccount(
            sampled=sampled,
            cancelled=max(0, sampled - failed - still_open - given),
            failed=failed,
            open=still_open,
            active=last.active,
            waiting=max(last.waiting, open_requests - last.active),
            **prompts,
        )
