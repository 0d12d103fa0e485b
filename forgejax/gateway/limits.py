"""What agents may ask for: how much at once, how often and how long; and what their sessions may keep."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from forgejax.chat.messages import ChatRequest
from forgejax.errors import ConfigError
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.refusals import RefusedError, refuse_overloaded

_log = logging.getLogger(__name__)
_SOON_S = 1.0  # until a request that is being answered may have ended
_LATER_S = 20.0  # until a session may have closed


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What one session may have, or all of them together.

    ``requests`` at once, those whose body still arrives included; ``requests_per_minute`` on the long run, after a
    burst of as many; ``arriving_bytes``: the bodies of the requests that are being answered; ``stored_bytes``: what is
    kept until a session closes, ids, log-probabilities and texts.
    """

    requests: int
    requests_per_minute: int
    arriving_bytes: int
    stored_bytes: int

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """``body_bytes``, ``messages`` and ``tools`` are what one request may have; ``session`` what each session may have,
    ``total`` all of them together."""

    body_bytes: int = 16 * 2**20
    messages: int = 10_000
    tools: int = 1_000
    session: BudgetConfig = field(
        default_factory=lambda: BudgetConfig(
            requests=256, requests_per_minute=6_000, arriving_bytes=256 * 2**20, stored_bytes=2**30
        )
    )
    total: BudgetConfig = field(
        default_factory=lambda: BudgetConfig(
            requests=8_192, requests_per_minute=600_000, arriving_bytes=2**30, stored_bytes=16 * 2**30
        )
    )

    def __post_init__(self) -> None:
        _check_counts(self)


class Budget:
    """What one party, a session or all of them, has at this moment. ``label`` names it in the log."""

    def __init__(self, config: BudgetConfig, label: str, clock: Callable[[], float]) -> None:
        self.config = config
        self._label = label
        self._clock = clock
        self._left = float(config.requests_per_minute)
        self._seen_at = clock()
        self._told: set[str] = set()
        self.requests = 0
        self.arriving_bytes = 0
        self.stored_bytes = 0

    def wait_s(self) -> float:
        """Seconds until the rate allows another request."""
        now, per_s = self._clock(), self.config.requests_per_minute / 60.0
        self._left = min(self.config.requests_per_minute, self._left + (now - self._seen_at) * per_s)
        self._seen_at = now
        return max(0.0, (1.0 - self._left) / per_s)

    def enter(self, body_bytes: int) -> None:
        self._left -= 1.0
        self.requests += 1
        self.arriving_bytes += body_bytes

    def leave(self, body_bytes: int) -> None:
        self.requests -= 1
        self.arriving_bytes -= body_bytes

    def find_exceeded(self, body_bytes: int) -> str | None:
        """The limit, other than the rate, that another request would exceed."""
        if self.requests >= self.config.requests:
            return "requests"
        if self.requests and self.arriving_bytes + body_bytes > self.config.arriving_bytes:
            return "arriving_bytes"
        return "stored_bytes" if self.stored_bytes >= self.config.stored_bytes else None

    def tell_once(self, limit: str) -> None:
        """The log has each limit of each party once: an agent that runs into one does so again and again."""
        if limit not in self._told:
            self._told.add(limit)
            _log.warning("%s: gateway.limits %s is reached", self._label, limit)


class Limits:
    """Holds every session to its budget and all of them to theirs. Belongs to the gateway's event loop."""

    def __init__(
        self, config: LimitsConfig, metrics: GatewayMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._total = Budget(config.total, "all sessions", clock)

    def make_budget(self, label: str) -> Budget:
        """The budget of a session."""
        return Budget(self._config.session, label, self._clock)

    @contextmanager
    def admit(self, session: Budget, body_bytes: int) -> Iterator[None]:
        """Inside, a request counts. Raises RefusedError (429, 413 for a session that may store no more) where its
        session has no room for it, (503) where all have none."""
        for budget, scope in ((session, "session"), (self._total, "total")):
            wait_s = budget.wait_s()
            limit = "requests_per_minute" if wait_s > 0.0 else budget.find_exceeded(body_bytes)
            if limit is not None:
                self._metrics.limited.labels(f"{scope}_{limit}").inc()
                budget.tell_once(f"{scope}.{limit}")
                raise _refuse_total(limit, wait_s) if budget is self._total else _refuse(budget, limit, wait_s)
        for budget in (session, self._total):
            budget.enter(body_bytes)
        try:
            yield
        finally:
            for budget in (session, self._total):
                budget.leave(body_bytes)

    def check_request(self, chat: ChatRequest) -> None:
        """Raises RefusedError (400) for more messages or tools than one request may have."""
        self._check_count("messages", "messages", len(chat.messages))
        self._check_count("tools", "tools", len(chat.tools))

    def check_body(self, body: Mapping[str, Any]) -> None:
        """The same, of a body before it is read, which takes long if there are very many."""
        for name, limit in (("messages", "messages"), ("input", "messages"), ("tools", "tools")):
            if isinstance(body.get(name), list):
                self._check_count(name, limit, len(body[name]))

    def _check_count(self, name: str, limit: str, count: int) -> None:
        most: int = getattr(self._config, limit)
        if count > most:
            self._metrics.limited.labels(limit).inc()
            message = f"{name} has {count} entries; send at most {most}, or raise gateway.limits.{limit}"
            raise RefusedError(400, message, code=f"too_many_{limit}", param=name)

    def store(self, session: Budget, added: int) -> None:
        """The session keeps so many bytes more until it is released."""
        session.stored_bytes += added
        self._total.stored_bytes += added

    def release(self, session: Budget) -> None:
        """The session keeps nothing any more."""
        self._total.stored_bytes -= session.stored_bytes
        session.stored_bytes = 0


def _refuse(budget: Budget, limit: str, wait_s: float) -> RefusedError:
    most = getattr(budget.config, limit)
    if limit == "requests_per_minute":
        message = f"Rate limit reached: this session may make {most} requests a minute. Please try again later."
        return RefusedError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
    if limit == "stored_bytes":
        message = (
            f"this session has stored {budget.stored_bytes} bytes of at most {most}; nothing more is answered in it"
        )
        return RefusedError(413, message, code="session_full")
    unit = "requests at once" if limit == "requests" else "bytes of requests at once"
    message = f"Rate limit reached: this session may have {most} {unit}. Please try again later."
    return RefusedError(429, message, code="rate_limit_exceeded", retry_after_s=_SOON_S)


def _refuse_total(limit: str, wait_s: float) -> RefusedError:
    return refuse_overloaded("the gateway", max(wait_s, _LATER_S if limit == "stored_bytes" else _SOON_S))


def _check_counts(config: BudgetConfig | LimitsConfig) -> None:
    for each in fields(config):
        given = getattr(config, each.name)
        if isinstance(given, int) and given < 1:
            raise ConfigError(f"gateway.limits {each.name} is {given}; give at least 1")
