"""The sampler of an engine in this process."""

from __future__ import annotations

import asyncio

from forgejax.rollout.driver.driver import Driver
from forgejax.rollout.driver.scheduler import OnDraw
from forgejax.types import Completion, OnTokens, SampleRequest


class LocalSampler:
    """``types.Sampler`` over a driver, for any event loop in any thread."""

    def __init__(self, driver: Driver):
        self._driver = driver

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``. ``on_tokens`` is called in the driver's thread."""
        return await asyncio.wrap_future(self._driver.submit(request, _on_draw(on_tokens)))


def _on_draw(on_tokens: OnTokens | None) -> OnDraw | None:
    if on_tokens is None:
        return None
    return lambda draw: on_tokens(draw.token_ids.tolist())
