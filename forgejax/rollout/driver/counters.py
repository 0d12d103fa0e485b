"""What the driver counts. ``tokens_sampled`` is counted when a token is drawn, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from forgejax.types import Purpose


@dataclass(frozen=True, kw_only=True)
class DriverMetrics:
    """The driver's account at one moment; token mappings are by purpose.

    ``tokens_sampled`` = ``tokens_returned`` + ``tokens_cancelled`` + ``tokens_failed`` + those of the open requests.
    """

    healthy: bool
    version: int
    slots: int
    active: int
    waiting: int
    requests: int
    steps: int
    tokens_sampled: Mapping[str, int]
    tokens_returned: Mapping[str, int]
    tokens_cancelled: Mapping[str, int]
    tokens_failed: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int  # of the prompts' tokens
    carried_tokens: int  # of the cached ones, those behind keys and values of older weights
    computed_tokens: int  # by prefill, those of preempted requests again
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int  # of the drafted, those that were drawn
    checked_steps: int  # of ``steps``, those that checked drafts
    checked_s: float  # what they took, where it is known how long steps without drafts take
    unchecked_s: float  # what their tokens would have taken without drafts
    restarts: int
    pages: int  # of keys and values: all there are
    held_pages: int  # by requests
    kept_pages: int  # for later requests, held by none
    busy_s: float  # time the driver's thread was not idle

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens whose keys and values were not computed again."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def draft_hit_rate(self) -> float:
        """Share of drafted tokens that were drawn."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def draft_speedup(self) -> float:
        """How many times as fast the steps that checked drafts were as if they had not; 1 without any."""
        return self.unchecked_s / self.checked_s if self.checked_s else 1.0


class Counters:
    """The running account. Written by the driver's thread alone; a reader may be one token run behind."""

    def __init__(self) -> None:
        self.sampled, self.returned, self.cancelled, self.failed = (
            dict.fromkeys(get_args(Purpose), 0) for _ in range(4)
        )
        self.requests = self.steps = self.prompt_tokens = self.cached_tokens = self.computed_tokens = 0
        self.preemptions = self.restarts = self.held_pages = self.kept_pages = 0
        self.carried_tokens = self.drafted_tokens = self.accepted_tokens = self.checked_steps = 0
        self.busy_s = self.checked_s = self.unchecked_s = 0.0

    def take_snapshot(
        self, *, healthy: bool, version: int, slots: int, pages: int, active: int, waiting: int
    ) -> DriverMetrics:
        return DriverMetrics(
            healthy=healthy,
            version=version,
            slots=slots,
            active=active,
            waiting=waiting,
            requests=self.requests,
            steps=self.steps,
            tokens_sampled=dict(self.sampled),
            tokens_returned=dict(self.returned),
            tokens_cancelled=dict(self.cancelled),
            tokens_failed=dict(self.failed),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            carried_tokens=self.carried_tokens,
            computed_tokens=self.computed_tokens,
            preemptions=self.preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            checked_steps=self.checked_steps,
            checked_s=self.checked_s,
            unchecked_s=self.unchecked_s,
            restarts=self.restarts,
            pages=pages,
            held_pages=self.held_pages,
            kept_pages=self.kept_pages,
            busy_s=self.busy_s,
        )
