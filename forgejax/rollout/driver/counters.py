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
    computed_tokens: int  # by prefill, those of preempted requests again
    preemptions: int
    restarts: int
    pages: int  # of keys and values: all there are
    held_pages: int  # by requests
    kept_pages: int  # for later requests, held by none
    busy_s: float  # time the driver's thread was not idle

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens whose keys and values were not computed again."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Counters:
    """The running account. Written by the driver's thread alone; a reader may be one token run behind."""

    def __init__(self) -> None:
        self.sampled, self.returned, self.cancelled, self.failed = (
            dict.fromkeys(get_args(Purpose), 0) for _ in range(4)
        )
        self.requests = self.steps = self.prompt_tokens = self.cached_tokens = self.computed_tokens = 0
        self.preemptions = self.restarts = self.held_pages = self.kept_pages = 0
        self.busy_s = 0.0

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
            computed_tokens=self.computed_tokens,
            preemptions=self.preemptions,
            restarts=self.restarts,
            pages=pages,
            held_pages=self.held_pages,
            kept_pages=self.kept_pages,
            busy_s=self.busy_s,
        )
