"""One engine in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

from forgejax.rollout.driver.driver import Driver
from forgejax.rollout.driver.job import OnDraw
from forgejax.rollout.driver.request_log import RequestLog
from forgejax.rollout.fleet.archive import Archive, read_record
from forgejax.rollout.fleet.base import DrawnRequest, EngineAccount
from forgejax.types import Completion, OnTokens, SampleRequest


class LocalSampler:
    """``types.Sampler`` over a driver, for any event loop in any thread."""

    def __init__(self, driver: Driver):
        self._driver = driver

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``. ``on_tokens`` is called in the driver's thread.

        Cancelled while the driver is ending the request, it gives the completion all the same: it counts as given.
        """
        if request.grammar is not None:
            await self._driver.prepare(request)
        drawn = self._driver.submit(request, _adapt(on_tokens))
        try:
            return await asyncio.wrap_future(drawn)
        except asyncio.CancelledError:
            if drawn.cancelled():
                raise
            return await asyncio.wrap_future(drawn)


class LocalEngines(LocalSampler):
    """``Engines`` over one driver, its request log, and the logs of engines that the run had before. Leaving it closes
    the logs."""

    def __init__(self, driver: Driver, requests: RequestLog, former: Archive | None = None):
        super().__init__(driver)
        self._requests, self._former = requests, former if former is not None else Archive()
        self._inherited = self._former.inherited + requests.inherited
        self._publish_s = 0.0

    def __enter__(self) -> Self:
        self._driver.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._driver.stop()
        finally:
            self._requests.close()
            self._former.close()

    def publish(self, params: Any, version: int) -> None:
        began = time.monotonic()
        self._driver.publish(params, version)
        self._publish_s = time.monotonic() - began

    def account(self) -> EngineAccount:
        metrics = self._driver.metrics()
        sampled, cancelled = sum(metrics.tokens_sampled.values()), sum(metrics.tokens_cancelled.values())
        failed, inherited = sum(metrics.tokens_failed.values()), self._inherited
        return EngineAccount(
            sampled=sampled,
            cancelled=cancelled,
            failed=failed,
            open=sampled - sum(metrics.tokens_returned.values()) - cancelled - failed,
            inherited=inherited.sampled,
            inherited_cancelled=inherited.cancelled,
            inherited_failed=inherited.failed,
            prompt_tokens=metrics.prompt_tokens,
            cached_tokens=metrics.cached_tokens,
            computed_tokens=metrics.computed_tokens,
            active=metrics.active,
            waiting=metrics.waiting,
        )

    def given_before(self) -> Mapping[str, int]:
        return self._inherited.given

    def requests_of(self, request_ids: Iterable[str]) -> Mapping[str, DrawnRequest]:
        wanted = list(request_ids)
        found = {request_id: self._requests.find(request_id) for request_id in wanted}
        mine = {request_id: read_record(entry) for request_id, entry in found.items() if entry is not None}
        return self._former.requests_of(each for each in wanted if each not in mine) | mine

    @property
    def damaged_requests(self) -> int:
        return self._requests.damaged + self._former.damaged

    def trim(self, version: int) -> None:
        self._requests.trim(version)
        self._former.trim(version)

    def flush(self) -> None:
        self._requests.flush()

    def figures(self) -> Mapping[str, float]:
        metrics, told = self._driver.metrics(), {"engine/publish_s": self._publish_s}
        if self._driver.engine.config.reuse == "session":
            told["engine/carried"] = metrics.carried_tokens / max(metrics.prompt_tokens, 1)
        if self._driver.engine.config.speculates:
            told |= {"engine/draft_hit": metrics.draft_hit_rate, "engine/draft_speedup": metrics.draft_speedup}
        return told

    @property
    def healthy(self) -> bool:
        return self._driver.healthy

    @property
    def trouble(self) -> str:
        return "" if self.healthy else "the inference engine has stopped; the log above says why"


def _adapt(on_tokens: OnTokens | None) -> OnDraw | None:
    if on_tokens is None:
        return None
    return lambda draw: on_tokens(draw.token_ids.tolist())
