"""How episodes end, counted as they do: for the figures of a run, and for an alarm while it can still be helped."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from forgejax.types import EpisodeEnds, Failure, Purpose, StopReason, Trajectory

RECENT = 64
ENOUGH = 16  # episodes that must have ended before their share says anything
ALARM_SHARE = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EpisodeCounts:
    """Training episodes that have ended, by stop reason; and those of them that are masked, by the reason for it."""

    ended: Mapping[str, int]
    masked: Mapping[str, int]


class EpisodeTally:
    """Counts every episode that ends. Threads may share it.

    Once half of the recent ones failed, evaluation and training alike, ``on_alarm`` is told in a sentence that names
    the last failure; it is told again only after the share was below half of that in between.
    """

    def __init__(
        self, on_alarm: Callable[[str], None] = _log.warning, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_alarm, self._clock = on_alarm, clock
        self._lock = threading.Lock()
        self._ended: Counter[str] = Counter()
        self._masked: Counter[str] = Counter()
        self._recent: deque[EpisodeEnds] = deque(maxlen=RECENT)
        self._failures: dict[str, Failure] = {}
        self._alarmed = False
        self._running: dict[object, float] = {}  # since when
        self._played = 0

    @contextlib.contextmanager
    def watch_episode(self) -> Iterator[None]:
        """Inside, an episode is being played."""
        episode = object()
        with self._lock:
            self._running[episode] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._played += 1
                del self._running[episode]

    @property
    def played(self) -> int:
        """How many episodes have ended, of any purpose."""
        with self._lock:
            return self._played

    def describe_running(self) -> str:
        """The episodes that are being played, for people who wait for them."""
        with self._lock:
            if not self._running:
                return "no episode is running"
            oldest_s = self._clock() - min(self._running.values())
            return f"{len(self._running)} episodes are running, the oldest for {oldest_s:.0f} s"

    def observe(self, trajectory: Trajectory, purpose: Purpose) -> None:
        """An episode has ended. One that was cancelled says nothing of the agent and is only counted."""
        alarm = None
        with self._lock:
            if purpose == "train":
                self._ended[trajectory.stop_reason.value] += 1
                if trajectory.masked is not None:
                    self._masked[trajectory.masked] += 1
            if trajectory.stop_reason is not StopReason.CANCELLED:
                alarm = self._look(trajectory)
        if alarm is not None:
            self._on_alarm(alarm)

    def counts(self) -> EpisodeCounts:
        """All so far."""
        with self._lock:
            return EpisodeCounts(ended=dict(self._ended), masked=dict(self._masked))

    @property
    def failed_share(self) -> float | None:
        """The share of the recent episodes that failed; None before any has ended."""
        with self._lock:
            return self._share() if self._recent else None

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The last failure of each kind."""
        with self._lock:
            return tuple(self._failures.values())

    def _look(self, trajectory: Trajectory) -> str | None:
        """Takes the episode among the recent ones; the alarm where it is the one that raises it."""
        if trajectory.stop_reason.failed:
            failure = Failure.of(trajectory)
            self._failures[failure.reason] = failure
        self._recent.append(EpisodeEnds.of([trajectory]))
        share = self._share()
        if share < ALARM_SHARE / 2:
            self._alarmed = False
        if self._alarmed or share < ALARM_SHARE or len(self._recent) < ENOUGH:
            return None
        self._alarmed = True
        recent = sum(self._recent, EpisodeEnds(reasons={}))
        return f"ALARM: {recent.describe_failures()}\nThe run goes on; look at the agent, or stop it with Ctrl-C"

    def _share(self) -> float:
        return sum(ending.failed for ending in self._recent) / len(self._recent)
