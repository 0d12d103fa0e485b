"""One engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Self

from forgejax.rollout.driver.driver import Driver
from forgejax.rollout.driver.job import OnDraw
from forgejax.rollout.driver.request_log import RequestLog
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
    """``Engines`` over one driver and its request log. Leaving it closes the log."""

    def __init__(self, driver: Driver, requests: RequestLog):
        super().__init__(driver)
        self._requests = requests

    def __enter__(self) -> Self:
        self._driver.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._driver.stop()
        finally:
            self._requests.close()

    def publish(self, params: Any, version: int) -> None:
        self._driver.publish(params, version)

    def account(self) -> EngineAccount:
        metrics = self._driver.metrics()
        sampled, cancelled = sum(metrics.tokens_sampled.values()), sum(metrics.tokens_cancelled.values())
        failed, inherited = sum(metrics.tokens_failed.values()), self._requests.inherited
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
            active=metrics.active,
            waiting=metrics.waiting,
        )

    def given_before(self) -> Mapping[str, int]:
        return self._requests.inherited.given

    def requests_of(self, request_ids: Iterable[str]) -> Mapping[str, DrawnRequest]:
        found = {request_id: self._requests.find(request_id) for request_id in request_ids}
        return {
            request_id: DrawnRequest(prompt_ids=entry.prompt_ids, sampled_ids=entry.sampled_ids)
            for request_id, entry in found.items()
            if entry is not None
        }

    @property
    def damaged_requests(self) -> int:
        return self._requests.damaged

    def trim(self, version: int) -> None:
        self._requests.trim(version)

    def flush(self) -> None:
        self._requests.flush()

    @property
    def healthy(self) -> bool:
        return self._driver.healthy


def _adapt(on_tokens: OnTokens | None) -> OnDraw | None:
    if on_tokens is None:
        return None
    return lambda draw: on_tokens(draw.token_ids.tolist())
