"""Whether the next step checks drafts or draws token by token: whichever gives more tokens a second, as measured."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.drafter import Drafter
from forgejax.rollout.driver.job import Job
from forgejax.rollout.engine.config import EngineConfig

_RETRY = 64  # steps with drafts that do not pay, after which one is checked all the same: times change


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """Steps of one kind take about the same time."""

    rows: int  # of the program
    masked: bool


class _Pace:
    """Seconds of a step, from the last few; the first one, which may have waited for a compiler, is left out."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=8)
        self._first = True

    def add(self, seconds: float) -> None:
        if not self._first:
            self._taken.append(seconds)
        self._first = False

    @property
    def seconds(self) -> float | None:
        return min(self._taken, default=None)


class Speculation:
    """The drafts of one engine's requests. Belongs to the driver's thread."""

    def __init__(self, config: EngineConfig, counters: Counters):
        self._config, self._counters = config, counters
        self._paces: dict[tuple[StepKind, bool], _Pace] = defaultdict(_Pace)
        self._drafters: dict[Job, Drafter] = {}
        self._refused = 0

    def propose(self, jobs: Mapping[int, Job], kind: StepKind) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """The drafts of all slots, as ``Slots.check`` takes them; None where a plain step is to be taken."""
        if not self._config.speculates:
            return None
        self._drafters = {job: self._drafters.get(job) or Drafter(job, self._config) for job in jobs.values()}
        found = {slot: draft for slot, job in jobs.items() if job.matcher is None and (draft := self._look_up(job))}
        if not found or not self._pays(jobs, found, kind):
            return None
        ids_SD = np.zeros((self._config.slots, self._config.draft_tokens), np.int32)
        count_S = np.zeros(self._config.slots, np.int32)
        for slot, draft in found.items():
            ids_SD[slot, : len(draft)], count_S[slot] = draft, len(draft)
        return ids_SD, count_S

    def count(self, job: Job, drafted: int, drawn: int) -> None:
        """Enters what a checked step drew for a job."""
        accepted = min(drawn - 1, drafted)
        self._drafters[job].count(drafted, accepted)
        self._counters.drafted_tokens += drafted
        self._counters.accepted_tokens += accepted

    def time(self, kind: StepKind, *, checked: bool, seconds: float, drawn: int, plain_tokens: int) -> None:
        """Enters how long a step took that drew so many tokens, where a plain one may draw ``plain_tokens``."""
        self._paces[kind, checked].add(seconds)
        plain = self._paces[kind, False].seconds
        if checked:
            self._counters.checked_steps += 1
            if plain is not None:
                self._counters.checked_s += seconds
                self._counters.unchecked_s += plain * drawn / plain_tokens

    def _look_up(self, job: Job) -> list[int]:
        return self._drafters[job].draft()

    def _pays(self, jobs: Mapping[int, Job], found: Mapping[int, list[int]], kind: StepKind) -> bool:
        """Also where it is not known yet how long steps take."""
        plain, checked = self._paces[kind, False].seconds, self._paces[kind, True].seconds
        if checked is None:
            return True
        if plain is None:
            return False
        drawn = len(jobs) + sum(self._drafters[jobs[slot]].share * len(draft) for slot, draft in found.items())
        if drawn * plain > count_plain_tokens(jobs, kind, self._config) * checked or self._refused >= _RETRY:
            self._refused = 0
            return True
        self._refused += 1
        return False


def count_plain_tokens(jobs: Mapping[int, Job], kind: StepKind, config: EngineConfig) -> int:
    """What a step without drafts draws, where nobody ends before the limit."""
    most = 1 if kind.masked else config.tokens_per_step
    return sum(min(most, job.budget - job.drawn) for job in jobs.values())
