"""Requests through a driver, and what to hold it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from forgejax.rollout import Driver, LocalSampler
from forgejax.types import Completion, SampleRequest
from tests.rollout import tiny


def gap(completion: Completion, params: object) -> float:
    """The largest difference of the log-probs from those of one dense forward pass of ``params``."""
    expected = tiny.dense_logprobs(params, completion.prompt_ids, completion.token_ids, completion.law)
    return float(np.abs(expected - completion.logprobs).max())


async def sample_all(driver: Driver, requests: Sequence[SampleRequest]) -> list[Completion]:
    """All requests at once."""
    sampler = LocalSampler(driver)
    return await asyncio.wait_for(asyncio.gather(*(sampler.sample(request) for request in requests)), 60)


async def until(condition: Callable[[], bool]) -> None:
    """Waits, at most 30 s, for what another thread will do."""
    for _ in range(3_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true within 30 s")


def balanced(driver: Driver) -> bool:
    """Whether each token sampled was returned, cancelled or failed."""
    metrics = driver.metrics()
    ended = (metrics.tokens_returned, metrics.tokens_cancelled, metrics.tokens_failed)
    return all(count == sum(x[purpose] for x in ended) for purpose, count in metrics.tokens_sampled.items())
